"""Prompts beside the samples: added to small models only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qvlm_export.calibrate.augmentation import prompts
from qvlm_export.calibrate.augmentation.prompts import limit_prompts
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.config import FAST, FULL, FULL_LARGE
from qvlm_export.checkpoints.checkpoint import open_checkpoint


def test_a_decoder_beyond_the_limit_is_calibrated_on_the_samples_alone(llava, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks(open_checkpoint(str(llava())).hf_config)
    samples = [Sample(np.zeros(length, np.int64), np.zeros((0, 3, 1, 1), np.float32), length) for length in (3, 7)]
    weights = sum(p.numel() for block in blocks.text_layers for p in block.module.parameters())
    monkeypatch.setattr(prompts, "MAX_SAMPLE_PRODUCTS", 10 * weights)
    assert limit_prompts(FULL, blocks, samples) == FULL
    beyond = [*samples, samples[0]]
    assert limit_prompts(FULL, blocks, beyond) == FULL_LARGE
    assert (FULL_LARGE.questions_per_image, FULL_LARGE.random_word_prompts) == (1, 0)
    same = replace(FULL, large=None)
    assert limit_prompts(same, blocks, beyond) == same
    assert limit_prompts(FAST, blocks, samples * 9) == FAST
