"""Room on disks, before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.pipeline.planning import preflight
from qvlm_export.pipeline.planning.preflight import PLAN_OVERHEAD_BYTES, Disk, check_disk, disk_needed


def test_disk_holds_every_copy() -> None:
    sizes = Sizes(1000, 400)
    assert disk_needed(sizes, calibrates=False, builds=False) == Disk(400, 0)
    assert disk_needed(sizes, calibrates=True, builds=False, kept_bytes=7) == Disk(400, 407)
    assert disk_needed(sizes, calibrates=True, builds=False, kept_bytes=7, measured_bytes=500) == Disk(400, 500)
    assert disk_needed(sizes, calibrates=False, builds=False, measured_bytes=500) == Disk(400, 0)
    assert disk_needed(sizes, calibrates=True, builds=True).bytes == 1200 + 2 * PLAN_OVERHEAD_BYTES


def test_what_an_interrupted_export_holds_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a disk that was large enough at the beginning would be too small to go on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    out, disk = tmp_path / "x.plan", Disk(2**20, 2**19)
    with pytest.raises(UserError, match="are needed on this disk"):
        check_disk(disk, out, None)
    (tmp_path / ".x.work" / "out").mkdir(parents=True)
    (tmp_path / ".x.work" / "out" / "x.onnx.data").write_bytes(bytes(2**19))
    check_disk(disk, out, None)


def test_a_work_dir_on_another_disk_has_its_own_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(preflight, "_disk_of", str)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 if path == work else 50))
    check_disk(Disk(50, 100), tmp_path / "x.plan", work)
    for disk, option in ((Disk(51, 100), "--out"), (Disk(50, 101), "--work-dir")):
        with pytest.raises(UserError, match=f"write {option} to another disk"):
            check_disk(disk, tmp_path / "x.plan", work)
