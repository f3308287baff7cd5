"""What rounding to nearest would make of a block: what the record compares the search with. torch."""

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
    """Outputs of a block rounded to nearest, float32 [n, tokens, width], for some of its inputs. numbers: of these."""

    numbers: tuple[int, ...]
    outputs: tuple[torch.Tensor, ...]


def run_rtn_baseline(
    module: nn.Module,
    plan: Mapping[str, LinearScheme],
    run: Run,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device = CPU,
) -> RtnBaseline:
    """Weights and inputs rounded to nearest, the largest values as ranges; the block itself stays as it is.

    pairs: every input of the block, in the float model and from the quantized prefix. Up to COMPARED of them are run, spread
    evenly: once in float for the ranges, once rounded. device: of the module.
    """
    numbers = tuple(range(0, len(pairs), -(-len(pairs) // MAX_COMPARED_INPUTS) or 1))
    if not plan or not numbers:
        return RtnBaseline((), ())
    with observe_amax(module) as amax:
        for number in numbers:
            run(module, pairs[number][0].to(device))
    rounded, quantizers = copy.deepcopy(module), dict[str, tuple[float, int]]()
    for name, scheme in plan.items():
        layer = get_linear(rounded, name)
        linear = quantize_linear(layer.weight, scheme, amax[name])
        layer.weight.copy_(torch.from_numpy(linear.dequantized()))
        if linear.input_scale is not None and scheme.activation_bits is not None:
            quantizers[name] = (linear.input_scale, scheme.activation_bits)
    with fake_quantize_inputs(rounded, quantizers):
        return RtnBaseline(numbers, tuple(run(rounded, pairs[number][1].to(device)).cpu() for number in numbers))
