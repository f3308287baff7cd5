"""How an export gets to its place: renames."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from qvlm_export.pipeline.planning.preflight import nearest_folder

FULL_DISK_BYTES = 2**20  # with less than this free, a failure is put down to the disk
FOLDER_ROLES = ("processor", "calibrated")  # written as folders X.processor and X.calibrated


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Safetensors says it in words, numpy writes short without an errno, and TensorRT gives no reason at all."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(nearest_folder(folder)).free < FULL_DISK_BYTES


def file_names(out: Path) -> dict[str, str]:
    """File names by role."""
    stem = out.stem
    return {
        "language_plan": f"{stem}.plan",
        "vision_plan": f"{stem}.vision.plan",
        "language_onnx": f"{stem}.onnx",
        "language_data": f"{stem}.onnx.data",
        "vision_onnx": f"{stem}.vision.onnx",
        "vision_data": f"{stem}.vision.onnx.data",
        "report": f"{stem}.report.html",
    }


def manifest_path(out: Path) -> Path:
    return out.with_suffix(".json")


def publish(stage_dir: Path, out: Path, names: Collection[str]) -> None:
    """Moves the finished files beside each other; the old manifest goes first and the new one comes last.

    names: of all files and folders of the new export, some of which an interrupted call may have moved. What an older
    export had and the new one has not, such as engines, goes too.
    """
    manifest = manifest_path(out)
    manifest.unlink(missing_ok=True)
    finished = [path for name in sorted(names) if (path := stage_dir / name).exists()] + [stage_dir / manifest.name]
    old = {*file_names(out).values(), *(f"{out.stem}.{role}" for role in FOLDER_ROLES)}
    for name in old - set(names):
        _remove(out.parent / name)
    for path in finished:
        target = out.parent / path.name
        if path.is_dir() or target.is_dir():
            _remove(target)
        os.replace(path, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
