"""Parts of the calibration record that all efforts share: linears, errors by kind of token, the round-to-nearest baseline.

Values that do not exist, such as the SQNR of an exact weight, are None or left out, never infinite, as JSON has no infinity.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.block_loader import CPU
from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.activation_range import find_massive, observe_magnitudes
from qvlm_export.calibrate.quantization.fake_quantized import fake_quantize_inputs
from qvlm_export.calibrate.quantization.quantizer import quantize_linear, sqnr_db
from qvlm_export.calibrate.quantization.tokens import TokenLabel, token_errors

SQNR_CHANNELS = 256  # output channels, or a few more, whose SQNR says as much as that of all of them
MAX_COMPARED_INPUTS = 8  # inputs of a block, which is enough for a mean over their tokens and costs next to nothing


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


def describe_massive(outputs: Sequence[torch.Tensor], texts: Sequence[Sample]) -> dict[str, float | int] | None:
    """Returns what `find_massive` finds in a block's outputs [1, tokens, width]; in the decoder with the id of the token.

    texts: the prompts of a decoder layer's outputs, in order; empty for other blocks.
    """
    found = find_massive(outputs)
    if found is None or not texts:
        return found
    return found | {"token": int(texts[int(found["input"])].input_ids[int(found["position"])])}


def compute_errors_by_label(
    outputs: Sequence[torch.Tensor], float_outputs: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Returns the mean error, see `token_errors`, of the tokens of each label that occurs.

    outputs, float_outputs: float32 [n, tokens, width] of each input; labels: int64 [tokens], or [1] for all its tokens.
    """
    error, count = torch.zeros(2, len(TokenLabel), dtype=torch.float64)
    for output, exact, label in zip(outputs, float_outputs, labels, strict=True):
        tokens = label.expand(output.shape[1])
        error.index_add_(0, tokens, token_errors(output, exact).sum(0).double())
        count.index_add_(0, tokens, torch.full(tokens.shape, float(len(output)), dtype=torch.float64))
    present = {int(n) for label in labels for n in label.unique()}
    return {label.name.lower(): float(error[label] / count[label].clamp(min=1)) for label in TokenLabel if label in present}


@dataclass(frozen=True)
class RtnBaseline:
    """Outputs of a block quantized by round-to-nearest, float32 [n, tokens, width], for some of its inputs.

    numbers: of these inputs among all inputs of the block.
    """

    numbers: tuple[int, ...]
    outputs: tuple[torch.Tensor, ...]


def run_rtn_baseline(
    module: nn.Module,
    schemes: Mapping[str, LinearScheme],
    run: Run,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device = CPU,
) -> RtnBaseline:
    """Quantizes weights and inputs of a copy of the block by round-to-nearest with absmax ranges, and returns its outputs.

    pairs: every input of the block, X in the float model and X_q from the already quantized preceding blocks. Up to
    MAX_COMPARED_INPUTS of them are run, spread evenly: X through the float block to observe the ranges, X_q through the
    quantized copy. device: of the module.
    """
    numbers = tuple(range(0, len(pairs), -(-len(pairs) // MAX_COMPARED_INPUTS) or 1))
    if not schemes or not numbers:
        return RtnBaseline((), ())
    with observe_magnitudes(module) as largest:
        for number in numbers:
            run(module, pairs[number][0].to(device))
    rounded, quantizers = copy.deepcopy(module), dict[str, tuple[float, int]]()
    for name, scheme in schemes.items():
        layer = get_linear(rounded, name)
        linear = quantize_linear(layer.weight, scheme, largest[f"{name}.input"])
        layer.weight.copy_(torch.from_numpy(linear.dequantized()))
        if linear.input_scale is not None and scheme.activation_bits is not None:
            quantizers[name] = (linear.input_scale, scheme.activation_bits)
    with fake_quantize_inputs(rounded, quantizers):
        return RtnBaseline(numbers, tuple(run(rounded, pairs[number][1].to(device)).cpu() for number in numbers))
