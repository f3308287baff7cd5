"""Preflight checks of disk space: how much an export needs, and where it is counted."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.pipeline.preparation import preflight
from qvlm_export.pipeline.preparation.preflight import PLAN_OVERHEAD_BYTES, Disk, check_disk, disk_needed


def test_disk_needed_counts_every_copy_of_the_weights() -> None:
    sizes = Sizes(1000, 400)
    assert disk_needed(sizes, calibrates=False, builds=False) == Disk(400, 0)
    assert disk_needed(sizes, calibrates=True, builds=False, activations_bytes=7) == Disk(400, 407)
    assert disk_needed(sizes, calibrates=True, builds=False, activations_bytes=7, sensitivity_bytes=500) == Disk(400, 500)
    assert disk_needed(sizes, calibrates=False, builds=False, sensitivity_bytes=500) == Disk(400, 0)
    assert disk_needed(sizes, calibrates=True, builds=True).bytes == 1200 + 2 * PLAN_OVERHEAD_BYTES


def test_files_of_an_interrupted_export_count_as_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a disk that was large enough for the export would be too small to resume it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    out, disk = tmp_path / "x.plan", Disk(2**20, 2**19)
    with pytest.raises(UserError, match="are needed on this disk"):
        check_disk(disk, out, None)
    (tmp_path / ".x.work" / "out").mkdir(parents=True)
    (tmp_path / ".x.work" / "out" / "x.onnx.data").write_bytes(bytes(2**19))
    check_disk(disk, out, None)


def test_a_work_dir_on_another_disk_is_checked_separately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(preflight, "_get_disk", str)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 if path == work else 50))
    check_disk(Disk(50, 100), tmp_path / "x.plan", work)
    for disk, option in ((Disk(51, 100), "--out"), (Disk(50, 101), "--work-dir")):
        with pytest.raises(UserError, match=f"write {option} to another disk"):
            check_disk(disk, tmp_path / "x.plan", work)


def test_a_download_adds_to_what_is_needed_on_the_same_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    out, cache = tmp_path / "x.plan", tmp_path / "cache"
    check_disk(Disk(30, 30), out, None, cache, 40)
    with pytest.raises(UserError, match=r"write --out to another disk, or .* HF_HOME"):
        check_disk(Disk(30, 30), out, None, cache, 41)
    monkeypatch.setattr(preflight, "_get_disk", str)
    check_disk(Disk(30, 30), out, None, cache, 100)
    with pytest.raises(UserError, match=f"{cache}: .* free some, or let HF_HOME name"):
        check_disk(Disk(30, 30), out, None, cache, 101)
