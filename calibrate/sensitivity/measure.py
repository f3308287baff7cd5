"""Token sensitivity and output Hessians by one backward pass through the float model (diagonal Fisher, Hutchinson probes).

In go the samples and all prompts about them; out come a weight for every token at every linear (`Sensitivity.tokens`) and,
where rounding needs it, the output Hessian of every linear (`Sensitivity.outputs`, see `kronecker_rounding.py`).

An error at a token that nothing later attends to costs nothing, such as the last layer's at the question, and a few tokens
decide an answer. So errors are weighted token by token with the squared gradient of the logits of the probed tokens, which
are those of the answers or of all text, by the linear's output. One backward pass does for all logits together: with random
signs s, the expected square of the gradient of s . logits is the sum of the squared gradients of all logits (Hutchinson).
For "kl", and for the output Hessians where tokens are weighted otherwise ("output"), the signs are multiplied by a square
root of the divergence's second derivative, diag(p) - p p^T. "kl+logits" is the sum of both, the logits' part scaled to the
trace of the divergence's, as a divergence that few tokens decide says little about most directions. "modality" is the mean
over all tokens of a kind, as MBQ (Li et al. 2024, section 3) weighs vision and language tokens.

Both passes go block by block, with one block's weights in memory at a time (`block_backward.py`). Block outputs are kept on
a tape (`tape.py`), so many samples go through in parts. For a small model the autograd graphs of all blocks are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qvlm_export.calibrate.augmentation.prompts import (
    Prompts,
    flatten_prompts,
    label_block_inputs,
)
from qvlm_export.calibrate.blockwise.batching import batch_by_length, split_by_size
from qvlm_export.calibrate.blockwise.block_loader import open_block_loader
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks
from qvlm_export.calibrate.blockwise.forward import Run, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, check_outputs
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, NamedTensors
from qvlm_export.calibrate.blockwise.shared_inputs import list_linears
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.numerics.matmul import deterministic_small_matmul
from qvlm_export.calibrate.numerics.memory import trim_heap
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.tokens import TokenLabel
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
_SEEDS_PER_PART = 2**20  # more than a model has blocks, each of which takes one


@dataclass(frozen=True)
class _Part:
    """How one part of the samples goes through the model.

    number: of the part. first_sample: number of its first sample. report_block: called twice for every block.
    output_hessians: sums over all parts so far, by linear; None where none are needed. record_graphs: whether the forward
    pass keeps its autograd graphs for the backward pass.
    """

    number: int
    first_sample: int
    config: SearchConfig
    report_block: Callable[[], None]
    output_hessians: dict[str, torch.Tensor] | None
    record_graphs: bool

    def make_generator(self, block: int | None = None) -> torch.Generator:
        """The source of random signs for the probe or for a block: one each, so that a resumed run draws the same."""
        seed = self.config.seed + self.number
        return torch.Generator().manual_seed(seed if block is None else (seed + 1) * _SEEDS_PER_PART + block)

    def make_request(self, block: int) -> BackwardRequest:
        """The request for the backward pass of a block. block: how many blocks up to this one are on the tape."""
        return BackwardRequest(
            self.output_hessians,
            leverage=self.config.leverage,
            temper=self.config.temper_gradients,
            generator=self.make_generator(block),
        )


def measure_sensitivity(
    job: CalibrationJob, prompts: Prompts, config: SearchConfig, progress: Callable[[float], None] = lambda _: None
) -> Sensitivity:
    """Token weights of mean 1 and, where `config` needs them, output Hessians; empty for the token weighting "plain".

    Reads the weights twice for every part of the samples, or once where all autograd graphs are kept (`fits_in_memory` in
    `tape.py`). With a work folder, a run that was interrupted continues where it stopped. progress: called with the share
    that is done, 0 to 1. Raises UserError naming the tensor, or the block and the sample, with NaN or infinite values.
    """
    if not config.needs_gradients():
        return Sensitivity()
    parts = list(_split_into_parts(prompts, job.blocks))
    first, total = _load_total(job.work, len(parts))
    if first:
        delete_tape(job.work, _part_name(first - 1))
        progress(first / len(parts))
    hessians = total.output_hessians if config.needs_output_hessians() else None
    record_graphs = _graphs_fit_in_memory(job, prompts)
    for number in range(first, len(parts)):
        counter = itertools.count(1)

        def report_block(number: int = number, counter: Iterator[int] = counter) -> None:
            progress((number + next(counter) / (2 * job.blocks.num_blocks())) / len(parts))

        trim_heap()
        first_sample = sum(map(len, parts[:number]))
        part = _Part(number, first_sample, config, report_block, hessians, record_graphs)
        for name, weights in _measure_part(job, parts[number], part).items():
            total.token_weights.setdefault(name, []).extend(weights)
        _save_total(job.work, number, total)
        progress((number + 1) / len(parts))
    tokens = total.token_weights
    if config.token_weighting == "modality":
        tokens = {name: _average_by_label(weights, _label_tokens(name, job, prompts)) for name, weights in tokens.items()}
    mean_squares = {name: _mean(weights) for name, weights in total.token_weights.items()}
    return Sensitivity({name: _normalize(weights) for name, weights in tokens.items()}, total.output_hessians, mean_squares)


def _load_total(work: CalibrationWork | None, parts: int) -> tuple[int, Sensitivity]:
    """The number of the first part that an interrupted run had not finished, and the sums over the parts before it."""
    for number in reversed(range(parts)) if work is not None else ():
        if work is not None and (saved := work.load(_part_name(number))) is not None:
            return number + 1, _from_named_tensors(saved)
    return 0, Sensitivity()


def _save_total(work: CalibrationWork | None, number: int, total: Sensitivity) -> None:
    """Saves the sums over all parts up to this one in place of those before it, as output Hessians are large."""
    if work is None:
        return
    work.save(_part_name(number), _to_named_tensors(total))
    delete_tape(work, _part_name(number))
    if number:
        work.delete(_part_name(number - 1))


def _to_named_tensors(sensitivity: Sensitivity) -> NamedTensors:
    """As the work folder stores it."""
    tokens = {f"tokens/{name}": weights for name, weights in sensitivity.token_weights.items()}
    return tokens | {f"outputs/{name}": [hessian] for name, hessian in sensitivity.output_hessians.items()}


def _from_named_tensors(saved: NamedTensors) -> Sensitivity:
    by_kind: dict[str, TokenWeights] = {"tokens": {}, "outputs": {}}
    for key, tensors in saved.items():
        kind, _, name = key.partition("/")
        by_kind[kind][name] = tensors
    return Sensitivity(by_kind["tokens"], {name: hessian for name, (hessian,) in by_kind["outputs"].items()})


def _part_name(number: int) -> str:
    return f"sensitivity-{number:04}"


def count_passes(job: CalibrationJob, prompts: Prompts, config: SearchConfig) -> tuple[int, int]:
    """How many forward passes and how many backward passes `measure_sensitivity` takes, of one prompt or image through one
    block each."""
    if not config.needs_gradients():
        return 0, 0
    images = (len(job.blocks.vision_layers) + 1) * sum(len(sample.pixel_values) for sample in job.samples)
    once = images + len(job.blocks.text_layers) * sum(map(len, prompts))
    backwards = config.num_backward_passes()
    return (1 if _graphs_fit_in_memory(job, prompts) else 1 + backwards) * once, backwards * once


def _graphs_fit_in_memory(job: CalibrationJob, prompts: Prompts) -> bool:
    images = sum(len(sample.pixel_values) for sample in job.samples)
    return fits_in_memory(job.blocks, images, sum(len(text.input_ids) for text in flatten_prompts(prompts)[0]))


def _split_into_parts(prompts: Prompts, blocks: ModelBlocks) -> Iterator[Prompts]:
    """As many samples at a time, each with all prompts about its images, as have a tape of at most MAX_TAPE_VALUES."""
    values = blocks.text_width() * blocks.num_blocks()
    return split_by_size(
        prompts, [values * sum(len(prompt.input_ids) for prompt in about) for about in prompts], MAX_TAPE_VALUES
    )


def _measure_part(job: CalibrationJob, prompts: Prompts, part: _Part) -> TokenWeights:
    """Squared gradients of one part, not normalized; adds to the part's output Hessians."""
    blocks, source, samples = job.blocks, job.source, [about[0] for about in prompts]
    texts, sample_of_text = flatten_prompts(prompts)
    part_job = replace(job, samples=samples)
    tape = Tape(blocks, job.work, _part_name(part.number))

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batches, block_inputs = batch_by_length(inputs), [x.clone() if x.is_inference() else x for x in inputs]
        leaves = restored = tape.load_outputs()
        recorded: list[RecordedForward] = []
        if leaves is None:
            with load(block) as module, torch.set_grad_enabled(part.record_graphs):
                if part.record_graphs:
                    recorded = [
                        record_forward(module, run, x.to(job.device), list_linears(module))
                        for x in batches.iter_merged(block_inputs)
                    ]
                    leaves = [forward.output.detach().cpu().clone() for forward in recorded]
                else:
                    leaves = [run(module, x.to(job.device)).cpu() for x in batches.iter_merged(block_inputs)]
            numbers = sample_of_text if block in blocks.text_layers else part_job.sample_numbers(block)
            numbers = job.numbers_in_set(part.first_sample + number for number in numbers)
            check_outputs(block, batches.split(leaves), numbers)
        for leaf in leaves:
            leaf.requires_grad_()
        tape.add(TapeEntry(block, run, batches, block_inputs, leaves, recorded), restored=restored is not None)
        part.report_block()
        return batches.split(leaves)

    with torch.enable_grad(), open_block_loader(blocks, source, job.device) as load:
        features = run_vision_blocks(blocks, source, samples, step)
        text_features = [features[number] for number in sample_of_text]
        hidden = run_decoder_blocks(blocks, source, texts, text_features, step)
        if not tape.backward_started():
            _backpropagate_probes(job, texts, hidden, part)
    weights: TokenWeights = {}
    with torch.enable_grad(), open_block_loader(blocks, source, job.device, backwards=True) as load:
        while tape.entries:
            if (saved := tape.load_result()) is None:
                result = backward_block(tape.last(), load, job.device, part.make_request(len(tape.entries)))
                tape.pop(_to_named_tensors(result))
            else:
                result = _from_named_tensors(saved)
                tape.pop()
            weights |= result.token_weights
            if part.output_hessians is not None:
                part.output_hessians.update(result.output_hessians)
            part.report_block()
    return weights


def _backpropagate_probes(job: CalibrationJob, texts: Sequence[Sample], hidden: Sequence[torch.Tensor], part: _Part) -> None:
    """Backpropagates the randomly signed logits of the probed tokens into the gradients of the last block's leaves.

    hidden: the last block's outputs, float32 [1, S, hidden] for each text.
    """
    head = load_head(job.source, job.blocks.final_epsilon)

    def probed_logits(sample: Sample, states: torch.Tensor) -> torch.Tensor:
        first = max(sample.answer_start - 1, 0)
        if part.config.probed_tokens == "text":
            images = (torch.from_numpy(sample.input_ids) == job.blocks.image_token_id).nonzero()
            first = int(images.max()) if len(images) else 0
        return head.logits(states[0, first : max(first + 1, len(sample.input_ids) - 1)])

    weighting, generator = part.config.token_weighting, part.make_generator()
    logits_share = 0.0 if weighting in {"kl", "output"} else 1.0
    if weighting == "kl+logits":
        # The mean trace of diag(p) - p p^T over that of the identity, which is the logits' second derivative.
        with torch.no_grad():
            traces = [1 - probed_logits(*pair).softmax(-1).square().sum(-1) for pair in zip(texts, hidden, strict=True)]
        logits_share = float(torch.cat(traces).double().mean()) / len(head.weight)

    def draw_signs(like: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1.0

    for sample, states in zip(texts, hidden, strict=True):
        logits = probed_logits(sample, states)
        probe = logits_share**0.5 * draw_signs(logits) if logits_share else torch.zeros_like(logits)
        if weighting in {"kl", "kl+logits", "output"}:
            p = logits.detach().softmax(-1)
            signed_roots = p.sqrt() * draw_signs(logits)
            probe = probe + signed_roots - p * signed_roots.sum(-1, keepdim=True)
        with deterministic_small_matmul(logits):
            torch.autograd.backward(logits, probe, retain_graph=True)  # hidden states of one batch share their leaf


def _label_tokens(name: str, job: CalibrationJob, prompts: Prompts) -> list[torch.Tensor]:
    """The TokenLabels of the inputs of the block with this name, or with this linear inside it."""
    blocks = job.blocks.all()
    owner = next(block for block in blocks if f"{name}.".startswith(f"{block.prefix}."))
    return label_block_inputs(owner, job.blocks, prompts)


def _average_by_label(weights: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights of the same shapes in which every token has the mean weight of the tokens with its label."""
    if not weights:  # of tower and projector, where no sample has images
        return []
    flat_labels = torch.cat([label.expand(w.shape).flatten() for w, label in zip(weights, labels, strict=True)])
    flat_weights = torch.cat([w.flatten() for w in weights])
    means = torch.zeros(len(TokenLabel)).index_add_(0, flat_labels, flat_weights) / flat_labels.bincount(
        minlength=len(TokenLabel)
    ).clamp(min=1)
    return [means[label.expand(w.shape)] for w, label in zip(weights, labels, strict=True)]


def _normalize(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Weights of mean 1 over all tokens, with MIN_TOKEN_WEIGHT times the mean added before; all 1 where all are 0."""
    mean = _mean(weights)
    if not mean > 0.0:
        return [torch.ones_like(w) for w in weights]
    return [(w / mean + MIN_TOKEN_WEIGHT) / (1.0 + MIN_TOKEN_WEIGHT) for w in weights]


def _mean(weights: Sequence[torch.Tensor]) -> float:
    """The mean over all tokens; 0 without tokens."""
    return sum(float(w.double().sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)
