"""How much an error at each token matters for the answers: one backward pass through the float model. torch.

A block's error at a token that nothing later looks at costs nothing, such as the last layer's at the question; a few tokens
decide an answer. So errors are weighted by the squared gradient of the answers' logits by the linear's output, token by
token. Of all logits together that takes one backward pass: with random signs s, the gradient of s . logits has as its
expected square the sum over the squared gradients of all of them (Hutchinson). For the KL divergence the signs are turned
by the square root of its second derivative, diag(p) - p p^T. "modality" is the mean over all tokens of a kind, as MBQ
(Li et al. 2024, section 3) weighs vision and language tokens.

Forwards and backwards go block by block, one block's weights in memory at a time; what flows between blocks is kept, so
samples go through in parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from calibrate.batches import Batches, batches_of
from calibrate.blocks import Block, ModelBlocks, linear_of, load_finite
from calibrate.fold import groups_of
from calibrate.job import Calibration
from calibrate.method import Objective
from calibrate.recombine import Prompts, flat
from calibrate.record import labels_of
from calibrate.residents import Resident, residents
from calibrate.samples import Sample
from calibrate.statistics import TokenLabel
from calibrate.walk import FINAL_NORM, HEAD, TABLE, Run, walk_language, walk_vision

FLOOR = 0.1  # of the mean weight, for every token: few calibration tokens have nearly all the weight
PART_VALUES = 2**29  # float32 values kept between blocks at a time

# By linear that a group begins with, or by block for its output: one tensor an input, float32 [n, tokens], mean 1 over all.
Influence = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class _Visit:
    """A block that ran: batches of inputs as the walk made them, and the leaves that its outputs became."""

    block: Block
    run: Run
    batches: Batches
    inputs: list[torch.Tensor]
    leaves: list[torch.Tensor]


def measure_influence(
    job: Calibration,
    prompts: Prompts,
    objective: Objective,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Influence:
    """Nothing for the objective `plain`. Reads the weights twice for every part of the samples.

    Parts that an interrupted run measured are not measured again. progress: is told which share is done.
    """
    if objective == "plain":
        return {}
    found: dict[str, list[torch.Tensor]] = {}
    parts = list(_parts(prompts, job.blocks))
    for number, part in enumerate(parts):

        def measured(number: int = number, part: Prompts = part) -> Influence:
            visits = itertools.count(1)
            return _part_influence(
                job,
                part,
                objective,
                torch.Generator().manual_seed(seed + number),
                lambda: progress((number + next(visits) / (2 * job.blocks.count())) / len(parts)),
            )

        weights_of = measured() if job.work is None else job.work.remembered(f"influence-{number:04}", measured)
        for name, weights in weights_of.items():
            found.setdefault(name, []).extend(weights)
        progress((number + 1) / len(parts))
    if objective == "modality":
        found = {name: _by_kind(weights, _labels(name, job, prompts)) for name, weights in found.items()}
    return {name: _normalised(weights) for name, weights in found.items()}


def runs_of(job: Calibration, prompts: Prompts, objective: Objective) -> int:
    """How many prompts and pictures go through a block, each twice forwards and once backwards."""
    pictures = sum(len(sample.pixel_values) for sample in job.samples)
    runs = (len(job.blocks.vision_layers) + 1) * pictures + len(job.blocks.text_layers) * sum(map(len, prompts))
    return 0 if objective == "plain" else runs


def _parts(prompts: Prompts, blocks: ModelBlocks) -> Iterator[Prompts]:
    """As many samples at a time, with all prompts about their pictures, as memory is meant for."""
    width = blocks.text_layers[0].module.get_parameter("input_layernorm.weight").numel()
    part: list[Sequence[Sample]] = []
    tokens = 0
    for about in prompts:
        more = sum(len(prompt.input_ids) for prompt in about)
        if part and (tokens + more) * width * blocks.count() > PART_VALUES:
            yield part
            part, tokens = [], 0
        part.append(about)
        tokens += more
    yield part


def _part_influence(
    job: Calibration, prompts: Prompts, objective: Objective, generator: torch.Generator, visited: Callable[[], None]
) -> Influence:
    """visited: is called twice for every block."""
    blocks, source, pictured = job.blocks, job.source, [about[0] for about in prompts]
    texts, pictures_of = flat(prompts)
    visits: list[_Visit] = []

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batches = batches_of(inputs)
        merged = batches.merged([x.clone() if x.is_inference() else x for x in inputs])
        with resident(block) as module, torch.no_grad():
            leaves = [run(module, x.detach().to(job.device)).cpu() for x in merged]
        for leaf in leaves:
            leaf.requires_grad_()
        visits.append(_Visit(block, run, batches, merged, leaves))
        visited()
        return batches.split(leaves)

    with torch.enable_grad(), residents(blocks, source, job.device) as resident:
        features = walk_vision(blocks, source, pictured, step)
        hidden = walk_language(blocks, source, texts, [features[number] for number in pictures_of], step)
        _probe(job, texts, hidden, objective, generator)
    found: Influence = {}
    with torch.enable_grad(), residents(blocks, source, job.device, backwards=True) as resident:
        while visits:
            found |= _backward(visits.pop(), resident, job.device)
            visited()
    return found


def _probe(
    job: Calibration,
    texts: Sequence[Sample],
    hidden: Sequence[torch.Tensor],
    objective: Objective,
    generator: torch.Generator,
) -> None:
    """Gradients of the answers' probed logits by the last block's outputs, left in its leaves."""
    gain = load_finite(job.source, FINAL_NORM)
    head = load_finite(job.source, HEAD if HEAD in job.source else TABLE)
    for sample, states in zip(texts, hidden, strict=True):
        first = max(sample.answer_start - 1, 0)
        last = max(first + 1, len(sample.input_ids) - 1)
        logits = nn.functional.rms_norm(states[0, first:last], gain.shape, gain, job.blocks.final_epsilon) @ head.T
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
        if objective == "kl":
            likely = logits.detach().softmax(-1)
            turned = likely.sqrt() * signs
            signs = turned - likely * (likely.sqrt() * signs).sum(-1, keepdim=True)
        torch.autograd.backward(logits, signs, retain_graph=True)  # hidden states of one batch share their leaf


def _backward(visit: _Visit, resident: Resident, device: torch.device) -> Influence:
    """Weights of one block, and its inputs' gradients handed back to whatever made them."""
    prefix, groups = visit.block.prefix, groups_of(visit.block.module)
    weights: dict[str, list[torch.Tensor]] = {prefix: [], **{f"{prefix}.{group.linears[0]}": [] for group in groups}}
    gradients = []
    with resident(visit.block) as module:
        for merged, leaf in zip(visit.inputs, visit.leaves, strict=True):
            given = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            x = merged.detach().to(device).requires_grad_()
            with _kept_outputs(module, [name for group in groups for name in group.linears]) as kept:
                out = visit.run(module, x)
            first, *made = torch.autograd.grad(out, [x, *kept.values()], given.to(device), materialize_grads=True)
            gradients.append(first.cpu())
            sizes = {name: gradient.square().sum(-1).cpu() for name, gradient in zip(kept, made, strict=True)}
            weights[prefix].append(given.square().sum(-1))
            for group in groups:
                weights[f"{prefix}.{group.linears[0]}"].append(torch.stack([sizes[name] for name in group.linears]).sum(0))
            leaf.grad = None
    onwards = [(x, g) for x, g in zip(visit.inputs, gradients, strict=True) if x.requires_grad]
    if onwards:
        torch.autograd.backward([x for x, _ in onwards], [g for _, g in onwards])
    return {name: visit.batches.split(parts) for name, parts in weights.items()}


@contextmanager
def _kept_outputs(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of linears, of the forward pass inside."""
    kept: dict[str, torch.Tensor] = {}
    handles = [
        linear_of(module, name).register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out))
        for name in names
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _labels(name: str, job: Calibration, prompts: Prompts) -> list[torch.Tensor]:
    """TokenLabels of the inputs of a block, or of a linear inside one."""
    blocks = (*job.blocks.vision_layers, job.blocks.projector, *job.blocks.text_layers)
    owner = next(block for block in blocks if f"{name}.".startswith(f"{block.prefix}."))
    return labels_of(owner, job.blocks, prompts)


def _by_kind(weights: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Every token the mean of its kind."""
    kinds = torch.cat([label.expand(w.shape).flatten() for w, label in zip(weights, labels, strict=True)])
    everything = torch.cat([w.flatten() for w in weights])
    means = torch.zeros(len(TokenLabel)).index_add_(0, kinds, everything) / kinds.bincount(minlength=len(TokenLabel)).clamp(
        min=1
    )
    return [means[label.expand(w.shape)] for w, label in zip(weights, labels, strict=True)]


def _normalised(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mean 1, and every token at least FLOOR of that; all 1 where nothing matters."""
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.double().sum()) for w in weights) / max(count, 1)
    if not mean > 0.0:
        return [torch.ones_like(w) for w in weights]
    return [(w / mean + FLOOR) / (1.0 + FLOOR) for w in weights]
