"""Accuracy of a calibrated checkpoint: the same figures as by running both models whole, with and without a prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_export import make_sample, open_small, schemes_of
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.forward import compute_prefix, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.config import FAST
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step
from qvlm_export.calibrate.sensitivity.accuracy import Accuracy, measure_accuracy
from qvlm_export.checkpoints.checkpoint import Checkpoint
from qvlm_export.engines.check.metrics import Sums, measure


@pytest.fixture(scope="module")
def checkpoint(llava: Callable[..., Path]) -> Checkpoint:
    return open_small(llava())


def samples_of(checkpoint: Checkpoint) -> list[Sample]:
    """Samples with the same first two tokens: with a picture and an answer, with an answer, and without one."""
    samples = [make_sample(checkpoint, words=w, images=n, seed=w) for w, n in ((9, 1), (12, 0), (7, 0))]
    texts = [np.concatenate([[7, 8], s.input_ids]) for s in samples]
    starts = [len(texts[0]) - 3, len(texts[1]) - 4, len(texts[2])]
    return [replace(s, input_ids=t, answer_start=a) for s, t, a in zip(samples, texts, starts, strict=True)]


def slow_logits(checkpoint: Checkpoint, blocks: ModelBlocks, calibrated: CalibratedCheckpoint, sample: Sample) -> np.ndarray:
    source = DequantizedSource(calibrated)
    step = fake_quantized_step(calibrated, source)
    hidden = run_decoder_blocks(blocks, source, [sample], run_vision_blocks(blocks, source, [sample], step), step)
    logits: np.ndarray = load_head(source, checkpoint.config.text.rms_norm_eps).logits(hidden[0][0]).numpy()
    return logits


@pytest.mark.parametrize("count", [0, 2], ids=["whole", "behind a prefix"])
def test_figures_are_those_of_both_whole_models(checkpoint: Checkpoint, tmp_path: Path, count: int) -> None:
    samples, blocks = samples_of(checkpoint), make_blocks(checkpoint.hf_config)
    ids, cut = samples[0].input_ids[:count], samples
    if count:
        blocks, cut = replace(blocks, prefix=compute_prefix(blocks, checkpoint.source, ids)), cut_prefix(samples, ids)
    writer = CalibratedWriter(tmp_path)
    job = CalibrationJob(blocks, checkpoint.source, schemes_of(checkpoint, "int8"), cut)
    writer.finish(checkpoint.config_json, calibrate_search(job, writer, lambda *_: None, FAST))
    calibrated, shares = CalibratedCheckpoint(tmp_path), list[float]()
    accuracy = measure_accuracy(blocks, checkpoint.source, calibrated, cut, progress=shares.append)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    text, total = checkpoint.config.text, Sums()
    stored = calibrated.read_prefix((text.num_layers, text.num_kv_heads, text.head_dim)) if count else None
    for sample, behind, tokens in zip(samples, cut, (3, 4, len(cut[2].input_ids)), strict=True):
        pixels = torch.from_numpy(sample.pixel_values) if len(sample.pixel_values) else None
        with torch.inference_mode():
            exact = model(input_ids=torch.from_numpy(sample.input_ids)[None], pixel_values=pixels).logits[0, count:].numpy()
        rounded = slow_logits(checkpoint, replace(blocks, prefix=stored), calibrated, behind)
        last = len(exact) - (sample.answer_start < len(sample.input_ids))  # the last token of an answer predicts nothing
        total += measure(exact[last - tokens : last], rounded[last - tokens : last])
    assert accuracy.tokens == total.tokens
    assert accuracy.kl == pytest.approx(total.mean_kl, rel=2e-3)
    assert accuracy.agreement == pytest.approx(total.agreement)
    assert list(accuracy.block_errors) == [block.prefix for block in blocks.all()]
    assert all(0 < error < 1 for error in accuracy.block_errors.values())
    assert shares[-1] == 1


def test_the_worst_blocks_are_those_that_add_most() -> None:
    accuracy = Accuracy(1, 0.0, 1.0, {"a": 0.1, "b": 0.15, "c": 0.5, "d": 0.4})
    assert accuracy.worst_blocks(3) == ["c", "a", "b"]
