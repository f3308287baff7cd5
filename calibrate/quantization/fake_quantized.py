"""Fake quantization: runs a calibrated checkpoint in torch, in float32, as its graph computes it, without ONNX or TensorRT.

Weights are codes * scale. Quantized inputs pass the same quantizer as QuantizeLinear in the graph. What stays float is
rounded to the graph's float type where the graph stores it in that type. The difference to the original checkpoint is the
loss by quantization; a difference between a graph and this model is a fault, or a value that was rounded the other way.
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

_LINEAR_TENSORS = ("weight_packed", "weight_scale", "weight_shape", "input_scale")


class DequantizedSource:
    """A TensorSource over a calibrated checkpoint, in which the weights of quantized linears are codes * scale in float32.

    float_type: the type to which all other tensors are rounded, that in which a graph stores them; None does not round.
    """

    def __init__(self, calibrated: CalibratedCheckpoint, float_type: str | None = None) -> None:
        self._calibrated = calibrated
        self._float_type = None if float_type is None else np.dtype(float_type)
        self._linears = {f"{name}.weight": name for name in calibrated.schemes}
        stored = {f"{name}.{suffix}" for name in calibrated.schemes for suffix in _LINEAR_TENSORS}
        self._floats = dict.fromkeys(n for n in calibrated.floats if n not in stored and n not in self._linears)

    def __contains__(self, name: object) -> bool:
        return name in self._linears or name in self._floats

    def __iter__(self) -> Iterator[str]:
        yield from self._linears
        yield from self._floats

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor, unpacked."""
        floats, linear = self._calibrated.floats, self._linears.get(name)
        return floats.shape(name) if linear is None else self._calibrated.weight_shape(linear)

    def dtype(self, name: str) -> np.dtype:
        """The type in which `load` returns the tensor."""
        if name in self._linears:
            return np.dtype(np.float32)
        return self._float_type or self._calibrated.floats.dtype(name)

    def files(self) -> Sequence[Path]:
        """The files that hold the tensors."""
        return self._calibrated.floats.files()

    def load(self, name: str) -> np.ndarray:
        """The tensor, dequantized or rounded to the float type."""
        if name in self._linears:
            return self._calibrated.linear(self._linears[name]).dequantized()
        array = self._calibrated.floats.load(name)
        return array if self._float_type is None else array.astype(self._float_type)


def fake_quantized_step(calibrated: CalibratedCheckpoint, source: DequantizedSource) -> Step:
    """A step that computes a block as its graph does, with the weights of `source`.

    Inputs of linears are fake-quantized where their schemes quantize activations.
    """

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
    """A step that does what `step` does and then calls record(prefix of the block, outputs)."""

    def recorded_step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        outputs = step(block, inputs, run)
        record(block.prefix, outputs)
        return outputs

    return recorded_step


@contextmanager
def fake_quantize_inputs(module: nn.Module, quantizers: Mapping[str, tuple[float, int]]) -> Iterator[None]:
    """Fake-quantizes the inputs of the linears named in `quantizers` while the context is open.

    quantizers: name inside `module` -> (scale, bits) of its input.
    """

    def make_hook(scale: float, bits: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        return lambda _, args: (fake_quantize(args[0], scale, bits), *args[1:])

    handles = [module.get_submodule(name).register_forward_pre_hook(make_hook(*q)) for name, q in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RoundedRotary(nn.Module):
    """A rotary embedding whose cos and sin are rounded as in a graph's tables; float16 changes them by up to 2.4e-4."""

    def __init__(self, rotary: nn.Module, float_type: str) -> None:
        """rotary: a rotary embedding of transformers; float_type: name of the torch type, such as "float16"."""
        super().__init__()
        self._rotary, self._dtype = rotary, getattr(torch, float_type)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin as the rotary embedding returns them, in its own type but rounded."""
        cos, sin = self._rotary(x, **kwargs)
        return cos.to(self._dtype).to(cos.dtype), sin.to(self._dtype).to(sin.dtype)


def round_rotary_tables(blocks: ModelBlocks, float_type: str) -> ModelBlocks:
    """The model's blocks with rotary tables rounded to `float_type`, as a graph stores them."""
    return replace(blocks, rotary=RoundedRotary(blocks.rotary, float_type))
