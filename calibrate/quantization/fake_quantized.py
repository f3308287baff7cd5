"""The calibrated checkpoint in torch: what its graph computes, in float32, without ONNX or TensorRT.

Weights are codes * scale; quantized inputs pass the quantizer that is QuantizeLinear in the graph; what stays float is
rounded to the graph's float type where the graph stores it so. What this loses against the checkpoint is the price of
quantization; what a graph loses against this is a fault, or a rounding that fell the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block
from qvlm_export.calibrate.blockwise.forward import Run, Step
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.quantization.quantizer import fake_quantize

_PIECES = ("weight_packed", "weight_scale", "weight_shape", "input_scale")


class DequantizedSource:
    """A TensorSource over a calibrated checkpoint: quantized linears give codes * scale in float32.

    float_type: what the other tensors are rounded to, the type a graph stores them in; None leaves them as they are.
    """

    def __init__(self, calibrated: CalibratedCheckpoint, float_type: str | None = None) -> None:
        self._calibrated = calibrated
        self._float_type = None if float_type is None else np.dtype(float_type)
        self._linears = {f"{name}.weight": name for name in calibrated.schemes}
        pieces = {f"{name}.{piece}" for name in calibrated.schemes for piece in _PIECES}
        self._floats = dict.fromkeys(n for n in calibrated.floats if n not in pieces and n not in self._linears)

    def __contains__(self, name: object) -> bool:
        return name in self._linears or name in self._floats

    def __iter__(self) -> Iterator[str]:
        yield from self._linears
        yield from self._floats

    def shape(self, name: str) -> tuple[int, ...]:
        floats, linear = self._calibrated.floats, self._linears.get(name)
        if linear is None or self._calibrated.schemes[linear].group_size is None:
            return floats.shape(name)
        rows, columns = floats.load(f"{linear}.weight_shape")
        return int(rows), int(columns)

    def dtype(self, name: str) -> np.dtype:
        if name in self._linears:
            return np.dtype(np.float32)
        return self._float_type or self._calibrated.floats.dtype(name)

    def files(self) -> Sequence[Path]:
        return self._calibrated.floats.files()

    def load(self, name: str) -> np.ndarray:
        if name in self._linears:
            return self._calibrated.linear(self._linears[name]).dequantized()
        array = self._calibrated.floats.load(name)
        return array if self._float_type is None else array.astype(self._float_type)


def fake_quantized_step(calibrated: CalibratedCheckpoint, source: DequantizedSource) -> Step:
    """A step that computes a block as its graph does: weights of `source`, inputs fake-quantized where planned."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        quantizers = {
            name.removeprefix(f"{block.prefix}."): quantizer
            for name in block.linear_names()
            if name in calibrated.schemes and (quantizer := calibrated.input_quantizer(name)) is not None
        }
        with load_block(block, source) as module, fake_quantize_inputs(module, quantizers), torch.inference_mode():
            return [run(module, x) for x in inputs]

    return step


def record_outputs(step: Step, record: Callable[[str, Sequence[torch.Tensor]], None]) -> Step:
    """The same step, whose outputs are shown to record(prefix of the block, outputs)."""

    def watched(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        outputs = step(block, inputs, run)
        record(block.prefix, outputs)
        return outputs

    return watched


@contextmanager
def fake_quantize_inputs(module: nn.Module, quantizers: Mapping[str, tuple[float, int]]) -> Iterator[None]:
    """Fake-quantizes the inputs of the linears named in `quantizers` while the context is open.

    quantizers: name inside `module` -> (scale, bits) of its input.
    """

    def quantizer(scale: float, bits: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        return lambda _, args: (fake_quantize(args[0], scale, bits), *args[1:])

    handles = [module.get_submodule(name).register_forward_pre_hook(quantizer(*q)) for name, q in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RoundedRotary(nn.Module):
    """A rotary embedding whose cos and sin are rounded as a graph stores its tables, float16 by up to 2.4e-4."""

    def __init__(self, rotary: nn.Module, float_type: str) -> None:
        super().__init__()
        self._rotary, self._dtype = rotary, getattr(torch, float_type)

    def forward(self, x: torch.Tensor, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(x, **given)
        return cos.to(self._dtype).to(cos.dtype), sin.to(self._dtype).to(sin.dtype)


def round_rotary_tables(blocks: ModelBlocks, float_type: str) -> ModelBlocks:
    """The same blocks with the rotary tables of a graph in `float_type`."""
    return replace(blocks, rotary=RoundedRotary(blocks.rotary, float_type))
