"""Samples that the search can use only in part, or not at all: texts without images, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_export import mixed_samples, schemes_of
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
from qvlm_export.calibrate.quantization.config import FAST, FULL, FULL_LARGE, SearchConfig
from qvlm_export.calibrate.quantization.hessian import factor_hessian
from qvlm_export.calibrate.sensitivity import measure
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint

METHODS = {
    "plain": SearchConfig(),
    "fast": FAST,
    "full": replace(FULL, questions_per_image=2, random_word_prompts=2),
    "large": FULL_LARGE,
    "modality": SearchConfig(token_weighting="modality"),
}


class OverflowingSource(TensorSource):
    """A checkpoint in which the gain of one norm, by name, is so large that its outputs overflow."""

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
    schemes = {n: s for n, s in schemes_of(checkpoint, "int8").items() if vision or n.startswith("language_model.")}
    calibration_work = None if work is None else CalibrationWork(work)
    return CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples, calibration_work)


def run(job: CalibrationJob, folder: Path, method: SearchConfig) -> CalibratedCheckpoint:
    writer = CalibratedWriter(folder)
    writer.finish({}, calibrate_search(job, writer, lambda *_: None, method))
    return CalibratedCheckpoint(folder)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("with_work_folder", [False, True])
def test_texts_without_images_calibrate_the_decoder(checkpoint, tmp_path, method, with_work_folder):
    texts = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    job = job_of(checkpoint, texts, tmp_path / "work" if with_work_folder else None, vision=False)
    calibrated = run(job, tmp_path / "c", method)
    assert set(calibrated.schemes) == set(job.schemes)
    assert all(block["error"] < 1e-3 for block in calibrated.summary["blocks"] if block["layers"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_texts_without_images_are_refused_for_the_vision_tower(checkpoint, tmp_path, method):
    texts = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    with pytest.raises(UserError, match=r"^vision_tower\.\S+: no calibration sample has a picture"):
        run(job_of(checkpoint, texts), tmp_path / "c", method)


@pytest.mark.parametrize("method", [FAST, METHODS["full"]], ids=["fast", "full"])
def test_measuring_in_parts_allows_a_part_without_images(checkpoint, tmp_path, monkeypatch, method):
    """Token sensitivity is measured on some samples at a time, and all of these may be texts without images."""
    whole = run(job_of(checkpoint, mixed_samples(checkpoint)), tmp_path / "whole", method)
    monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    for name, work in {"parts": None, "with_work": tmp_path / "work"}.items():
        in_parts = run(job_of(checkpoint, mixed_samples(checkpoint), work), tmp_path / name, method)
        errors, whole_errors = ([block["error"] for block in c.summary["blocks"]] for c in (in_parts, whole))
        assert sum(errors) < 1.5 * sum(whole_errors)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_image_that_is_not_finite_is_refused_by_sample(checkpoint, tmp_path, method):
    samples = mixed_samples(checkpoint)
    samples[2].pixel_values[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"^vision_tower\.\S+: activations of sample 3 are not finite"):
        run(job_of(checkpoint, samples), tmp_path / "c", method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_values_that_overflow_inside_a_block_are_refused_by_sample(checkpoint, tmp_path, method):
    """They are refused before anything is factored, as a matrix with NaN cannot be factored."""
    job = job_of(checkpoint, mixed_samples(checkpoint))
    job = replace(job, source=OverflowingSource(job.source, "language_model.model.layers.1.post_attention_layernorm.weight"))
    message = r"activations of sample 1 (are not finite|reach \de\+30, which is too large)"
    with pytest.raises(UserError, match=rf"^language_model\.model\.layers\.1\S*: {message}"):
        run(job, tmp_path / "c", method)


class NormLinear(nn.Module):
    """A norm followed by a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer_norm2, self.mlp = nn.LayerNorm(16), nn.Module()
        self.mlp.fc1 = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp.fc1(self.layer_norm2(x))


@pytest.mark.parametrize("stream", [0, 1])
def test_an_input_that_is_not_finite_is_refused_by_linear_and_sample(stream):
    """stream: 0 for the float model's inputs, 1 for those from the already quantized preceding blocks."""
    inputs = [[torch.randn(2, 5, 16), torch.randn(3, 7, 16)] for _ in range(2)]
    inputs[stream][1][1, 3, 2] = torch.inf  # the fourth input, about the images of sample 3
    numbers = [torch.tensor([0, 0]), torch.tensor([1, 2, 2])]
    schemes = {"mlp.fc1": LinearScheme(8, 8, None)}
    search = BlockSearch(NormLinear(), schemes, nn.Module.__call__, SearchConfig(), sample_numbers=numbers, prefix="block")
    with torch.no_grad(), pytest.raises(UserError, match=r"^block\.mlp\.fc1: activations of sample 3 are not finite"):
        search.search(*inputs)


def test_a_hessian_with_nan_is_refused():
    hessian = torch.eye(4)
    hessian[2, 2] = torch.nan
    with pytest.raises(UserError, match="second moments of 4 channels are not finite"):
        factor_hessian(hessian)
