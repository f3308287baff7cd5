"""SQNR of a quantized linear, and its entry in the calibration record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.quantization.quantizer import sqnr_db

SQNR_CHANNELS = 256  # output channels, or a few more, whose SQNR says as much as that of all of them


@dataclass(frozen=True)
class LinearSqnr:
    """SQNR of a linear in dB, None where nothing differs or where it was not measured.

    weight_db: of its weight against the equalized float weight. output_db: of its output, on some inputs from the already
    quantized preceding blocks, against its output in the float model.
    """

    weight_db: float | None
    output_db: float | None = None


def measure_weight_sqnr(weight: torch.Tensor, linear: QuantizedLinear) -> LinearSqnr:
    """Returns the weight's SQNR, measured on output channels that are spread evenly.

    weight: the float weight of any type, [out, in], that `linear` was quantized from.
    """
    step = max(1, len(weight) // SQNR_CHANNELS)
    subset = replace(linear, codes=linear.codes[::step], scale=linear.scale[::step])
    return LinearSqnr(sqnr_db(weight[::step].float().cpu(), torch.from_numpy(subset.dequantized())))


def make_linear_record(linear: QuantizedLinear, sqnr: LinearSqnr, amax: float | None) -> dict[str, Any]:
    """Returns the record of one linear. amax: largest magnitude of its input, None where that was not observed.

    bits_per_weight: storage of the codes as the scheme packs them, and of the scales.
    range_coverage: the clipping range of the input divided by its largest magnitude, above 1 where the range is wider; None,
    as input_scale, for float activations.
    sqnr_db: SQNR of the output, which includes errors of the input, and with them those of the blocks before.
    weight_sqnr_db: weights that were moved to compensate for other errors count as errors here, though they are not.
    """
    scheme, scale = linear.scheme, linear.input_scale
    coverage = None
    if scale is not None and scheme.activation_bits is not None and amax:
        coverage = scale * (2 ** (scheme.activation_bits - 1) - 1) / amax
    return {
        "scheme": scheme.name + (f" g{scheme.group_size}" if scheme.group_size else ""),
        "bits_per_weight": scheme.weight_bits + 8 * scheme.scale_bytes * linear.scale.size / linear.codes.size,
        "sqnr_db": sqnr.output_db,
        "weight_sqnr_db": sqnr.weight_db,
        "input_scale": scale,
        "range_coverage": coverage,
    }
