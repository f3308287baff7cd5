"""Running a block in parts: up to a layer whose input is wanted, and on from outputs that are known. torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.shared_inputs import Group

PAIRS = ("self_attn",)  # attention returns its weights, too
# By the name of a linear, or of a module that returns what its last linear does: its output for every batch.
Outputs = dict[str, Sequence[torch.Tensor]]


@contextmanager
def recalled(module: nn.Module, known: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Inside, modules in `known` hand out these outputs, the next one at each call, whatever they are given."""
    replaced = {name: module.get_submodule(name) for name in known}
    for name, outputs in known.items():
        module.set_submodule(name, _Recalled(outputs, pair=name in PAIRS))
    try:
        yield
    finally:
        for name, layer in replaced.items():
            module.set_submodule(name, layer)


def is_known(name: str, known: Collection[str]) -> bool:
    """Whether a linear need not compute: its output is known, or that of the module it is in."""
    return name in known or name.partition(".")[0] in known


def without(known: Outputs, ends: str | None) -> Outputs:
    """`known` but for what led to the output of the module `ends`, which nobody needs once that is known."""
    return known if ends is None else {name: outputs for name, outputs in known.items() if name.partition(".")[0] != ends}


def as_batches(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """float32 [tokens of all inputs, out] -> [B, tokens, out] of every input."""
    shapes = [x.shape[:-1] for x in inputs]
    parts = rows.split([shape.numel() for shape in shapes])
    return [part.reshape(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def reaching(module: nn.Module, group: Group, run: Run, inputs: Sequence[torch.Tensor], known: Outputs) -> torch.Tensor:
    """What the group's linears are given, float32 [tokens of all inputs, in], without running what comes after."""
    rows = {group: list[torch.Tensor]()}
    with watched({group: module.get_submodule(group.linears[0])}, rows, stop=True), recalled(module, known):
        for x in inputs:
            with suppress(Reached):
                run(module, x)
    return torch.cat(rows[group])


def resumed(module: nn.Module, run: Run, inputs: Sequence[torch.Tensor], known: Outputs) -> list[torch.Tensor]:
    """What the module returns for every input."""
    with recalled(module, known):
        return [run(module, x) for x in inputs]


class _Recalled(nn.Module):
    """Stands in for a module. pair: which returns something else beside, that nobody reads."""

    def __init__(self, outputs: Sequence[torch.Tensor], *, pair: bool) -> None:
        super().__init__()
        self._outputs, self._pair = iter(outputs), pair

    def forward(self, *_args: object, **_named: object) -> torch.Tensor | tuple[torch.Tensor, None]:
        output = next(self._outputs)
        return (output, None) if self._pair else output


class Reached(Exception):  # noqa: N818 - no error
    """A forward pass has come to the layer whose input is wanted."""


@contextmanager
def watched(layers: Mapping[Group, nn.Module], rows: dict[Group, list[torch.Tensor]], stop: bool = False) -> Iterator[None]:
    """Keeps what each layer is given, before its own input is rounded. stop: ends the forward pass there by `Reached`."""

    def keeper(group: Group) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows[group].append(args[0].flatten(0, -2))
            if stop:
                raise Reached

        return hook

    handles = [layer.register_forward_pre_hook(keeper(group), prepend=True) for group, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
