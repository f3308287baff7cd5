"""A calibration that is interrupted after any block and resumed writes the same files as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import read_files
from small_export import schemes_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, count_finished_blocks
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.quantization.config import SearchConfig
from tools.families import check


class InterruptedRunError(Exception):
    """Raised in place of a kill."""


def calibrate_search_without_equalization(*arguments: Any) -> dict[str, Any]:
    return calibrate_search(*arguments, SearchConfig(equalization="none"))


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A function that makes a checkpoint of a model family, with samples that have images."""
    return lambda kind: check.make(tmp_path_factory.mktemp(kind) / kind, kind)


@pytest.mark.parametrize(
    ("kind", "calibrate"),
    [("vipllava", calibrate_rtn), ("vipllava", calibrate_search_without_equalization), ("next-qwen", calibrate_rtn)],
)
def test_interrupted_after_every_block_and_resumed(make_checkpoint, tmp_path: Path, kind: str, calibrate) -> None:
    """The families have several tower features, and tiles that are placed, between their blocks."""
    family = make_checkpoint(kind)
    schemes = schemes_of(family.checkpoint, "int8")
    samples = [question.sample for question in family.questions[:2]]

    def run(folder: Path, last: int | None) -> dict[str, Any]:
        blocks, work = make_blocks(family.checkpoint.hf_config), CalibrationWork(folder / "state", memory_bytes=0)
        job = CalibrationJob(blocks, family.checkpoint.source, schemes, samples, work)
        writer = CalibratedWriter(folder / "calibrated")

        def progress(done: int, total: int, _: str) -> None:
            if last is not None and done * blocks.num_blocks() == last * total:
                raise InterruptedRunError

        summary = calibrate(job, writer, progress)
        writer.finish(family.checkpoint.config_json, summary)
        return summary

    uninterrupted = run(tmp_path / "uninterrupted", None)
    count = make_blocks(family.checkpoint.hf_config).num_blocks()
    for last in range(1, count + 1):
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "interrupted", last)
        assert count_finished_blocks(tmp_path / "interrupted" / "state") == last
        activations = list((tmp_path / "interrupted" / "state" / "blocks").glob("*.activations"))
        assert len(activations) <= 1 + len(make_blocks(family.checkpoint.hf_config).features)
    assert run(tmp_path / "interrupted", None) == uninterrupted
    assert read_files(tmp_path / "interrupted" / "calibrated") == read_files(tmp_path / "uninterrupted" / "calibrated")
