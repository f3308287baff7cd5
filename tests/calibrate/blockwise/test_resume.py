"""A calibration that is interrupted behind any block and gone on with ends in the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import read_files
from small_export import plan_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, count_finished_blocks
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.quantization.config import SearchConfig
from tools.families import check


class InterruptedRunError(Exception):
    """What stands for a kill."""


def calibrate_searched_briefly(*arguments: Any) -> dict[str, Any]:
    return calibrate_search(*arguments, SearchConfig(equalization="none"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """made(kind) -> a checkpoint of a family, and samples with its pictures."""
    return lambda kind: check.make(tmp_path_factory.mktemp(kind) / kind, kind)


@pytest.mark.parametrize(
    ("kind", "calibrate"),
    [("vipllava", calibrate_rtn), ("vipllava", calibrate_searched_briefly), ("next-qwen", calibrate_rtn)],
)
def test_interrupted_behind_every_block(made, tmp_path: Path, kind: str, calibrate) -> None:
    """Several features of the tower, and tiles that are placed, are what lies between the blocks."""
    kept = made(kind)
    plan = plan_of(kept.checkpoint, "int8")
    samples = [question.sample for question in kept.questions[:2]]

    def run(folder: Path, last: int | None) -> dict[str, Any]:
        blocks, work = make_blocks(kept.checkpoint.hf_config), CalibrationWork(folder / "state", memory_bytes=0)
        job = CalibrationJob(blocks, kept.checkpoint.source, plan, samples, work)
        writer = CalibratedWriter(folder / "calibrated")

        def progress(done: int, total: int, _: str) -> None:
            if last is not None and done * blocks.num_blocks() == last * total:
                raise InterruptedRunError

        summary = calibrate(job, writer, progress)
        writer.finish(kept.checkpoint.config_json, summary)
        return summary

    whole = run(tmp_path / "whole", None)
    count = make_blocks(kept.checkpoint.hf_config).num_blocks()
    for last in range(1, count + 1):
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "parted", last)
        assert count_finished_blocks(tmp_path / "parted" / "state") == last
        left = list((tmp_path / "parted" / "state" / "blocks").glob("*.activations"))
        assert len(left) <= 1 + len(make_blocks(kept.checkpoint.hf_config).features)
    assert run(tmp_path / "parted", None) == whole
    assert read_files(tmp_path / "parted" / "calibrated") == read_files(tmp_path / "whole" / "calibrated")
