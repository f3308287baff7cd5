"""The searching calibrator: every block is folded, ranged and rounded towards the float model's output. torch.

Two copies of the samples walk through the blocks together: the first half of the inputs is the float model's, the second
half the quantized model's so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.mixup import add_mixup_prompts
from qvlm_export.calibrate.augmentation.mixup import count_mixup_forwards as undecided_runs
from qvlm_export.calibrate.augmentation.prompts import (
    MixupSample,
    Prompts,
    flatten_prompts,
    image_features_of_prompts,
    label_block_inputs,
)
from qvlm_export.calibrate.augmentation.random_words import embedding_norm_weights, replace_words
from qvlm_export.calibrate.blockwise.batching import Batches, batch_by_length
from qvlm_export.calibrate.blockwise.block_writer import BlockWriter
from qvlm_export.calibrate.blockwise.blocks import Block, deterministic_threads, get_linear, load_finite
from qvlm_export.calibrate.blockwise.forward import EMBEDDING, Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import (
    CalibrationJob,
    Progress,
    check_outputs,
    check_weight,
    find_linear_needing_images,
)
from qvlm_export.calibrate.blockwise.offload import CPU, move_tensors, open_block_loader
from qvlm_export.calibrate.blockwise.token_kinds import label_tokens
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.calibrators.record import make_block_record, mark_partition
from qvlm_export.calibrate.calibrators.rtn_baseline import run_rtn_baseline
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.sensitivity.block_backward import Sensitivity, TokenWeights, select_block
from qvlm_export.calibrate.sensitivity.measure import count_passes, measure_sensitivity

# How progress is counted: what is measured first costs about as much for a block as this, searching it as that.
MEASURE_UNITS, SEARCH_UNITS = 10, 40
_T = TypeVar("_T")


def calibrate_search(
    job: CalibrationJob, writer: CalibratedWriter, progress: Progress, method: SearchConfig
) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    _check_pictures(job)
    begun, searched = _units(method, job), SEARCH_UNITS * job.blocks.num_blocks()
    whole = sum(begun.values()) + searched
    shards = BlockWriter(job, writer, lambda done, _, name: progress(whole - searched + SEARCH_UNITS * done, whole, name))
    prompts, influence = _prepared(job, method, lambda done, what: progress(done, whole, what))
    texts, pictures_of = flatten_prompts(prompts)
    others = _scrambled(job, method)
    texts, pictures_of = [*texts, *(text for text, _ in others)], [*pictures_of, *(number for _, number in others)]

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        plan, half = job.block_schemes(block), len(inputs) // 2
        own = method if block in job.blocks.text_layers else method.for_vision()
        with resident(block) as module, torch.no_grad():
            for name in plan:
                check_weight(f"{block.prefix}.{name}", get_linear(module, name).weight)
            numbers = pictures_of if block in job.blocks.text_layers else job.sample_numbers(block)
            check_outputs(block, inputs, numbers)  # of what came before, such as a NaN in a picture
            batches = batch_by_length(inputs[:half])
            mean = [torch.ones(1, len(text.input_ids)) for text, _ in others] if block in job.blocks.text_layers else []
            counted = {} if own.token_weighting == "plain" else _of_block(influence.tokens, block, batches, mean)
            counts = {name: move_tensors(job.device, parts) for name, parts in counted.items()}
            metrics = _inside(influence.outputs, block) if own.needs_output_hessians() else {}
            labels = label_block_inputs(block, job.blocks, prompts)
            kinds = [*labels, *(label_tokens(text, job.blocks.image_token_id) for text, _ in others)][:half]
            marks = _marks(batches, inputs[:half], numbers, kinds)
            search = BlockSearch(module, plan, run, own, counts, *marks, metrics, block.prefix)
            pairs = list(zip(inputs[: len(labels)], inputs[half:], strict=False))
            nearest = run_rtn_baseline(module, plan, run, pairs, job.device)
            found = search.search(
                *(move_tensors(job.device, batches.merge(part)) for part in (inputs[:half], inputs[half:]))
            )
            exact, rounded = (move_tensors(CPU, batches.split(part)) for part in found)
            changed = {n: _stored(t, job.source.dtype(f"{block.prefix}.{n}")) for n, t in search.floats().items()}
            record = make_block_record(block, search, (exact[: len(labels)], rounded[: len(labels)], labels), nearest)
        outputs = shards.store_outputs(block, [*exact, *rounded], numbers)
        shards.write(block, search.found(), changed, outputs=outputs, record=record)
        return outputs

    with deterministic_threads(job.blocks), open_block_loader(job.blocks, job.source, job.device) as resident:
        features = run_vision_blocks(job.blocks, job.source, [*job.samples, *job.samples], shards.resumable(step))
        halves = (features[: len(job.samples)], features[len(job.samples) :])
        spread = [image for half in halves for image in image_features_of_prompts(texts, pictures_of, half)]
        run_decoder_blocks(job.blocks, job.source, [*texts, *texts], spread, shards.resumable(step))
    shards.write_rest()
    return {
        "method": asdict(method),
        "samples": len(job.samples),
        "prompts": len(texts),
        "undecided": sum(isinstance(text, MixupSample) for text in texts),
        "scrambled": len(others),
        "tokens": sum(len(s.input_ids) for s in texts),
        **_totals(job, method, prompts, shards.records),
    }


def _marks(
    batches: Batches, inputs: Sequence[torch.Tensor], numbers: Sequence[int], kinds: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of every batch the number of the sample that an input is about, int64 [B], and the labels of its tokens, int64
    [B, tokens]. numbers, kinds: of every input, a single label standing for all tokens."""
    pictures = [torch.full((len(x),), number) for x, number in zip(inputs, numbers, strict=True)]
    labels = [kind.expand(x.shape[:2]) for kind, x in zip(kinds, inputs, strict=True)]
    return batches.merge(pictures), batches.merge(labels)


def _check_pictures(job: CalibrationJob) -> None:
    """Before anything is measured, which takes long."""
    name = find_linear_needing_images(job.blocks, job.schemes, searched=True)
    if name is not None and not any(len(sample.pixel_values) for sample in job.samples):
        raise UserError(f"{name}: no calibration sample has a picture, so nothing reaches it; add samples with pictures")


def _units(method: SearchConfig, job: CalibrationJob) -> dict[str, int]:
    """How progress counts what is measured before the first block."""
    count = job.blocks.num_blocks()
    return {
        "undecided": MEASURE_UNITS * count if method.mixup_prompts else 0,
        "influence": MEASURE_UNITS * count if method.token_weighting != "plain" else 0,
    }


def _prepared(
    job: CalibrationJob, method: SearchConfig, progress: Callable[[int, str], None]
) -> tuple[Prompts, Sensitivity]:
    """What the blocks are searched on, and what errors there count. progress: (units done, what is measured)."""
    units = _units(method, job)

    def looked(share: float) -> None:
        progress(int(share * units["undecided"]), "undecided")

    def probed(share: float) -> None:
        progress(units["undecided"] + int(share * units["influence"]), "influence")

    asked = cross_pair_prompts(job.samples, method.questions, job.blocks.image_token_id, method.seed)
    with deterministic_threads(job.blocks):
        prompts = add_mixup_prompts(job, asked, method.mixup_prompts, method.seed, looked)
        return prompts, measure_sensitivity(job, prompts, method, probed)


def _scrambled(job: CalibrationJob, method: SearchConfig) -> list[tuple[Sample, int]]:
    """Texts with words drawn anew, and the number of the sample whose pictures each is about."""
    if not method.random_word_prompts:
        return []
    odds = embedding_norm_weights(load_finite(job.source, EMBEDDING).numpy())
    return replace_words(job.samples, method.random_word_prompts, odds, job.blocks.image_token_id, method.seed)


def _totals(job: CalibrationJob, method: SearchConfig, prompts: Prompts, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all blocks, for the record."""
    marked, thresholds = mark_partition(records)
    looked = undecided_runs(job, method.mixup_prompts, method.seed)
    forwards, backwards = count_passes(job, prompts, method)
    return {
        "block_forwards": round(sum(b["forwards"] for b in records)) + looked + forwards,
        "block_backwards": sum(b["backwards"] for b in records) + backwards,
        "entropy_thresholds": thresholds,
        "blocks": marked,
    }


def _of_block(
    tokens: TokenWeights, block: Block, batches: Batches, others: Sequence[torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """What tokens count in one block, in its batches, by names inside it and under "" for its output. others: the same for
    every linear, of the inputs behind those that were measured."""
    return {name: batches.merge([*weights, *others]) for name, weights in _inside(tokens, block).items()}


def _inside(named: Mapping[str, _T], block: Block) -> dict[str, _T]:
    """What belongs to one block, by names inside it."""
    return {n.removeprefix(block.prefix).removeprefix("."): value for n, value in select_block(named, block).items()}


def _stored(tensor: torch.Tensor, source: np.dtype) -> np.ndarray:
    """float32 stays, the rest becomes float16, which folding rounded the gains for; bfloat16 would round them again."""
    return tensor.cpu().numpy().astype(np.float32 if source == np.float32 else np.float16)
