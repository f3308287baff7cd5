"""How much an error matters for the answers, by token and by direction: one backward pass through the float model. torch.

A block's error at a token that nothing later looks at costs nothing, such as the last layer's at the question; a few tokens
decide an answer. So errors are weighted by the squared gradient of the answers' logits by the linear's output, token by
token. Of all logits together that takes one backward pass: with random signs s, the gradient of s . logits has as its
expected square the sum over the squared gradients of all of them (Hutchinson). For the KL divergence the signs are turned
by the square root of its second derivative, diag(p) - p p^T. "modality" is the mean over all tokens of a kind, as MBQ
(Li et al. 2024, section 3) weighs vision and language tokens. "kl+logits" is the sum of both, the logits' weighted so that
they have as much of it: a divergence that few tokens decide says little about most directions.

Of the same gradients, for every linear: in which directions its output matters (`kronecker_rounding.py`). What is gathered
on the way
back through a block: `block_backward.py`.

Forwards and backwards go block by block, one block's weights in memory at a time; what flows between blocks is kept
(`tape.py`), so many samples go through in parts. Of a small model everything is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qvlm_export.calibrate.augmentation.mixup import compute_image_features
from qvlm_export.calibrate.augmentation.prompts import (
    MixupSample,
    Prompts,
    flatten_prompts,
    image_features_of_prompts,
    label_block_inputs,
)
from qvlm_export.calibrate.blockwise.batching import batch_by_length, split_by_size
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks
from qvlm_export.calibrate.blockwise.forward import Run, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, check_outputs
from qvlm_export.calibrate.blockwise.offload import open_block_loader
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, NamedTensors
from qvlm_export.calibrate.blockwise.shared_inputs import list_linears
from qvlm_export.calibrate.blockwise.token_kinds import TokenLabel
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.numerics.matmul import deterministic_small_matmul
from qvlm_export.calibrate.numerics.memory import trim_heap
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.sensitivity.block_backward import (
    MIN_TOKEN_WEIGHT,
    BackwardRequest,
    Sensitivity,
    TokenWeights,
    backward_block,
)
from qvlm_export.calibrate.sensitivity.tape import (
    RecordedForward,
    Tape,
    TapeEntry,
    delete_tape,
    fits_in_memory,
    record_forward,
)

MAX_TAPE_VALUES = 2**31  # float32 values kept between blocks at a time
_SEEDS = 2**20  # of a part, one for each of its blocks


@dataclass(frozen=True)
class _Pass:
    """One part's way through the model. first: number of its first sample. metrics: of all parts so far, by linear, and by
    block where it learns; None where nobody asks. others: features that prompts are mixed with. visited: is called twice for
    every block. keeps: whether what is computed on the way there is kept for the way back."""

    number: int
    first: int
    method: SearchConfig
    visited: Callable[[], None]
    output_hessians: dict[str, torch.Tensor] | None
    others: Mapping[int, torch.Tensor]
    keeps: bool

    def drawn(self, block: int | None = None) -> torch.Generator:
        """What signs are drawn from: for the probe, or in a block, so that a resumed run draws the same."""
        seed = self.method.seed + self.number
        return torch.Generator().manual_seed(seed if block is None else (seed + 1) * _SEEDS + block)

    def asked(self, block: int) -> BackwardRequest:
        """Of a block on the way back, the last having the highest number."""
        return BackwardRequest(self.output_hessians, self.method.learn_steps > 0, self.method.leverage, self.drawn(block))


def measure_sensitivity(
    job: CalibrationJob, prompts: Prompts, method: SearchConfig, progress: Callable[[float], None] = lambda _: None
) -> Sensitivity:
    """Nothing for the objective `plain`. Reads the weights twice for every part of the samples, once where
    all that is computed is kept (`trail.is_kept`).

    What an interrupted run measured is not measured again. progress: is told which share is done.
    """
    if method.token_weighting == "plain":
        return Sensitivity()
    parts = list(_parts(prompts, job.blocks))
    first, found = _recalled(job.work, len(parts))
    if first:
        delete_tape(job.work, _part_name(first - 1))
        progress(first / len(parts))
    metrics = found.outputs if method.needs_output_hessians() else None
    others = _other_features(job, prompts) if first < len(parts) else {}
    keeps = _keeps(job, prompts)
    for number in range(first, len(parts)):
        visits = itertools.count(1)

        def visited(number: int = number, visits: Iterator[int] = visits) -> None:
            progress((number + next(visits) / (2 * job.blocks.num_blocks())) / len(parts))

        trim_heap()
        before = sum(map(len, parts[:number]))
        measured = _part_influence(job, parts[number], _Pass(number, before, method, visited, metrics, others, keeps))
        for name, weights in measured.items():
            found.tokens.setdefault(name, []).extend(weights)
        _keep(job.work, number, found)
        progress((number + 1) / len(parts))
    tokens = found.tokens
    if method.token_weighting == "modality":
        tokens = {name: _by_kind(weights, _labels(name, job, prompts)) for name, weights in tokens.items()}
    return Sensitivity({name: _normalised(weights) for name, weights in tokens.items()}, found.outputs)


def _recalled(work: CalibrationWork | None, parts: int) -> tuple[int, Sensitivity]:
    """The first part that was not measured yet, and what those before it gave together."""
    for number in reversed(range(parts)) if work is not None else ():
        if work is not None and (kept := work.load(_part_name(number))) is not None:
            return number + 1, _unnamed(kept)
    return 0, Sensitivity()


def _keep(work: CalibrationWork | None, number: int, found: Sensitivity) -> None:
    """What all parts up to this one gave together, instead of what those before it did: metrics are large."""
    if work is None:
        return
    work.save(_part_name(number), _named(found))
    delete_tape(work, _part_name(number))
    if number:
        work.delete(_part_name(number - 1))


def _named(found: Sensitivity) -> NamedTensors:
    """As the work folder keeps it."""
    tokens = {f"tokens/{name}": weights for name, weights in found.tokens.items()}
    return tokens | {f"outputs/{name}": [metric] for name, metric in found.outputs.items()}


def _unnamed(kept: NamedTensors) -> Sensitivity:
    by_kind: dict[str, TokenWeights] = {"tokens": {}, "outputs": {}}
    for key, tensors in kept.items():
        kind, _, name = key.partition("/")
        by_kind[kind][name] = tensors
    return Sensitivity(by_kind["tokens"], {name: found for name, (found,) in by_kind["outputs"].items()})


def _part_name(number: int) -> str:
    return f"influence-{number:04}"


def count_passes(job: CalibrationJob, prompts: Prompts, method: SearchConfig) -> tuple[int, int]:
    """How many prompts and pictures go through a block, forwards and backwards."""
    if method.token_weighting == "plain":
        return 0, 0
    pictures, others = (
        (len(job.blocks.vision_layers) + 1) * sum(len(sample.pixel_values) for sample in samples)
        for samples in (job.samples, [job.samples[n] for n in _others(prompts)])
    )
    once = pictures + len(job.blocks.text_layers) * sum(map(len, prompts))
    back = method.num_backward_passes()
    return (1 if _keeps(job, prompts) else 1 + back) * once + others, back * once


def _keeps(job: CalibrationJob, prompts: Prompts) -> bool:
    pictures = sum(len(sample.pixel_values) for sample in job.samples)
    return fits_in_memory(job.blocks, pictures, sum(len(text.input_ids) for text in flatten_prompts(prompts)[0]))


def _parts(prompts: Prompts, blocks: ModelBlocks) -> Iterator[Prompts]:
    """As many samples at a time, with all prompts about their pictures, as memory is meant for."""
    values = blocks.text_width() * blocks.num_blocks()
    return split_by_size(
        prompts, [values * sum(len(prompt.input_ids) for prompt in about) for about in prompts], MAX_TAPE_VALUES
    )


def _part_influence(job: CalibrationJob, prompts: Prompts, own: _Pass) -> TokenWeights:
    blocks, source, pictured = job.blocks, job.source, [about[0] for about in prompts]
    texts, pictures_of = flatten_prompts(prompts)
    seeing = replace(job, samples=pictured)
    trail = Tape(blocks, job.work, _part_name(own.number))

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batches, given = batch_by_length(inputs), [x.clone() if x.is_inference() else x for x in inputs]
        leaves = known = trail.known()
        kept: list[RecordedForward] = []
        if leaves is None:
            with resident(block) as module, torch.set_grad_enabled(own.keeps):
                if own.keeps:
                    kept = [
                        record_forward(module, run, x.to(job.device), list_linears(module))
                        for x in batches.iter_merged(given)
                    ]
                    leaves = [one.out.detach().cpu().clone() for one in kept]
                else:
                    leaves = [run(module, x.to(job.device)).cpu() for x in batches.iter_merged(given)]
            numbers = pictures_of if block in blocks.text_layers else seeing.sample_numbers(block)
            check_outputs(block, batches.split(leaves), [own.first + number for number in numbers])
        for leaf in leaves:
            leaf.requires_grad_()
        trail.add(TapeEntry(block, run, batches, given, leaves, kept), known=known is not None)
        own.visited()
        return batches.split(leaves)

    with torch.enable_grad(), open_block_loader(blocks, source, job.device) as resident:
        features = run_vision_blocks(blocks, source, pictured, step)
        seen = image_features_of_prompts(texts, pictures_of, features, own.others)
        hidden = run_decoder_blocks(blocks, source, texts, seen, step)
        if not trail.turned():
            _probe(job, texts, hidden, own)
    found: TokenWeights = {}
    with torch.enable_grad(), open_block_loader(blocks, source, job.device, backwards=True) as resident:
        while trail.visits:
            if (kept := trail.found()) is None:
                back = backward_block(trail.last(), resident, job.device, own.asked(len(trail.visits)))
                trail.leave(_named(back))
            else:
                back = _unnamed(kept)
                trail.leave()
            found |= back.tokens
            if own.output_hessians is not None:
                own.output_hessians.update(back.outputs)
            own.visited()
    return found


def _others(prompts: Prompts) -> list[int]:
    """Numbers of the samples whose pictures others are mixed with."""
    return sorted({text.other for about in prompts for text in about if isinstance(text, MixupSample)})


def _other_features(job: CalibrationJob, prompts: Prompts) -> dict[int, torch.Tensor]:
    """By number of the sample."""
    numbers = _others(prompts)
    return dict(zip(numbers, compute_image_features(job, [job.samples[n] for n in numbers]), strict=True)) if numbers else {}


def _probe(job: CalibrationJob, texts: Sequence[Sample], hidden: Sequence[torch.Tensor], own: _Pass) -> None:
    """Gradients of the answers' probed logits by the last block's outputs, left in its leaves."""
    head = load_head(job.source, job.blocks.final_epsilon)

    def logits_of(sample: Sample, states: torch.Tensor) -> torch.Tensor:
        first = max(sample.answer_start - 1, 0)
        return head.logits(states[0, first : max(first + 1, len(sample.input_ids) - 1)])

    objective, generator = own.method.token_weighting, own.drawn()
    share = 0.0 if objective == "kl" else 1.0
    if objective == "kl+logits":
        with torch.no_grad():
            curves = [1 - logits_of(*pair).softmax(-1).square().sum(-1) for pair in zip(texts, hidden, strict=True)]
        share = float(torch.cat(curves).double().mean()) / len(
            head.weight
        )  # the mean trace of diag(p) - p p^T, of the identity's

    def signs(like: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1.0

    for sample, states in zip(texts, hidden, strict=True):
        logits = logits_of(sample, states)
        probe = share**0.5 * signs(logits) if share else torch.zeros_like(logits)
        if objective in {"kl", "kl+logits"}:
            likely = logits.detach().softmax(-1)
            turned = likely.sqrt() * signs(logits)
            probe = probe + turned - likely * turned.sum(-1, keepdim=True)
        with deterministic_small_matmul(logits):
            torch.autograd.backward(logits, probe, retain_graph=True)  # hidden states of one batch share their leaf


def _labels(name: str, job: CalibrationJob, prompts: Prompts) -> list[torch.Tensor]:
    """TokenLabels of the inputs of a block, or of a linear inside one."""
    blocks = job.blocks.all()
    owner = next(block for block in blocks if f"{name}.".startswith(f"{block.prefix}."))
    return label_block_inputs(owner, job.blocks, prompts)


def _by_kind(weights: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Every token the mean of its kind."""
    if not weights:  # of tower and projector, where no sample has pictures
        return []
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
    return [(w / mean + MIN_TOKEN_WEIGHT) / (1.0 + MIN_TOKEN_WEIGHT) for w in weights]
