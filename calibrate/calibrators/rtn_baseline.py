"""RTN baseline: outputs of a block quantized by round-to-nearest, which the record compares the search with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.offload import CPU
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.fake_quantized import fake_quantize_inputs
from qvlm_export.calibrate.quantization.observers import observe_amax
from qvlm_export.calibrate.quantization.quantizer import quantize_linear

MAX_COMPARED_INPUTS = 8  # inputs of a block, which is enough for a mean over their tokens and costs next to nothing


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
    with observe_amax(module) as amax:
        for number in numbers:
            run(module, pairs[number][0].to(device))
    rounded, quantizers = copy.deepcopy(module), dict[str, tuple[float, int]]()
    for name, scheme in schemes.items():
        layer = get_linear(rounded, name)
        linear = quantize_linear(layer.weight, scheme, amax[name])
        layer.weight.copy_(torch.from_numpy(linear.dequantized()))
        if linear.input_scale is not None and scheme.activation_bits is not None:
            quantizers[name] = (linear.input_scale, scheme.activation_bits)
    with fake_quantize_inputs(rounded, quantizers):
        return RtnBaseline(numbers, tuple(run(rounded, pairs[number][1].to(device)).cpu() for number in numbers))
