"""Runs a model of ours, float or fake-quantized, and gives what a cell stores: logits of answers, or all hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks
from qvlm_export.calibrate.blockwise.forward import (
    LanguageHead,
    Step,
    embed_tokens,
    load_finite,
    load_head,
    make_decoder_run,
    run_vision_blocks,
)
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.checkpoints.checkpoint import Checkpoint
from tools.bench.data import answer_spans
from tools.peers.common import HIDDEN, LOGITS, equal_lengths

VISION_BATCH = 50
# Runs a model on samples; the arguments are those of `answer_logits`.
Evaluation = Callable[[Checkpoint, ModelBlocks, TensorSource, Step, Sequence[Sample]], np.ndarray]


def answer_logits(
    checkpoint: Checkpoint, blocks: ModelBlocks, source: TensorSource, step: Step, samples: Sequence[Sample]
) -> np.ndarray:
    """Logits of the answer tokens, float32 [tokens, vocab]; the counterpart of peers.common.answer_logits."""
    head, outputs = run_model(checkpoint, blocks, source, step, samples)
    start = 0 if blocks.prefix is None else len(blocks.prefix)
    spans = answer_spans(samples)
    return np.concatenate([head.logits(x[a - start : b - start]).numpy() for x, (a, b) in zip(outputs, spans, strict=True)])


def hidden_states(
    checkpoint: Checkpoint, blocks: ModelBlocks, source: TensorSource, step: Step, samples: Sequence[Sample]
) -> np.ndarray:
    """The input of lm_head, float32 [tokens of all samples, hidden]; the counterpart of peers.common.hidden_states.

    Rows of prefix tokens hold NaN, as they are not computed.
    """
    head, outputs = run_model(checkpoint, blocks, source, step, samples)
    unknown = torch.full((0 if blocks.prefix is None else len(blocks.prefix), len(head.gain)), torch.nan)
    normed = (torch.nn.functional.rms_norm(x, head.gain.shape, head.gain, head.epsilon) for x in outputs)
    return np.concatenate([part.numpy() for x in normed for part in (unknown, x)])


def run_model(
    checkpoint: Checkpoint, blocks: ModelBlocks, source: TensorSource, step: Step, samples: Sequence[Sample]
) -> tuple[LanguageHead, list[torch.Tensor]]:
    """The head, and what the last decoder layer gives for each sample, float32 [tokens behind the prefix, hidden].

    Computed block by block; samples of equal length form a batch. samples: begin with the tokens of the prefix.
    """
    if blocks.prefix is not None:
        samples = cut_prefix(samples, blocks.prefix.token_ids)
    images: list[torch.Tensor] = []
    for start in range(0, len(samples), VISION_BATCH):
        part = samples[start : start + VISION_BATCH]
        stacked = Sample(np.zeros(0, np.int64), np.concatenate([s.pixel_values for s in part]), 0)
        counts = [int((s.input_ids == blocks.image_token_id).sum()) for s in part]
        images += run_vision_blocks(blocks, source, [stacked], step)[0].split(counts)
    table = load_finite(source, "language_model.model.embed_tokens.weight")
    batches = list(equal_lengths([len(s.input_ids) for s in samples]))
    hidden = [torch.cat([embed_tokens(table, blocks.image_token_id, samples[n], images[n]) for n in b]) for b in batches]
    for number, block in enumerate(blocks.text_layers):
        hidden = list(step(block, hidden, make_decoder_run(blocks, number)))
    outputs = {n: row for numbers, batch in zip(batches, hidden, strict=True) for n, row in zip(numbers, batch, strict=True)}
    head = load_head(source, checkpoint.config.text.rms_norm_eps)
    return head, [outputs[number] for number in range(len(samples))]


EVALUATIONS: Mapping[str, Evaluation] = {LOGITS: answer_logits, HIDDEN: hidden_states}
