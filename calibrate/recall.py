"""Running a block in parts: up to a layer whose input is wanted, and on from outputs that are known. torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from calibrate.blocks import linear_of
from calibrate.fold import Group

# By the name of a linear inside the block, its output for every batch.
Outputs = dict[str, Sequence[torch.Tensor]]


@contextmanager
def recalled(module: nn.Module, known: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Inside, linears in `known` hand out these outputs, the next one at each call, whatever they are given."""
    linears = {name: linear_of(module, name) for name in known}
    for name, outputs in known.items():
        module.set_submodule(name, _Recalled(outputs))
    try:
        yield
    finally:
        for name, linear in linears.items():
            module.set_submodule(name, linear)


def forget_behind(known: Outputs, group: Group, previous: Group | None) -> None:
    """Makes outputs that only lead to this group's input, which is known, zeros that take no memory.

    That is so where the group's inputs can be folded into a linear of the group before: factors of what anything else
    reads could not be undone.
    """
    for name in previous.linears if previous is not None and group.producer in previous.linears else ():
        known[name] = [torch.zeros((), device=output.device).expand(output.shape) for output in known[name]]


class _Recalled(nn.Module):
    """Stands in for a linear. Zeros that share their memory get some of their own, as modules reshape their inputs."""

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._outputs = iter(outputs)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return next(self._outputs).contiguous()


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
