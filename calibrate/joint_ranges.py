"""The ranges of a whole block, chosen together by the error of its output (Q-VLM, section 3.1). torch.

The block is folded and its linears are float; its inputs come from the quantized prefix. First every group of linears has
the ranges that its variant would choose for it alone. Then the ranges of all inputs are searched together, then those of all
weights, each as a part of the full range: the paper's percentiles and finer fractions. Meanwhile weights are rounded to
nearest. What a group has chosen holds when it is quantized in earnest; where its own range was best, its variant chooses
again, on what then reaches it.

Cost: K candidates a group and n groups take K + .. + K^n layer forwards for inputs and again for weights, where that is
affordable; else, in blocks of a decoder or tower, about (K - 1) n (n + 1) / 2 in each of two rounds of coordinate descent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from calibrate.blocks import linear_of
from calibrate.fold import Group, before, linears_of, share_of
from calibrate.gptq import column_scales
from calibrate.group import OWN, Given, Rows, by_bits, clipped_scale, own_input_scale, own_weight_scale
from calibrate.joint import FINE_CLIPS, Clip, Found, Layer, Outputs, search_descent, search_tree
from calibrate.method import Variant
from calibrate.partition import MAX_DEPTH
from calibrate.products import linear_output, product
from calibrate.quantize import activation_scale, fake_quantize, round_to_codes
from calibrate.recall import Outputs as Known
from calibrate.recall import as_batches, is_known, reaching, resumed, without
from calibrate.scheme import LinearScheme
from calibrate.statistics import statistics_of_rows
from calibrate.walk import Run

MOST_COMBINATIONS = 600  # that a tree tries: the projector's two layers, not three
ROUNDS = 2  # of coordinate descent

Reach = Callable[[Group, torch.Tensor], Rows]


@dataclass(frozen=True)
class FoldedBlock:
    """A block whose linears are float. groups: those with planned linears, in the order they compute.

    plan: by name inside the block. inputs: batches float32 [B, tokens, width] of the quantized prefix. error: of what the
    block returns for them.
    """

    module: nn.Module
    groups: Sequence[Group]
    plan: Mapping[str, LinearScheme]
    run: Run
    inputs: Sequence[torch.Tensor]
    error: Callable[[list[torch.Tensor]], float]

    def reaching(self, outputs: Outputs) -> torch.Tensor:
        """What the group behind those that made `outputs` is given, float32 [tokens, in]. An output: by linear, as rows."""
        return reaching(self.module, self.groups[len(outputs)], self.run, self.inputs, self._known(outputs))

    def finish(self, outputs: Outputs) -> list[torch.Tensor]:
        """What the block returns, from the outputs of all its groups."""
        return resumed(self.module, self.run, self.inputs, self._known(outputs))

    def between(self, outputs: Outputs) -> float:
        """Block forwards to the next group, or to the end, of linears whose outputs are not known: those not planned."""
        known, groups = self._known(outputs), self.groups[len(outputs) :]
        names = before(self.module, groups[0]) if groups else linears_of(self.module)
        return self.forwards_of([name for name in names if not is_known(name, known)])

    def forwards_of(self, names: Sequence[str]) -> float:
        """Block forwards that these linears are, for all inputs."""
        return share_of(self.module, names) * sum(len(x) for x in self.inputs)

    def _known(self, outputs: Outputs) -> Known:
        known: Known = {}
        for group, made in zip(self.groups, outputs, strict=False):
            known = without(known, group.ends)
            known |= {group.ends or name: as_batches(rows, self.inputs) for name, rows in made.items()}
        return known


@dataclass(frozen=True)
class JointRanges:
    """What was chosen. given: by the first linear of each group. forwards: of the block.

    first_error, error: of the block's output rounded to nearest, with the ranges that layers would choose, and with these.
    """

    given: Mapping[str, Given]
    first_error: float
    error: float
    forwards: float


@dataclass(frozen=True)
class RangedGroup:
    """Linears that share an input, and the scales of their own choice: of the input by its bits, of weights by linear.

    plan: of those that are planned. amaxes: the ranges of the input that are tried instead, none where it stays float.
    """

    linears: Mapping[str, nn.Linear]
    plan: Mapping[str, LinearScheme]
    input_scales: Mapping[int, float]
    weight_scales: Mapping[str, torch.Tensor]
    amaxes: Sequence[float]
    clips: Sequence[Clip]

    def output(self, rows: torch.Tensor, given: Given) -> dict[str, torch.Tensor]:
        """What the linears make of float32 [tokens, in], rounded to nearest: name -> float32 [tokens, out]."""
        read: dict[int | None, torch.Tensor] = {None: rows}
        outputs = {}
        for name, linear in self.linears.items():
            weight, bits = linear.weight, None
            if name in self.plan:
                weight, bits = self._rounded(name, given.clip), self.plan[name].activation_bits
            if bits is not None and bits not in read:
                scale = self.input_scales[bits] if given.amax is None else activation_scale(given.amax, bits)
                read[bits] = fake_quantize(rows, scale, bits)
            outputs[name] = linear_output(read[bits], weight, linear.bias)
        return outputs

    def _rounded(self, name: str, clip: Clip | None) -> torch.Tensor:
        weight, scheme = self.linears[name].weight, self.plan[name]
        scale = self.weight_scales[name] if clip is None else clipped_scale(weight, clip, scheme)
        return round_to_codes(weight, scale, scheme).float() * column_scales(scale, weight.shape[1])


@dataclass
class _Counter:
    """A block whose groups compute, and how many block forwards that has been."""

    block: FoldedBlock
    forwards: float = 0.0

    def layer(self, ranged: RangedGroup, candidates: Sequence[Given]) -> Layer:
        """The group as the search knows it."""

        def apply(rows: torch.Tensor, given: Given) -> dict[str, torch.Tensor]:
            self.forwards += self.block.forwards_of(list(ranged.linears))
            return ranged.output(rows, given)

        return Layer(self.prepare, apply, candidates)

    def prepare(self, outputs: Outputs) -> torch.Tensor:
        """The next group's input."""
        self.forwards += self.block.between(outputs)
        return self.block.reaching(outputs)

    def finish(self, outputs: Outputs, _: Given) -> list[torch.Tensor]:
        """The block's output, as if of one more layer."""
        self.forwards += self.block.between(outputs)
        return self.block.finish(outputs)


def search_ranges(block: FoldedBlock, reach: Reach, variant: Variant, metrics: Mapping[str, torch.Tensor]) -> JointRanges:
    """The best ranges of all groups together; never worse than those that `variant` chooses for one after another.

    reach: a group's input from the quantized prefix -> beside the float model's; raises UserError where it is not finite.
    metrics: as of `quantize_group`.
    """
    counter = _Counter(block)
    ranged: list[RangedGroup] = []
    outputs: Outputs = ()
    for group in block.groups:
        seen = counter.prepare(outputs)
        ranged.append(_own_ranges(block, group, variant, reach(group, seen), metrics))
        outputs = (*outputs, counter.layer(ranged[-1], ()).apply(seen, OWN))
    given, found = [OWN] * len(ranged), list[Found]()
    for kind in ("input", "weight"):
        candidates = [_candidates(own, now, kind) for own, now in zip(ranged, given, strict=True)]
        if all(len(options) == 1 for options in candidates):
            continue
        chain = [counter.layer(own, options) for own, options in zip(ranged, candidates, strict=True)]
        chain.append(Layer(lambda outputs: outputs, counter.finish, (OWN,)))
        found.append(_search(chain, block.error))
        given = [options[k] for options, k in zip(candidates, found[-1].choice, strict=False)]
    names = [group.linears[0] for group in block.groups]
    chosen = dict(zip(names, given, strict=True))
    return JointRanges(chosen, found[0].first_error, found[-1].error, counter.forwards)


def _own_ranges(
    block: FoldedBlock, group: Group, variant: Variant, rows: Rows, metrics: Mapping[str, torch.Tensor]
) -> RangedGroup:
    """The ranges that the variant chooses, and what is tried instead."""
    linears = {name: linear_of(block.module, name) for name in group.linears}
    plan = {name: block.plan[name] for name in group.linears if name in block.plan}
    input_scales, weight_scales = dict[int, float](), dict[str, torch.Tensor]()
    for bits, part in by_bits({name: linears[name].weight for name in plan}, plan).items():
        seen = rows.seen
        if bits is not None:
            input_scales[bits] = own_input_scale(variant, part, rows, metrics, bits)
            seen = fake_quantize(seen, input_scales[bits], bits)
        gram = product(rows.counted(seen).T, seen) if variant.weight_ranges == "output" else seen[:0]
        weight_scales |= {name: own_weight_scale(variant, weight, gram, plan[name]) for name, weight in part.items()}
    amaxes: list[float] = []
    if input_scales:
        histogram = statistics_of_rows(group.linears[0], rows.wanted).histogram()
        amaxes = [clip.activation_amax(histogram) for clip in FINE_CLIPS]
    return RangedGroup(linears, plan, input_scales, weight_scales, amaxes, weight_clips(linears, plan, variant))


def weight_clips(linears: Mapping[str, nn.Linear], plan: Mapping[str, LinearScheme], variant: Variant) -> list[Clip]:
    """Those of FINE_CLIPS that differ: of 64 weights, 0.995 and 0.99 are all. Nor is a variant's own range tried again."""
    widths = {plan[name].group_size or linears[name].in_features for name in plan}
    clips = {(tuple(clip.rank(width) for width in widths), clip.fraction): clip for clip in reversed(FINE_CLIPS)}
    return [clip for clip in reversed(clips.values()) if clip != Clip() or variant.weight_ranges != "covering"]


def _candidates(ranged: RangedGroup, now: Given, kind: str) -> list[Given]:
    if kind == "input":
        return [now, *(replace(now, amax=amax) for amax in ranged.amaxes)]
    return [now, *(replace(now, clip=clip) for clip in ranged.clips)]


def _search(chain: Sequence[Layer], error: Callable[[list[torch.Tensor]], float]) -> Found:
    if _is_tree([len(layer.candidates) for layer in chain[:-1]]):
        return search_tree(chain, error)
    return search_descent(chain, error, max_rounds=ROUNDS)


def _is_tree(counts: Sequence[int]) -> bool:
    return len(counts) <= MAX_DEPTH and sum(_products(counts)) <= MOST_COMBINATIONS


def _products(counts: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(counts, lambda a, b: a * b))


def times_applied(
    module: nn.Module, groups: Sequence[Group], plan: Mapping[str, LinearScheme], variant: Variant
) -> list[int]:
    """How often each group computes at most, counted from shapes: descent may settle before its last round."""
    inputs, weights = list[int](), list[int]()
    for group in groups:
        schemes = {name: plan[name] for name in group.linears if name in plan}
        is_rounded = any(scheme.activation_bits is not None for scheme in schemes.values())
        inputs.append(1 + len(FINE_CLIPS) * is_rounded)
        weights.append(1 + len(weight_clips({name: linear_of(module, name) for name in schemes}, schemes, variant)))
    times = [1] * len(groups)
    for counts in (inputs, weights):
        if math.prod(counts) > 1:
            others = itertools.accumulate(count - 1 for count in counts)
            searched = _products(counts) if _is_tree(counts) else [1 + ROUNDS * other for other in others]
            times = [a + b for a, b in zip(times, searched, strict=True)]
    return times
