"""Samples that the search cannot use, or only in part: texts without pictures, and what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_export import mixed_samples, plan_of
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import FAST, FULL, SearchConfig
from qvlm_export.calibrate.quantization.hessian import factor_hessian
from qvlm_export.calibrate.sensitivity import measure
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint

METHODS = {
    "plain": SearchConfig(),
    "fast": FAST,
    "full": replace(FULL, learn_steps=2),
    "modality": SearchConfig(token_weighting="modality"),
}


class Overflowing(TensorSource):
    """A checkpoint one of whose norms multiplies by far too much."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self._source, self._name = source, name

    def __iter__(self):
        return iter(self._source)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(name)

    def load(self, name: str) -> np.ndarray:
        array = self._source.load(name)
        return np.full_like(array, 1e30) if name == self._name else array


@pytest.fixture
def checkpoint(llava: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(str(llava(dtype="float32")))


def job_of(
    checkpoint: Checkpoint, samples: Sequence[Sample], work: Path | None = None, vision: bool = True
) -> CalibrationJob:
    plan = {n: s for n, s in plan_of(checkpoint, "int8").items() if vision or n.startswith("language_model.")}
    kept = None if work is None else CalibrationWork(work)
    return CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, plan, samples, kept)


def run(job: CalibrationJob, folder: Path, method: SearchConfig) -> CalibratedCheckpoint:
    writer = CalibratedWriter(folder)
    writer.finish({}, calibrate_search(job, writer, lambda *_: None, method))
    return CalibratedCheckpoint(folder)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("worked", [False, True])
def test_texts_alone_calibrate_a_decoder(checkpoint, tmp_path, method, worked):
    texts = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    job = job_of(checkpoint, texts, tmp_path / "work" if worked else None, vision=False)
    found = run(job, tmp_path / "c", method)
    assert set(found.schemes) == set(job.schemes)
    assert all(block["error"] < 1e-3 for block in found.summary["blocks"] if block["layers"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_texts_alone_do_not_calibrate_a_tower(checkpoint, tmp_path, method):
    texts = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    with pytest.raises(UserError, match=r"^vision_tower\.\S+: no calibration sample has a picture"):
        run(job_of(checkpoint, texts), tmp_path / "c", method)


@pytest.mark.parametrize("method", [FAST, METHODS["full"]], ids=["fast", "full"])
def test_a_part_of_texts_alone(checkpoint, tmp_path, monkeypatch, method):
    """Influence is measured some samples at a time; in one of those times no picture may be shown."""
    whole = run(job_of(checkpoint, mixed_samples(checkpoint)), tmp_path / "whole", method)
    monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    for name, work in {"parts": None, "kept": tmp_path / "work"}.items():
        found = run(job_of(checkpoint, mixed_samples(checkpoint), work), tmp_path / name, method)
        errors, wanted = ([block["error"] for block in f.summary["blocks"]] for f in (found, whole))
        assert sum(errors) < 1.5 * sum(wanted)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_picture_that_is_not_finite(checkpoint, tmp_path, method):
    samples = mixed_samples(checkpoint)
    samples[2].pixel_values[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"^vision_tower\.\S+: activations of sample 3 are not finite"):
        run(job_of(checkpoint, samples), tmp_path / "c", method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_values_that_overflow_inside_a_block(checkpoint, tmp_path, method):
    """Before anything is factored or learned: a matrix with NaN can never be."""
    job = job_of(checkpoint, mixed_samples(checkpoint))
    job = replace(job, source=Overflowing(job.source, "language_model.model.layers.1.post_attention_layernorm.weight"))
    wrong = r"activations of sample 1 (are not finite|reach \de\+30, which is too large)"
    with pytest.raises(UserError, match=rf"^language_model\.model\.layers\.1\S*: {wrong}"):
        run(job, tmp_path / "c", method)


class Gated(nn.Module):
    """A linear behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer_norm2, self.mlp = nn.LayerNorm(16), nn.Module()
        self.mlp.fc1 = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.fc1(self.layer_norm2(x))


@pytest.mark.parametrize("wrong", [0, 1])
def test_linear_and_sample_are_named(wrong):
    """wrong: whether it is the float model's input, or the quantized prefix's."""
    inputs = [[torch.randn(2, 5, 16), torch.randn(3, 7, 16)] for _ in range(2)]
    inputs[wrong][1][1, 3, 2] = torch.inf  # the fourth input, about the pictures of sample 3
    pictures = [torch.tensor([0, 0]), torch.tensor([1, 2, 2])]
    search = BlockSearch(
        Gated(), {"mlp.fc1": LinearScheme(8, 8, None)}, nn.Module.__call__, SearchConfig(), pictures=pictures, prefix="block"
    )
    with torch.no_grad(), pytest.raises(UserError, match=r"^block\.mlp\.fc1: activations of sample 3 are not finite"):
        search.search(*inputs)


def test_a_matrix_that_no_damping_mends():
    gram = torch.eye(4)
    gram[2, 2] = torch.nan
    with pytest.raises(UserError, match="second moments of 4 channels are not finite"):
        factor_hessian(gram)
