"""Partial forward passes of a block: run up to a linear, record its input, and resume from cached outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.shared_inputs import SharedInput

RETURNS_PAIR = ("self_attn",)  # attention returns its weights, too
# By the name of a linear, or of a module that returns the output of its last linear: its output for every batch.
CachedOutputs = dict[str, Sequence[torch.Tensor]]
_K = TypeVar("_K")


@contextmanager
def replace_with_cached(module: nn.Module, cached: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Replaces the submodules named in `cached` while the context is open.

    A replaced submodule ignores its input and returns its cached outputs, one at each call.
    """
    replaced = {name: module.get_submodule(name) for name in cached}
    for name, outputs in cached.items():
        module.set_submodule(name, _CachedModule(outputs, returns_pair=name in RETURNS_PAIR))
    try:
        yield
    finally:
        for name, layer in replaced.items():
            module.set_submodule(name, layer)


def is_cached(name: str, cached: Collection[str]) -> bool:
    """Whether a linear need not compute, as its output, or that of the module it is in, is cached."""
    return name in cached or name.partition(".")[0] in cached


def drop_inside(cached: CachedOutputs, enclosing_module: str | None) -> CachedOutputs:
    """Returns `cached` without the outputs inside `enclosing_module`, which are not needed once its own output is known."""
    if enclosing_module is None:
        return cached
    return {name: outputs for name, outputs in cached.items() if name.partition(".")[0] != enclosing_module}


def split_rows(rows: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Splits rows float32 [tokens of all inputs, out] into [B, tokens, out] for every input."""
    shapes = [x.shape[:-1] for x in inputs]
    parts = rows.split([shape.numel() for shape in shapes])
    return [part.reshape(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def run_until(
    module: nn.Module, shared: SharedInput, run: Run, inputs: Sequence[torch.Tensor], cached: CachedOutputs
) -> torch.Tensor:
    """Returns the rows of the shared input, float32 [tokens of all inputs, in], without running what comes after it."""
    rows = {shared: list[torch.Tensor]()}
    layers = {shared: module.get_submodule(shared.linears[0])}
    with record_inputs(layers, rows, stop=True), replace_with_cached(module, cached):
        for x in inputs:
            with suppress(StopForward):
                run(module, x)
    return torch.cat(rows[shared])


def run_from_cached(
    module: nn.Module, run: Run, inputs: Sequence[torch.Tensor], cached: CachedOutputs
) -> list[torch.Tensor]:
    """Returns the module's output for every input, without running what is cached."""
    with replace_with_cached(module, cached):
        return [run(module, x) for x in inputs]


class _CachedModule(nn.Module):
    """Stands in for a module and returns its cached outputs.

    returns_pair: whether the module returns a second value, which nothing reads.
    """

    def __init__(self, outputs: Sequence[torch.Tensor], *, returns_pair: bool) -> None:
        super().__init__()
        self._outputs, self._returns_pair = iter(outputs), returns_pair

    def forward(self, *_args: object, **_named: object) -> torch.Tensor | tuple[torch.Tensor, None]:
        output = next(self._outputs)
        return (output, None) if self._returns_pair else output


class StopForward(Exception):  # noqa: N818 - no error
    """Ends a forward pass at the layer whose input is recorded."""


@contextmanager
def record_inputs(layers: Mapping[_K, nn.Module], rows: dict[_K, list[torch.Tensor]], stop: bool = False) -> Iterator[None]:
    """Appends each layer's input, [tokens, in] and not yet fake-quantized, to `rows` at every call inside the context.

    stop: whether to end the forward pass there, by raising `StopForward`.
    """

    def make_hook(key: _K) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows[key].append(args[0].flatten(0, -2))
            if stop:
                raise StopForward

        return hook

    # Prepended, so that it comes before the hook that fake-quantizes the layer's input.
    handles = [layer.register_forward_pre_hook(make_hook(key), prepend=True) for key, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
