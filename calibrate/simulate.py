"""The calibrated checkpoint in torch: what the engine computes, in float32, without ONNX or TensorRT.

Weights are codes * scale, and the inputs of W8A8 linears pass through the quantizer that the graph's QuantizeLinear is, so
what this loses against the checkpoint is what quantization costs, and what a graph loses against this is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from calibrate.blocks import Block, resident
from calibrate.calibrated import CalibratedCheckpoint
from calibrate.tensors import TensorSource
from calibrate.walk import Run, Step

INT8_MIN, INT8_MAX = -128, 127  # QuantizeLinear's range; calibrated activations stay within +-127


class DequantizedSource:
    """A TensorSource over a calibrated checkpoint: quantized linears give codes * scale, the rest is as stored."""

    def __init__(self, calibrated: CalibratedCheckpoint) -> None:
        self._calibrated = calibrated
        self._linear = {f"{name}.weight": name for name in calibrated.schemes}
        pieces = ("weight_packed", "weight_scale", "weight_shape", "input_scale")
        self._hidden = {f"{name}.{piece}" for name in calibrated.schemes for piece in pieces}

    def __contains__(self, name: object) -> bool:
        return name in self._linear or (name in self._calibrated.floats and name not in self._hidden)

    def __iter__(self) -> Iterator[str]:
        yield from self._linear
        yield from (n for n in self._calibrated.floats if n not in self._hidden and n not in self._linear)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._linear:
            return self._calibrated.floats.shape(name)
        linear = self._linear[name]
        if self._calibrated.schemes[linear].weight_bits == 8:
            return self._calibrated.floats.shape(name)
        return tuple(int(n) for n in self._calibrated.floats.load(f"{linear}.weight_shape"))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._linear else self._calibrated.floats.dtype(name)

    def load(self, name: str) -> np.ndarray:
        if name not in self._linear:
            return self._calibrated.floats.load(name)
        return self._calibrated.linear(self._linear[name]).dequantized()


def simulated_step(calibrated: CalibratedCheckpoint, source: TensorSource) -> Step:
    """A step that computes a block as the engine will: weights of `source` (a DequantizedSource), int8 inputs where W8A8."""

    def step(block: Block, inputs: list[torch.Tensor], run: Run) -> list[torch.Tensor]:
        scales = {
            name.removeprefix(f"{block.prefix}."): scale
            for name in block.linear_names()
            if name in calibrated.schemes and (scale := calibrated.input_scale(name)) is not None
        }
        with resident(block, source) as module, fake_quantized_inputs(module, scales), torch.inference_mode():
            return [run(module, x) for x in inputs]

    return step


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """QuantizeLinear and DequantizeLinear to int8 with zero-point 0: round half to even, saturate. scale: float32 []."""
    return (x / scale).round_().clamp_(INT8_MIN, INT8_MAX).mul_(scale)


@contextmanager
def fake_quantized_inputs(module: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """Fake-quantizes the inputs of the linears named in `scales` while the context is open. names: inside `module`."""

    def quantizer(scale: float) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        step = torch.tensor(scale, dtype=torch.float32)

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (fake_quantize(args[0], step), *args[1:])

        return hook

    handles = [
        module.get_submodule(name).register_forward_pre_hook(quantizer(scale)) for name, scale in scales.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
