"""A block quantized in one way, as the search holds it. torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.calibrators.linear_record import LinearSqnr
from qvlm_export.calibrate.calibrators.partial_forward import CachedOutputs
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.observers import InputObserver
from qvlm_export.calibrate.quantization.quantizer import fake_quantize, sqnr_db


@dataclass
class QuantizedBlock:
    """A block quantized in one way. module: its float weights, folded; rounded: what the graph will compute.

    Both are one module where nobody needs a float weight once it is quantized: a copy takes as much memory as the block.
    metrics: of the linears' outputs, as folded. inputs: by the first linear of each group, what the group read from the
    quantized prefix. outputs: of linears that have been quantized, for the inputs of that prefix. probes: by linear, some
    rows of what it reads from the quantized prefix, and of what it gives in the float model, without its bias. fidelity: of
    each linear. hooks: to be removed in the end.
    """

    module: nn.Module
    rounded: nn.Module
    hooks: ExitStack
    output_hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    found: dict[str, QuantizedLinear] = field(default_factory=dict)
    inputs: dict[str, InputObserver] = field(default_factory=dict)
    outputs: CachedOutputs = field(default_factory=dict)
    probes: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    fidelity: dict[str, LinearSqnr] = field(default_factory=dict)

    def set_(self, linears: Mapping[str, QuantizedLinear]) -> None:
        """Makes `rounded` compute with these linears; the hooks on their inputs look into `found`."""
        for name, linear in linears.items():
            layer, weight = get_linear(self.rounded, name), torch.from_numpy(linear.dequantized())
            of_weight = sqnr_db(get_linear(self.module, name).weight.detach().cpu(), weight)
            layer.weight.copy_(weight)
            if name not in self.found:
                self.hooks.callback(layer.register_forward_pre_hook(self._rounding(name)).remove)
            self.found[name] = linear
            self.fidelity[name] = LinearSqnr(of_weight, self._output_db(name))

    def _output_db(self, name: str) -> float | None:
        read, given = self.probes[name]
        how = self.input_of(name)
        rounded = read if how is None else fake_quantize(read, *how)
        return sqnr_db(given, matmul(rounded, get_linear(self.rounded, name).weight.T))

    def _rounding(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            how = self.input_of(name)
            return args if how is None else (fake_quantize(args[0], *how), *args[1:])

        return hook

    def input_of(self, name: str) -> tuple[float, int] | None:
        """Scale and bits that a linear's input is rounded with; None where it stays float."""
        linear = self.found.get(name)
        if linear is None or linear.input_scale is None or linear.scheme.activation_bits is None:
            return None
        return linear.input_scale, linear.scheme.activation_bits
