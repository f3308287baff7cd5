"""Joint search of the clipping ranges of a block of consecutive layers (Q-VLM, section 3.1). torch.

The search knows a layer as two functions and a list of candidates, so it is the same for a decoder's linears and for a
toy chain. `prepare` turns the outputs of all layers before into this layer's input, `apply` computes its output with one
candidate; `apply` is what costs, and is what is counted as a layer forward. `Replay` is the `prepare` of a model's block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.observers import Histogram

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)  # the paper's

Outputs = tuple[Any, ...]  # of the layers from the first of the chain on


@dataclass(frozen=True)
class Clip:
    """A range: a fraction of the magnitude that the share `percentile` of a float tensor's values do not exceed."""

    percentile: float = 1.0
    fraction: float = 1.0

    def rank(self, count: int) -> int:
        """The place of that magnitude among `count` values, the smallest having 1."""
        return max(1, math.ceil(self.percentile * count))

    def activation_amax(self, histogram: Histogram) -> float:
        """The range of a layer's input."""
        return histogram.percentile(self.percentile) * self.fraction

    def weight_amax(self, weight: torch.Tensor, scheme: LinearScheme) -> torch.Tensor:
        """The range of every group or output channel, among whose own values the percentile is taken.

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
    """A layer of a chain, as the search sees it.

    prepare: outputs of all layers before it -> its input. apply: (input, candidate) -> its output, not changed afterwards.
    """

    prepare: Callable[[Outputs], Any]
    apply: Callable[[Any, Any], Any]
    candidates: Sequence[Any]


@dataclass(frozen=True)
class SearchResult:
    """The best of a search.

    choice: index of each layer's candidate. outputs: of the layers before the block and of the block's with that choice.
    error: of the block's output. first_error: with the first candidate of every layer. layer_forwards: calls of `apply`.
    """

    choice: tuple[int, ...]
    outputs: Outputs
    error: float
    first_error: float
    layer_forwards: int


def search_tree(layers: Sequence[SearchLayer], error: Callable[[Any], float], before: Outputs = ()) -> SearchResult:
    """Tries all combinations; what layers compute for the same candidates before them is computed once.

    layers: of the block, in order. error: the block's output, that of its last layer -> what is to be least. before: outputs
    of the layers before the block, already quantized. K candidates cost K + K^2 + .. + K^depth layer forwards, in the
    memory of one output for each layer. The first of equally good combinations wins.
    """
    best: list[SearchResult] = []
    forwards = 0

    def descend(outputs: Outputs, choice: tuple[int, ...]) -> None:
        nonlocal forwards
        layer = layers[len(choice)]
        given = layer.prepare(outputs)
        for index, candidate in enumerate(layer.candidates):
            output = layer.apply(given, candidate)
            forwards += 1
            chosen = (*choice, index)
            if len(chosen) < len(layers):
                descend((*outputs, output), chosen)
                continue
            cost = error(output)
            if not best or cost < best[0].error:
                first = best[0].first_error if best else cost
                best[:] = [SearchResult(chosen, (*outputs, output), cost, first, 0)]

    descend(before, ())
    return SearchResult(best[0].choice, best[0].outputs, best[0].error, best[0].first_error, forwards)


class _Tap(nn.Module):
    """Stands where a linear was: keeps what it is given, returns what it is told, zeros until then."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self._out_features = out_features
        self.given = torch.empty(0)
        self.answer: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = x
        return x.new_zeros(*x.shape[:-1], self._out_features) if self.answer is None else self.answer


@dataclass(frozen=True)
class Replay:
    """A block between its linears: norms, attention and activation functions, with the linears' outputs given.

    A layer is the names of the linears that share an input. Its outputs are a mapping from these names to float32
    [tokens, out], the tokens of all `inputs` one after another. A replay computes none of these linears, so beside a layer
    forward it costs little.
    """

    module: nn.Module
    layers: Sequence[tuple[str, ...]]  # in the order they are computed
    run: Run
    inputs: Sequence[torch.Tensor]
    taps: Mapping[str, _Tap]

    def given(self, outputs: Outputs) -> torch.Tensor:
        """What the layer behind those that made `outputs` is given: float32 [tokens, in]."""
        tap = self.taps[self.layers[len(outputs)][0]]
        return torch.cat([tap.given.flatten(0, -2) for _ in self._runs(outputs)])

    def finish(self, outputs: Outputs) -> list[torch.Tensor]:
        """What the block returns for every input, from the outputs of all its layers."""
        return list(self._runs(outputs))

    def _runs(self, outputs: Outputs) -> Iterator[torch.Tensor]:
        start = 0
        for x in self.inputs:
            stop = start + x.shape[:-1].numel()
            for tap in self.taps.values():
                tap.answer = None
            for output in outputs:
                for name, rows in output.items():
                    self.taps[name].answer = rows[start:stop].unflatten(0, x.shape[:-1])
            yield self.run(self.module, x)
            start = stop


@contextmanager
def replay_module(
    module: nn.Module, layers: Sequence[tuple[str, ...]], run: Run, inputs: Sequence[torch.Tensor]
) -> Iterator[Replay]:
    """Takes the linears of `layers` out of the module while the context is open, and puts them back."""
    linears = {name: get_linear(module, name) for layer in layers for name in layer}
    taps = {name: _Tap(linear.out_features) for name, linear in linears.items()}
    try:
        for name, tap in taps.items():
            module.set_submodule(name, tap)
        yield Replay(module, layers, run, inputs, taps)
    finally:
        for name, linear in linears.items():
            module.set_submodule(name, linear)


def record_linear_outputs(
    module: nn.Module, names: Sequence[str], run: Run, batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Runs the module; returns its outputs, and by name those of its linears, float32 [tokens of all batches, out]."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keeper(name: str) -> Callable[..., None]:
        return lambda _, __, output: rows[name].append(output.flatten(0, -2))

    handles = [get_linear(module, name).register_forward_hook(keeper(name)) for name in names]
    try:
        outputs = [run(module, x) for x in batches]
    finally:
        for handle in handles:
            handle.remove()
    return outputs, {name: torch.cat(parts) for name, parts in rows.items()}


def relative_error(outputs: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """Squared error over the energy of what is wanted, both over all linears. Values: float32 [tokens, out]."""
    error = sum(float((rows - wanted[name]).square_().sum(dtype=torch.float64)) for name, rows in outputs.items())
    energy = sum(float(wanted[name].square().sum(dtype=torch.float64)) for name in outputs)
    return error / max(energy, 1e-300)
