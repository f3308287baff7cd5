"""Running a block in parts: up to a layer whose input is wanted, and on from outputs that are known. torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.shared_inputs import SharedInput

RETURNS_PAIR = ("self_attn",)  # attention returns its weights, too
# By the name of a linear, or of a module that returns what its last linear does: its output for every batch.
CachedOutputs = dict[str, Sequence[torch.Tensor]]


@contextmanager
def replace_with_cached(module: nn.Module, known: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Inside, modules in `known` hand out these outputs, the next one at each call, whatever they are given."""
    replaced = {name: module.get_submodule(name) for name in known}
    for name, outputs in known.items():
        module.set_submodule(name, _Recalled(outputs, pair=name in RETURNS_PAIR))
    try:
        yield
    finally:
        for name, layer in replaced.items():
            module.set_submodule(name, layer)


def is_cached(name: str, known: Collection[str]) -> bool:
    """Whether a linear need not compute: its output is known, or that of the module it is in."""
    return name in known or name.partition(".")[0] in known


def drop_inside(known: CachedOutputs, ends: str | None) -> CachedOutputs:
    """`known` but for what led to the output of the module `enclosing_module`, which nobody needs once that is known."""
    return known if ends is None else {name: outputs for name, outputs in known.items() if name.partition(".")[0] != ends}


def split_rows(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """float32 [tokens of all inputs, out] -> [B, tokens, out] of every input."""
    shapes = [x.shape[:-1] for x in inputs]
    parts = rows.split([shape.numel() for shape in shapes])
    return [part.reshape(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def run_until(
    module: nn.Module, group: SharedInput, run: Run, inputs: Sequence[torch.Tensor], known: CachedOutputs
) -> torch.Tensor:
    """What the group's linears are given, float32 [tokens of all inputs, in], without running what comes after."""
    rows = {group: list[torch.Tensor]()}
    with record_inputs({group: module.get_submodule(group.linears[0])}, rows, stop=True), replace_with_cached(module, known):
        for x in inputs:
            with suppress(StopForward):
                run(module, x)
    return torch.cat(rows[group])


def run_from_cached(module: nn.Module, run: Run, inputs: Sequence[torch.Tensor], known: CachedOutputs) -> list[torch.Tensor]:
    """What the module returns for every input."""
    with replace_with_cached(module, known):
        return [run(module, x) for x in inputs]


class _Recalled(nn.Module):
    """Stands in for a module. pair: which returns something else beside, that nobody reads."""

    def __init__(self, outputs: Sequence[torch.Tensor], *, pair: bool) -> None:
        super().__init__()
        self._outputs, self._pair = iter(outputs), pair

    def forward(self, *_args: object, **_named: object) -> torch.Tensor | tuple[torch.Tensor, None]:
        output = next(self._outputs)
        return (output, None) if self._pair else output


class StopForward(Exception):  # noqa: N818 - no error
    """A forward pass has come to the layer whose input is wanted."""


@contextmanager
def record_inputs(
    layers: Mapping[SharedInput, nn.Module], rows: dict[SharedInput, list[torch.Tensor]], stop: bool = False
) -> Iterator[None]:
    """Keeps what each layer is given, before its own input is rounded. stop: ends the forward pass there by
    `StopForward`."""

    def keeper(group: SharedInput) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows[group].append(args[0].flatten(0, -2))
            if stop:
                raise StopForward

        return hook

    handles = [layer.register_forward_pre_hook(keeper(group), prepend=True) for group, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
