"""Sequential post-training quantization: one block after another is searched against the float model's output.

The calibration set runs through the blocks twice, side by side: the first half of a block's inputs are X, from the float
model, the second half X_q, from the already quantized preceding blocks. What a block's search does is in `block_search.py`.
Before the first block, token sensitivities and output Hessians are measured on the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import (
    Prompts,
    flatten_prompts,
    label_block_inputs,
    limit_prompts,
)
from qvlm_export.calibrate.augmentation.random_words import embedding_norm_weights, replace_words
from qvlm_export.calibrate.blockwise.batching import Batches, batch_by_length
from qvlm_export.calibrate.blockwise.block_loader import CPU, move_tensors, open_block_loader
from qvlm_export.calibrate.blockwise.block_writer import BlockWriter, convert_to_stored_dtypes
from qvlm_export.calibrate.blockwise.blocks import Block, deterministic_threads, get_linear, load_finite
from qvlm_export.calibrate.blockwise.forward import EMBEDDING, Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import (
    CalibrationJob,
    Progress,
    check_images,
    check_outputs,
    check_weight,
)
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.calibrators.record import make_block_record, mark_partition
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.record import run_rtn_baseline
from qvlm_export.calibrate.quantization.tokens import label_tokens
from qvlm_export.calibrate.sensitivity.block_backward import Sensitivity, TokenWeights, select_block
from qvlm_export.calibrate.sensitivity.measure import count_passes, measure_sensitivity

# Units of progress for each block: every measurement on the float model, and the search, cost about in this proportion.
MEASURE_UNITS, SEARCH_UNITS = 10, 40
_T = TypeVar("_T")


def calibrate_search(
    job: CalibrationJob, writer: CalibratedWriter, progress: Progress, config: SearchConfig
) -> dict[str, Any]:
    """Quantizes every linear of `job.schemes` into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite, or where images are missing.
    """
    check_images(job)
    config = limit_prompts(config, job.blocks, job.samples)
    before = MEASURE_UNITS * job.blocks.num_blocks() if config.needs_gradients() else 0  # units before the first block
    total = before + SEARCH_UNITS * job.blocks.num_blocks()
    shards = BlockWriter(job, writer, lambda done, _, name: progress(before + SEARCH_UNITS * done, total, name))
    prompts, sensitivity = _measure(job, config, lambda share: progress(int(share * before), total, "sensitivity"))
    random_texts = _make_random_word_prompts(job, config)
    texts, samples_of_texts = _append_texts(prompts, random_texts)

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        is_text = block in job.blocks.text_layers
        schemes, half = job.block_schemes(block), len(inputs) // 2
        block_config, numbers = (config, samples_of_texts) if is_text else (config.for_vision(), job.sample_numbers(block))
        with resident(block) as module, torch.no_grad():
            for name, scheme in schemes.items():
                check_weight(f"{block.prefix}.{name}", get_linear(module, name).weight, scheme)
            check_outputs(block, inputs, numbers)  # catches what came before this block, such as a NaN in an image
            batches = batch_by_length(inputs[:half])
            measured = sensitivity.token_weights if block_config.needs_gradients() else {}
            weights = _select_token_weights(measured, block, batches, random_texts if is_text else [], job.device)
            hessians = _select_inside(sensitivity.output_hessians, block) if block_config.needs_output_hessians() else {}
            labels = label_block_inputs(block, job.blocks, prompts)
            random_labels = (label_tokens(text, job.blocks.image_token_id) for text, _ in random_texts)
            merged = _merge_numbers_and_labels(batches, inputs[:half], numbers, [*labels, *random_labels][:half])
            search = BlockSearch(module, schemes, run, block_config, weights, *merged, hessians, block.prefix, job.strict)
            pairs = list(zip(inputs[: len(labels)], inputs[half:], strict=False))
            baseline = run_rtn_baseline(module, schemes, run, pairs, job.device)
            both_inputs = (move_tensors(job.device, batches.merge(part)) for part in (inputs[:half], inputs[half:]))
            outputs = search.search(*both_inputs)
            exact, rounded = (move_tensors(CPU, batches.split(part)) for part in outputs)
            changed = convert_to_stored_dtypes(search.float_tensors(), block, job)
            results = exact[: len(labels)], rounded[: len(labels)], labels
            record = make_block_record(block, search, results, baseline, texts if is_text else ())
        stored, values = shards.store_outputs(block, [*exact, *rounded], numbers), search.prefix_values()
        shards.write(block, search.quantized_linears(), changed, outputs=stored, record=record, prefix_values=values)
        return stored

    with deterministic_threads(job.blocks), open_block_loader(job.blocks, job.source, job.device) as resident:
        features = run_vision_blocks(job.blocks, job.source, [*job.samples, *job.samples], shards.skip_finished(step))
        halves = (features[: len(job.samples)], features[len(job.samples) :])
        text_features = [half[number] for half in halves for number in samples_of_texts]
        run_decoder_blocks(job.blocks, job.source, [*texts, *texts], text_features, shards.skip_finished(step))
    shards.write_rest()
    return {
        "method": asdict(config),
        "samples": len(job.samples),
        "prompts": len(texts),
        "random_words": len(random_texts),
        "tokens": sum(len(s.input_ids) for s in texts),
        **_summarize_blocks(job, config, prompts, shards.records),
    }


def _append_texts(prompts: Prompts, more: Sequence[tuple[Sample, int]]) -> tuple[list[Sample], list[int]]:
    """Returns all prompts, those of `more` last, and for each the number of the sample whose images it is about."""
    texts, numbers = flatten_prompts(prompts)
    return [*texts, *(text for text, _ in more)], [*numbers, *(number for _, number in more)]


def _merge_numbers_and_labels(
    batches: Batches, inputs: Sequence[torch.Tensor], numbers: Sequence[int], labels: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns for every batch the sample numbers of its inputs, int64 [B], and the labels of their tokens, [B, tokens].

    numbers: of every input, the sample whose images it is about. labels: TokenLabel of every input, int64 [tokens], or [1]
    for all its tokens.
    """
    expanded_numbers = [torch.full((len(x),), number) for x, number in zip(inputs, numbers, strict=True)]
    expanded_labels = [label.expand(x.shape[:2]) for label, x in zip(labels, inputs, strict=True)]
    return batches.merge(expanded_numbers), batches.merge(expanded_labels)


def _measure(job: CalibrationJob, config: SearchConfig, progress: Callable[[float], None]) -> tuple[Prompts, Sensitivity]:
    """Returns the prompts to search on, and the token sensitivities and output Hessians there.

    progress: called with the share that is done, 0 to 1.
    """
    prompts = cross_pair_prompts(job.samples, config.questions_per_image, job.blocks.image_token_id, config.seed)
    with deterministic_threads(job.blocks):
        return prompts, measure_sensitivity(job, prompts, config, progress)


def _make_random_word_prompts(job: CalibrationJob, config: SearchConfig) -> list[tuple[Sample, int]]:
    """Returns texts with randomly replaced words, each with the number of the sample whose images it is about."""
    if not config.random_word_prompts:
        return []
    weights = embedding_norm_weights(load_finite(job.source, EMBEDDING).numpy())
    if job.blocks.prefix is not None:  # which every prompt begins with, so its tokens are none to draw
        weights[list(job.blocks.prefix.token_ids)] = 0
    return replace_words(job.samples, config.random_word_prompts, weights, job.blocks.image_token_id, config.seed)


def _summarize_blocks(
    job: CalibrationJob, config: SearchConfig, prompts: Prompts, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the part of the summary that is about all blocks together, and their records."""
    marked, thresholds = mark_partition(records)
    forwards, backwards = count_passes(job, prompts, config)
    return {
        "block_forwards": round(sum(b["forwards"] for b in records)) + forwards,
        "block_backwards": backwards,
        "entropy_thresholds": thresholds,
        "blocks": marked,
    }


def _select_token_weights(
    tokens: TokenWeights,
    block: Block,
    batches: Batches,
    random_texts: Sequence[tuple[Sample, int]],
    device: torch.device,
) -> dict[str, list[torch.Tensor]]:
    """Returns the token weights of one block, in its batches, by names inside it and under "" for its output.

    random_texts: inputs that come after the measured ones; all their tokens get the mean weight, 1.
    """
    mean = [torch.ones(1, len(text.input_ids)) for text, _ in random_texts]
    merged = {name: batches.merge([*weights, *mean]) for name, weights in _select_inside(tokens, block).items()}
    return {name: move_tensors(device, parts) for name, parts in merged.items()}


def _select_inside(named: Mapping[str, _T], block: Block) -> dict[str, _T]:
    """Returns the values that belong to one block, by names inside it, "" being the block itself."""
    return {n.removeprefix(block.prefix).removeprefix("."): value for n, value in select_block(named, block).items()}
