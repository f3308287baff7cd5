"""A small model to measure sensitivities of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_export import mixed_samples, open_small, schemes_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.sensitivity import tape


@pytest.fixture
def job(llava) -> CalibrationJob:
    checkpoint = open_small(llava(dtype="float32"))
    samples = [replace(sample, answer_start=len(sample.input_ids) - 4) for sample in mixed_samples(checkpoint)]
    return CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes_of(checkpoint, "int4"), samples)


@pytest.fixture
def recompute_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large model: the backward pass computes every block again."""
    monkeypatch.setattr(tape, "MAX_GRAPH_BYTES", 0)
