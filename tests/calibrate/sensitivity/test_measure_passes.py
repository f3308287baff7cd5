"""How `measure_sensitivity` passes through the model: what it reads and holds, in parts, resumed, and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_export import own_prompts

from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, holds_work
from qvlm_export.calibrate.calibrators.cost import sensitivity_bytes
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import KRONECKER_LINEAR, SearchConfig
from qvlm_export.calibrate.rounding import output_hessian
from qvlm_export.calibrate.sensitivity import measure, tape
from qvlm_export.calibrate.sensitivity.block_backward import Sensitivity
from qvlm_export.calibrate.sensitivity.measure import measure_sensitivity
from qvlm_export.calibrate.sensitivity.tape import Tape, TapeEntry


class CountingSource:
    """A tensor source that counts how often each tensor is read."""

    def __init__(self, job: CalibrationJob) -> None:
        self._source, self.loads = job.source, Counter[str]()

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def load(self, name: str) -> np.ndarray:
        self.loads[name] += 1
        return self._source.load(name)

    def count_block_loads(self, job: CalibrationJob) -> int:
        """How many times blocks were read, all blocks together."""
        blocks = job.blocks.all()
        return sum(self.loads[block.tensor_names()[0]] for block in blocks)


def tensor_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def assert_equal(actual: Sensitivity, expected: Sensitivity) -> None:
    assert actual.token_weights.keys() == expected.token_weights.keys()
    for name, weights in expected.token_weights.items():
        assert all(torch.equal(*pair) for pair in zip(actual.token_weights[name], weights, strict=True)), name
    assert actual.output_hessians.keys() == expected.output_hessians.keys()
    assert all(torch.equal(actual.output_hessians[name], hessian) for name, hessian in expected.output_hessians.items())


@pytest.mark.usefixtures("recompute_blocks")
@pytest.mark.parametrize("parts", [1, 2])
def test_an_interrupted_measurement_resumes_after_its_last_block(
    job: CalibrationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """Interrupted after every block, forwards and backwards: nothing is computed again, and the result has the same bits."""
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", 16)  # so that the backward pass draws random signs, too
    if parts > 1:
        monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values)][:parts])
    method = SearchConfig(linear=KRONECKER_LINEAR, token_weighting="modality")
    shares: list[float] = []
    whole = measure_sensitivity(job, own_prompts(job), method, shares.append)
    assert shares == sorted(shares)
    visits = 2 * parts * job.blocks.num_blocks()
    assert len(shares) == visits + parts
    for stop in range(0, len(shares), 1 if parts == 1 else 3):
        folder = tmp_path / str(stop)
        reported: list[float] = []

        def interrupt(share: float, reported: list[float] = reported, stop: int = stop) -> None:
            reported.append(share)
            if len(reported) > stop:
                raise KeyboardInterrupt

        first, second = CountingSource(job), CountingSource(job)
        with pytest.raises(KeyboardInterrupt):
            measure_sensitivity(
                replace(job, source=first, work=CalibrationWork(folder)), own_prompts(job), method, interrupt
            )  # type: ignore[arg-type]
        assert holds_work(folder)
        resumed = measure_sensitivity(replace(job, source=second, work=CalibrationWork(folder)), own_prompts(job), method)  # type: ignore[arg-type]
        assert first.count_block_loads(job) + second.count_block_loads(job) == visits
        assert_equal(resumed, whole)
        assert tensor_files(folder) == [f"sensitivity-{parts - 1:04}.safetensors"]  # the sums of all parts, and no tape


@pytest.mark.usefixtures("recompute_blocks")
def test_with_a_work_folder_only_the_outputs_read_next_are_in_memory(
    job: CalibrationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory: list[int] = []
    on_disk_bytes: list[int] = []
    backward = measure.backward_block

    def measuring_backward(entry: TapeEntry, *rest: Any) -> Sensitivity:
        on_disk_bytes.append(sum(path.stat().st_size for path in tmp_path.rglob("*-there-*")))
        in_memory.append(sum(leaf.untyped_storage().nbytes() > 0 for other in entries for leaf in other.leaves))
        return backward(entry, *rest)

    entries: list[TapeEntry] = []
    add = Tape.add
    monkeypatch.setattr(
        Tape, "add", lambda self, entry, restored: (entries.append(entry), add(self, entry, restored=restored))
    )
    monkeypatch.setattr(measure, "backward_block", measuring_backward)
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values)][:1])
    method = SearchConfig(token_weighting="logits")
    measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), own_prompts(job), method)
    # The preflight requires this much disk space.
    assert 0 < max(on_disk_bytes) <= sensitivity_bytes(job.blocks, job.samples, method)
    # Outputs of the last block, which the head reads; its inputs; outputs of the tower's last layer and of the projector.
    assert in_memory[0] == 4
    assert len(in_memory) == job.blocks.num_blocks()


def test_a_small_model_runs_the_forward_pass_once(
    job: CalibrationJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the same bits as by computing blocks again; a run that was interrupted computes again what was in memory."""
    method = SearchConfig(linear=KRONECKER_LINEAR, token_weighting="logits")
    source = CountingSource(job)
    expected = measure_sensitivity(replace(job, source=source), own_prompts(job), method)  # type: ignore[arg-type]
    assert {source.loads[name] for name in job.blocks.vision_layers[0].tensor_names()} == {1}
    forwards, backwards = measure.count_passes(job, own_prompts(job), method)
    assert backwards == 2 * forwards

    def interrupt(share: float) -> None:
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), own_prompts(job), method, interrupt)
    assert_equal(measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), own_prompts(job), method), expected)
    monkeypatch.setattr(tape, "MAX_GRAPH_BYTES", 0)
    assert_equal(measure_sensitivity(job, own_prompts(job), method), expected)
    assert measure.count_passes(job, own_prompts(job), method) == (3 * forwards, backwards)
    assert measure.count_passes(job, own_prompts(job), SearchConfig(token_weighting="logits")) == (2 * forwards, forwards)


def test_a_truncated_file_raises_an_error(job: CalibrationJob, tmp_path: Path) -> None:
    method, resumable_job = SearchConfig(token_weighting="logits"), replace(job, work=CalibrationWork(tmp_path))
    measure_sensitivity(resumable_job, own_prompts(job), method)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), own_prompts(job), method)


@pytest.mark.usefixtures("recompute_blocks")
@pytest.mark.parametrize("parts", [1, 3])
def test_weights_are_read_twice_for_every_part(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Forwards and backwards."""
    source = CountingSource(job)
    if parts > 1:
        monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    samples = job.samples[:parts]
    counted = replace(job, source=source, samples=samples)  # type: ignore[arg-type]
    measure_sensitivity(counted, own_prompts(counted), SearchConfig(token_weighting="logits"))
    assert {source.loads[name] for name in job.blocks.vision_layers[0].tensor_names()} == {2 * parts}


@pytest.mark.usefixtures("recompute_blocks")
def test_activations_between_blocks_are_in_memory_once(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's inputs are views of the preceding one's outputs, as these are most of the memory of a large model here."""
    entries, backward = [], measure.backward_block
    monkeypatch.setattr(measure, "backward_block", lambda entry, *rest: entries.append(entry) or backward(entry, *rest))
    measure_sensitivity(job, own_prompts(job), SearchConfig(token_weighting="logits"))
    decoder = [entry for entry in entries if entry.block in job.blocks.text_layers]
    assert len(decoder) == len(job.blocks.text_layers)
    for entry, preceding in pairwise(decoder):  # the last block comes first
        outputs = {leaf.untyped_storage().data_ptr() for leaf in preceding.leaves}
        assert {x.untyped_storage().data_ptr() for x in entry.inputs} == outputs
