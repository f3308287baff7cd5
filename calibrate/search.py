"""The search over one block after another: fold, choose ranges, round jointly towards the float block's output. torch.

Inputs of a block come from the already quantized prefix; the target is always the float model. A block's groups of linears
are done in the order they compute, so that each sees what the ones before it really produce. Cost in block forwards: 1
float run that keeps every group's input, 1 quantized run for each group, 1 to hand over (counted at run time).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from calibrate.blocks import linear_of
from calibrate.calibrated import QuantizedLinear
from calibrate.fold import Group, apply_factors_, groups_of, search_factors, sharing_of
from calibrate.gptq import aim_at_float, column_scales, gptq_round
from calibrate.ranges import fake_quantize_activation, search_activation_scale, search_weight_scale
from calibrate.scheme import LinearScheme
from calibrate.walk import Run

SEARCH_TOKENS = 512  # rows of a group's input that folding and activation ranges are judged on
RIDGE = 0.1


@dataclass
class BlockSearch:
    """One block being searched. `module` holds the float weights, folded; `quantized` a copy with rounded ones."""

    module: nn.Module
    plan: Mapping[str, LinearScheme]  # by name inside the block
    run: Run
    forwards: int = 0
    found: dict[str, QuantizedLinear] = field(default_factory=dict)

    def search(
        self, float_inputs: list[torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Quantizes the block's planned linears into `found`; returns the float and the quantized outputs."""
        groups = [g for g in groups_of(self.module) if any(name in self.plan for name in g.linears)]
        wanted, outputs = self._capture(self.module, groups, float_inputs)
        for group in groups:
            wanted[group] = wanted[group] / self._fold(group, wanted[group])
        rounded = copy.deepcopy(self.module)
        for group in groups:
            seen, _ = self._capture(rounded, [group], inputs)
            self._round_group(group, rounded, wanted[group], seen[group])
        final = [self.run(rounded, x) for x in inputs]
        self.forwards += len(inputs)
        return outputs, final

    def _fold(self, group: Group, inputs: torch.Tensor) -> torch.Tensor:
        """Applies the best factors to `module`; returns what the group's input channels were divided by."""
        schemes = {self.plan.get(name) for name in group.linears}
        scheme = schemes.pop()
        if group.producer is None or schemes or scheme is None:
            return torch.ones(inputs.shape[1])
        weight = torch.cat([linear_of(self.module, name).weight for name in group.linears])
        factors = search_factors(inputs[chosen_rows(inputs)], weight, scheme, sharing_of(self.module, group))
        return apply_factors_(self.module, group, factors)

    def _round_group(
        self,
        group: Group,
        rounded: nn.Module,
        wanted: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        """Ranges and codes of one group's linears; writes the rounded weights into `rounded`."""
        planned = [name for name in group.linears if name in self.plan]
        bits = {self.plan[name].activation_bits for name in planned} - {None}
        input_scale: float | None = None
        if bits:
            num_bits = int(bits.pop() or 8)
            weight = torch.cat([linear_of(self.module, name).weight for name in planned])
            rows = chosen_rows(seen)
            input_scale = search_activation_scale(seen[rows], wanted[rows], weight, num_bits)
            seen = fake_quantize_activation(seen, input_scale, num_bits)
        gram, cross = seen.T @ seen, wanted.T @ seen
        for name in planned:
            scheme = self.plan[name]
            layer = linear_of(rounded, name)
            aimed = aim_at_float(linear_of(self.module, name).weight, gram, cross, RIDGE)
            scale = search_weight_scale(aimed, gram, scheme)
            codes = gptq_round(aimed, gram, scale, scheme)
            layer.weight.copy_(codes.float() * column_scales(scale, codes.shape[1]))
            own = input_scale if scheme.activation_bits is not None else None
            if own is not None:
                layer.register_forward_pre_hook(_rounding(own, int(scheme.activation_bits or 8)))
            self.found[name] = QuantizedLinear(scheme, codes.numpy(), scale.numpy(), own)

    def _capture(
        self, module: nn.Module, groups: Sequence[Group], inputs: list[torch.Tensor]
    ) -> tuple[dict[Group, torch.Tensor], list[torch.Tensor]]:
        """Runs `module` on all inputs; returns each group's input rows [tokens, in] and the outputs."""
        rows: dict[Group, list[torch.Tensor]] = {group: [] for group in groups}
        with _watched({group: module.get_submodule(group.linears[0]) for group in groups}, rows):
            outputs = [self.run(module, x) for x in inputs]
        self.forwards += len(inputs)
        return {group: torch.cat(parts) for group, parts in rows.items()}, outputs


@contextmanager
def _watched(layers: Mapping[Group, nn.Module], rows: dict[Group, list[torch.Tensor]]) -> Iterator[None]:
    """Keeps what each layer is given, before its own input is rounded."""

    def keeper(group: Group) -> Callable[..., None]:
        return lambda _, args: rows[group].append(args[0].flatten(0, -2))

    handles = [layer.register_forward_pre_hook(keeper(group), prepend=True) for group, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(scale: float, num_bits: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda _, args: (fake_quantize_activation(args[0], scale, num_bits), *args[1:])


def chosen_rows(rows: torch.Tensor) -> torch.Tensor:
    """Indices of at most SEARCH_TOKENS rows: evenly spread over all samples, and those with the largest values.

    A few tokens (the first of a sequence, mostly) have values far beyond all others; without them a range would look safe
    that clips them.
    """
    if len(rows) <= SEARCH_TOKENS:
        return torch.arange(len(rows))
    extreme = torch.topk(rows.abs().amax(dim=1), SEARCH_TOKENS // 8).indices
    spread = torch.linspace(0, len(rows) - 1, SEARCH_TOKENS - len(extreme)).long()
    return torch.unique(torch.cat([spread, extreme]))
