"""Fake-quantized form of one block: dequantized weights, and hooks that fake-quantize the inputs of its linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.calibrators.partial_forward import CachedOutputs
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.observers import InputObserver
from qvlm_export.calibrate.quantization.quantizer import fake_quantize, sqnr_db
from qvlm_export.calibrate.quantization.record import LinearSqnr


@dataclass(frozen=True)
class Probe:
    """Some tokens on which the SQNR of a linear's output is measured.

    inputs: X_q, [rows, in]. float_outputs: for the rows of X, [rows, out], without the bias. roots: square roots of the
    tokens' weights, [rows, 1].
    """

    inputs: torch.Tensor
    float_outputs: torch.Tensor
    roots: torch.Tensor


@dataclass
class QuantizedBlock:
    """A block while the search quantizes it.

    module: the block with its equalized float weights, each replaced by its codes times their scales once it is quantized.
    hooks: takes the hooks of `module`, to be removed in the end.
    output_hessians: by linear, of its output, scaled as equalization scaled that output.
    linears: the quantized linears by name.
    inputs: by the first linear of each shared input, the observer of its values from the already quantized preceding blocks.
    outputs: cached outputs of the linears quantized so far, for these inputs.
    probes, sqnr: by linear.
    """

    module: nn.Module
    hooks: ExitStack
    output_hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    linears: dict[str, QuantizedLinear] = field(default_factory=dict)
    inputs: dict[str, InputObserver] = field(default_factory=dict)
    outputs: CachedOutputs = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)
    sqnr: dict[str, LinearSqnr] = field(default_factory=dict)

    def set_(self, linears: Mapping[str, QuantizedLinear]) -> None:
        """Makes `module` compute with these linears, and measures their SQNR."""
        for name, linear in linears.items():
            layer, weight = get_linear(self.module, name), torch.from_numpy(linear.dequantized())
            weight_db = sqnr_db(layer.weight.detach().cpu(), weight)
            layer.weight.copy_(weight)
            self.hooks.callback(layer.register_forward_pre_hook(self._make_input_hook(name)).remove)
            self.linears[name] = linear
            self.sqnr[name] = LinearSqnr(weight_db, self._measure_output_db(name))

    def _measure_output_db(self, name: str) -> float | None:
        probe, quantizer = self.probes[name], self.input_quantizer(name)
        rounded = probe.inputs if quantizer is None else fake_quantize(probe.inputs, *quantizer)
        outputs = matmul(rounded, get_linear(self.module, name).weight.T)
        return sqnr_db(probe.float_outputs * probe.roots, outputs * probe.roots)

    def _make_input_hook(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            quantizer = self.input_quantizer(name)
            return args if quantizer is None else (fake_quantize(args[0], *quantizer), *args[1:])

        return hook

    def input_quantizer(self, name: str) -> tuple[float, int] | None:
        """Returns the scale and the number of bits that a linear's input is quantized with; None where it stays float."""
        linear = self.linears.get(name)
        if linear is None or linear.input_scale is None or linear.scheme.activation_bits is None:
            return None
        return linear.input_scale, linear.scheme.activation_bits
