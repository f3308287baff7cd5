"""What is checked before any work: the output path, the disk, and how much will be written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qvlm_export.calibrate.checkpoint.calibrated import RECORD_FILE
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.engines.manifest import FORMAT

PLAN_OVERHEAD_BYTES = 8 * 2**20  # kernels and program text of a TensorRT-RTX plan, whatever the model's size
MAX_NAME_BYTES = 230  # of 255, for what is appended to the name: .vision.onnx.data.tmp


@dataclass(frozen=True)
class Disk:
    """Bytes that an export has on disk at its peak: ONNX data and plans beside the output, the rest where it is worked."""

    out_bytes: int
    work_bytes: int

    @property
    def bytes(self) -> int:
        """On both together."""
        return self.out_bytes + self.work_bytes


def disk_needed(sizes: Sizes, *, calibrates: bool, builds: bool, kept_bytes: int = 0, measured_bytes: int = 0) -> Disk:
    """kept_bytes: of what lies between the blocks of a calibration. measured_bytes: before there is anything else."""
    plans = sizes.planned_bytes + 2 * PLAN_OVERHEAD_BYTES if builds else 0
    return Disk(sizes.planned_bytes + plans, max(sizes.planned_bytes + kept_bytes, measured_bytes) if calibrates else 0)


def check_out(out: Path) -> None:
    """Raises UserError when `out` is not a .plan path in a folder that can be written, or stands for foreign files."""
    if out.suffix != ".plan":
        raise UserError(f"--out {out}: must end in .plan; the other files are named after it")
    if len(os.fsencode(out.name)) > MAX_NAME_BYTES:
        raise UserError(f"--out {out}: the name is too long, as the other files append to it; shorten it")
    check_writable(out.parent, f"--out {out}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    manifest = out.with_suffix(".json")
    if manifest.exists() and not _is_manifest(manifest):
        raise UserError(f"--out {out}: would replace {manifest}, which qvlm-export did not write; choose another name")


def check_work_dir(folder: Path) -> None:
    """Raises UserError when the calibrated checkpoint cannot be kept in `folder`, or would replace foreign files."""
    check_writable(folder, f"--work-dir {folder}")
    kept = calibrated_folder(folder)
    names = {path.name for path in kept.iterdir()} if kept.is_dir() else set()
    foreign = [n for n in names if not n.startswith(("model-", "model.safetensors.index.json", "config.json", RECORD_FILE))]
    if foreign or ("config.json" in names and RECORD_FILE not in names):
        raise UserError(f"--work-dir {folder}: {kept} holds files qvlm-export did not write; choose another folder")


def calibrated_folder(work: Path) -> Path:
    """Where a work folder holds the calibrated checkpoint."""
    return work / "calibrated"


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError when `folder` cannot be written, or made where it does not exist yet. Makes nothing."""
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass
    except OSError as error:
        raise UserError(f"{option}: its folder cannot be written ({error.strerror}); choose another") from error


def nearest_folder(folder: Path) -> Path:
    """`folder`, or the closest of its parents that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_disk(disk: Disk, out: Path, work_dir: Path | None) -> None:
    """Raises UserError when a disk has too little room, beside what an unfinished export of the same left there."""
    scratch = scratch_folder(out)
    if work_dir is not None and _disk_of(work_dir) != _disk_of(out.parent):
        _check_room(work_dir, disk.work_bytes, [work_dir], "--work-dir")
        _check_room(out.parent, disk.out_bytes, [scratch], "--out")
    else:
        _check_room(out.parent, disk.bytes, [scratch, *([] if work_dir is None else [work_dir])], "--out")


def scratch_folder(out: Path) -> Path:
    """The work folder beside the output."""
    return out.parent / f".{out.stem}.work"


def _check_room(folder: Path, needed_bytes: int, ours: list[Path], option: str) -> None:
    held = sum(path.stat().st_size for own in ours for path in own.rglob("*") if path.is_file())
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free + held < needed_bytes:
        raise UserError(
            f"{folder}: {needed_bytes / 2**30:.1f} GiB are needed on this disk and {free / 2**30:.1f} GiB are free; "
            f"free some, or write {option} to another disk"
        )


def _disk_of(folder: Path) -> int:
    return nearest_folder(folder).stat().st_dev


def _is_manifest(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
