"""How close a quantized linear is to the float one, and what the record says of it. torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.quantization.quantizer import sqnr_db

JUDGED_ROWS = 256  # outputs, or a few more, which say as much as all of them


@dataclass(frozen=True)
class LinearSqnr:
    """SQNR of a linear in dB, None where nothing differs or nobody looked: of its weight against the float one as folded,
    and of what it gives, on some inputs from the quantized prefix, against what it gives in the float model."""

    weight_db: float | None
    output_db: float | None = None


def measure_weight_sqnr(weight: torch.Tensor, linear: QuantizedLinear) -> LinearSqnr:
    """Of some outputs, spread evenly. weight: floats of any type [out, in], of which `linear` was made."""
    step = max(1, len(weight) // JUDGED_ROWS)
    some = replace(linear, codes=linear.codes[::step], scale=linear.scale[::step])
    return LinearSqnr(sqnr_db(weight[::step].float().cpu(), torch.from_numpy(some.dequantized())))


def make_linear_record(linear: QuantizedLinear, fidelity: LinearSqnr, amax: float | None) -> dict[str, Any]:
    """One linear. amax: largest magnitude that it read, None where nobody looked.

    bits_per_weight: codes as the scheme has them, and scales. covered: the part of the input's largest magnitude that its
    range reaches, above 1 where the range is wider; None, as input_scale, for float activations. sqnr_db: of what it gives,
    errors of its input included, which come from the blocks before, too. weight_sqnr_db: weights that were moved to make up
    for other errors count as wrong here though they are not.
    """
    scheme, scale = linear.scheme, linear.input_scale
    covered = None
    if scale is not None and scheme.activation_bits is not None and amax:
        covered = scale * (2 ** (scheme.activation_bits - 1) - 1) / amax
    return {
        "scheme": scheme.name + (f" g{scheme.group_size}" if scheme.group_size else ""),
        "bits_per_weight": scheme.weight_bits + 8 * scheme.scale_bytes * linear.scale.size / linear.codes.size,
        "sqnr_db": fidelity.output_db,
        "weight_sqnr_db": fidelity.weight_db,
        "input_scale": scale,
        "covered": covered,
    }
