"""The look-ahead regret of consecutive layers, measured on the float model: the other dependency beside entropy. torch.

What the range that is best for a layer's own output costs at the output of the next one (`entropy.lookahead_regret`). It
told on the tiny model which pairs gain by a joint search, which entropy did not (docs/entropy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from calibrate.batches import batches_of
from calibrate.blocks import Block, resident
from calibrate.job import Calibration
from calibrate.joint import Layer, Outputs, linear_outputs, relative_error, replayed
from calibrate.layers import Clips, LayerInput, PlannedLayer, clips_to_try, planned_layer
from calibrate.partition import regret_dependencies
from calibrate.walk import Run, walk_language, walk_vision

Error = Callable[[Any], float]  # of a layer's output


@dataclass(frozen=True)
class Regrets:
    """pairs: D(k, k+1) for all k, 0 where layer k+1 is in another module. forwards: block forwards that they took."""

    pairs: list[float]
    forwards: float


def measure_regrets(job: Calibration, inputs: Sequence[LayerInput]) -> Regrets:
    """One float pass: the regret of every two consecutive layers of one module, at 2 K layer forwards a pair.

    inputs: all planned layers, measured on the same samples. The ranges tried are those of a layer's input, or of its
    weights where that stays float; what is not tried has its whole range.
    """
    regrets: list[float] = []  # of each layer and the next one; the last of a module has 0
    forwards = 0.0

    def step(block: Block, given: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        nonlocal forwards
        mine, plan, batches = [x for x in inputs if x.block == block.prefix], job.plan_of(block), batches_of(given)
        with resident(block, job.source) as module, torch.inference_mode():
            layers = [planned_layer(module, layer, plan) for layer in mine]
            outputs, found = _of_module(module, layers, run, batches.merged(given))
        regrets.extend([*found.pairs, 0.0][: len(layers)])
        forwards += len(given) * (1 + found.forwards / max(1, len(layers)))
        return batches.split(outputs)

    features = walk_vision(job.blocks, job.source, job.samples, step)
    walk_language(job.blocks, job.source, job.samples, features, step)
    return Regrets(regrets[:-1], forwards)


def _of_module(
    module: nn.Module, layers: Sequence[PlannedLayer], run: Run, batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], Regrets]:
    """The float outputs, and the regrets of the module's layers, their `forwards` in layer forwards."""
    names = [tuple(layer.linears) for layer in layers]
    outputs, made = linear_outputs(module, [n for linears in names for n in linears], run, batches)
    if len(layers) < 2:
        return outputs, Regrets([], 0)
    exact = [{name: made[name] for name in linears} for linears in names]
    with replayed(module, names, run, batches) as replay:
        chain = [Layer(replay.given, layer.output, _candidates(layer)) for layer in layers]
        own, ahead = look_ahead(chain, [partial(relative_error, wanted=wanted) for wanted in exact], tuple(exact))
    return outputs, Regrets(regret_dependencies(own, ahead), sum(map(len, (*own, *ahead))))


def _candidates(layer: PlannedLayer) -> list[Clips]:
    ranges = clips_to_try(layer, Clips(), "activation")
    return ranges if len(ranges) > 1 else clips_to_try(layer, Clips(), "weight")


def look_ahead(
    layers: Sequence[Layer], errors: Sequence[Error], exact: Outputs
) -> tuple[list[list[float]], list[list[float]]]:
    """For each candidate of each layer, the error of its own output, and of the next layer's: `regret_dependencies`'s.

    errors: of each layer's output. exact: the float model's outputs of all layers, which everything before the pair has. The
    last layer has nothing ahead of it. Layer forwards: as many as there are errors.
    """
    last = layers[-1]
    given = last.prepare(exact[:-1])
    own, ahead = [[errors[-1](last.apply(given, candidate)) for candidate in last.candidates]], list[list[float]]()
    for k in reversed(range(len(layers) - 1)):
        kept = min(range(len(own[0])), key=own[0].__getitem__)
        mine, next_one = pair_errors(layers[k : k + 2], kept, errors[k : k + 2], exact[:k])
        own, ahead = [mine, *own], [next_one, *ahead]
    return own, ahead


def pair_errors(
    pair: Sequence[Layer], kept: int, errors: Sequence[Error], before: Outputs = ()
) -> tuple[list[float], list[float]]:
    """Errors of both layers' outputs for each candidate of the first one, the second with its candidate `kept`.

    before: outputs of the layers before the pair. 2 K layer forwards, in the memory of one output of each layer.
    """
    first, second = pair
    given, own, ahead = first.prepare(before), list[float](), list[float]()
    for candidate in first.candidates:
        output = first.apply(given, candidate)
        own.append(errors[0](output))
        ahead.append(errors[1](second.apply(second.prepare((*before, output)), second.candidates[kept])))
    return own, ahead
