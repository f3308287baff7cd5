"""Joint search of the clipping ranges of a block of consecutive layers (Q-VLM, section 3.1).

The search knows a layer as two functions and a list of candidates, so it is the same for a decoder's linears and for a
toy chain. `prepare` turns the outputs of all layers before into this layer's input, `apply` computes its output with one
candidate. `apply` is what takes the time, and is counted as a layer forward. `Replay` is the `prepare` of a model's module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.observers import Histogram
from qvlm_export.calibrate.quantization.quantizer import squared_sum

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)  # the paper's

Outputs = tuple[Any, ...]  # of the layers from the first of the chain on


@dataclass(frozen=True)
class Clip:
    """A clipping range: `fraction` of the magnitude that the share `percentile` of a tensor's values does not exceed."""

    percentile: float = 1.0
    fraction: float = 1.0

    def rank(self, count: int) -> int:
        """Returns the rank of that magnitude among `count` values, the smallest having rank 1."""
        return max(1, math.ceil(self.percentile * count))

    def activation_amax(self, histogram: Histogram) -> float:
        """Returns the amax of a layer's input, from its histogram."""
        return histogram.percentile(self.percentile) * self.fraction

    def weight_amax(self, weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
        """Returns the amax of every group or output channel, among whose own values the percentile is taken.

        weight: float32 [out, in] -> float32 [out, in // group_size] or [out].
        """
        shape = weight.shape if scheme.group_size is None else (weight.shape[0], -1, scheme.group_size)
        magnitudes = weight.abs().reshape(shape)
        rank = self.rank(magnitudes.shape[-1])
        if rank == magnitudes.shape[-1]:
            return magnitudes.amax(-1) * self.fraction
        return magnitudes.kthvalue(rank, dim=-1).values * self.fraction


PAPER_CLIPS = tuple(Clip(percentile) for percentile in PERCENTILES)


@dataclass(frozen=True)
class SearchLayer:
    """A layer of a chain as two functions and its candidates.

    prepare: outputs of all layers before it -> its input. apply: (input, candidate) -> its output, not changed afterwards.
    """

    prepare: Callable[[Outputs], Any]
    apply: Callable[[Any, Any], Any]
    candidates: Sequence[Any]


@dataclass(frozen=True)
class SearchResult:
    """The best combination of a search.

    choice: index of each layer's candidate. outputs: of the layers before the block, and of the block's layers with that
    choice. error: of the block's output. first_error: the error with the first candidate of every layer. calls: how often
    `apply` was called for each layer.
    """

    choice: tuple[int, ...]
    outputs: Outputs
    error: float
    first_error: float
    calls: tuple[int, ...]

    @property
    def layer_forwards(self) -> int:
        """How often `apply` was called."""
        return sum(self.calls)


def search_tree(layers: Sequence[SearchLayer], error: Callable[[Any], float], before: Outputs = ()) -> SearchResult:
    """Tries all combinations, depth first, and returns the best; the first of equally good combinations wins.

    layers: of the block, in order. error: maps the block's output, that of its last layer, to the number to minimize.
    before: outputs of the already quantized layers before the block.
    A layer's output is computed once for all combinations that share the candidates up to it, so K candidates cost
    K + K^2 + .. + K^depth layer forwards, in the memory of one output for each layer.
    """
    best: list[SearchResult] = []
    calls = [0] * len(layers)

    def descend(outputs: Outputs, choice: tuple[int, ...]) -> None:
        layer = layers[len(choice)]
        x = layer.prepare(outputs)
        for index, candidate in enumerate(layer.candidates):
            output = layer.apply(x, candidate)
            calls[len(choice)] += 1
            chosen = (*choice, index)
            if len(chosen) < len(layers):
                descend((*outputs, output), chosen)
                continue
            cost = error(output)
            if not best or cost < best[0].error:
                first = best[0].first_error if best else cost
                best[:] = [SearchResult(chosen, (*outputs, output), cost, first, ())]

    descend(before, ())
    return replace(best[0], calls=tuple(calls))


class _StopReplay(Exception):  # noqa: N818 - no error
    """Ends a forward pass at the layer whose input is wanted."""


class _Tap(nn.Module):
    """Stands in for a linear: records its last input and returns the output that was set; where none is set, it stops."""

    def __init__(self) -> None:
        super().__init__()
        self.input = torch.empty(0)
        self.output: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.input = x
        if self.output is None:
            raise _StopReplay
        return self.output


@dataclass(frozen=True)
class Replay:
    """A module whose linears are replaced by taps: it computes norms, attention and activation functions only.

    A layer is the names of the linears that share an input. Its outputs are a mapping from these names to float32
    [tokens, out], the tokens of all `inputs` one after another. A replay computes none of these linears, so it costs little
    compared to a layer forward. runs: how often the module was replayed up to each layer, and to its end.
    """

    module: nn.Module
    layers: Sequence[tuple[str, ...]]  # in the order in which they are computed
    run: Run
    inputs: Sequence[torch.Tensor]
    taps: Mapping[str, _Tap]
    runs: Counter[int] = field(default_factory=Counter)

    def layer_input(self, outputs: Outputs) -> torch.Tensor:
        """Returns the input of the layer that follows those whose outputs are `outputs`, float32 [tokens, in]."""
        tap = self.taps[self.layers[len(outputs)][0]]
        return torch.cat([tap.input.flatten(0, -2) for _ in self._run_inputs(outputs)])

    def finish(self, outputs: Outputs) -> list[torch.Tensor]:
        """Returns the module's output for every input, from the outputs of all its layers."""
        return [output for output in self._run_inputs(outputs) if output is not None]

    def _run_inputs(self, outputs: Outputs) -> Iterator[torch.Tensor | None]:
        """Runs the module on one input after another, with the outputs of its first layers set, up to the layer after them.

        Yields its outputs where that is its end, else None.
        """
        self.runs[len(outputs)] += 1
        start = 0
        for x in self.inputs:
            stop = start + x.shape[:-1].numel()
            for tap in self.taps.values():
                tap.output = None
            for output in outputs:
                for name, rows in output.items():
                    self.taps[name].output = rows[start:stop].unflatten(0, x.shape[:-1])
            output = None
            with suppress(_StopReplay):
                output = self.run(self.module, x)
            yield output
            start = stop


@contextmanager
def replay_module(
    module: nn.Module, layers: Sequence[tuple[str, ...]], run: Run, inputs: Sequence[torch.Tensor]
) -> Iterator[Replay]:
    """Replaces the linears of `layers` in the module by taps while the context is open."""
    linears = {name: get_linear(module, name) for layer in layers for name in layer}
    taps = {name: _Tap() for name in linears}
    try:
        for name, tap in taps.items():
            module.set_submodule(name, tap)
        yield Replay(module, layers, run, inputs, taps)
    finally:
        for name, linear in linears.items():
            module.set_submodule(name, linear)


def record_linear_outputs(
    module: nn.Module,
    names: Sequence[str],
    run: Run,
    batches: Sequence[torch.Tensor],
    rows: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Runs the module; returns its outputs, and those of the named linears, float32 [tokens of all batches, out].

    rows: for linears of which only some tokens are kept, the numbers of these tokens, int64 in ascending order.
    """
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def make_hook(name: str) -> Callable[..., None]:
        start, kept = 0, None if rows is None else rows.get(name)

        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            nonlocal start
            part = output.flatten(0, -2)
            stop = start + len(part)
            parts[name].append(part if kept is None else part[kept[(kept >= start) & (kept < stop)] - start])
            start = stop

        return hook

    handles = [get_linear(module, name).register_forward_hook(make_hook(name)) for name in names]
    try:
        outputs = [run(module, x) for x in batches]
    finally:
        for handle in handles:
            handle.remove()
    return outputs, {name: torch.cat(part) for name, part in parts.items()}


def relative_error(outputs: Mapping[str, torch.Tensor], float_outputs: Mapping[str, torch.Tensor]) -> float:
    """Returns the squared error divided by the squared norm of the float outputs, both summed over the linears in `outputs`.

    Values of both mappings: float32 [tokens, out].
    """
    error = sum(squared_sum(rows - float_outputs[name]) for name, rows in outputs.items())
    energy = sum(squared_sum(float_outputs[name]) for name in outputs)
    return error / max(energy, 1e-300)
