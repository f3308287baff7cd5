"""Atomic publishing: moves the finished files of an export to their places by renames, the manifest last.

An export without a manifest is incomplete, so that a killed process leaves nothing that looks finished.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from qvlm_export.pipeline.preparation.preflight import nearest_folder

FULL_DISK_BYTES = 2**20  # with less than this free, a full disk is taken to be the cause of a failure
FOLDER_ROLES = ("processor", "calibrated")  # written as folders X.processor and X.calibrated


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Returns whether a full disk is the cause of `error`, raised while writing to `folder`.

    Libraries report it differently: safetensors in the text of its message, numpy by an OSError without errno, and TensorRT
    not at all. So the free space of the disk is looked at, too.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(nearest_folder(folder)).free < FULL_DISK_BYTES


def file_names(out: Path) -> dict[str, str]:
    """Returns the name of every file of the export `--out out`, by its role in the manifest."""
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
    """Returns the path of the manifest, X.json beside X.plan."""
    return out.with_suffix(".json")


def publish(staging: Path, out: Path, names: Collection[str]) -> None:
    """Moves the finished files from `staging` to the folder of `out`.

    The manifest of an older export is removed first and the new one is moved last. Files of an older export that the new one
    does not replace, such as engines, are removed.
    names: the names of all files and folders of the new export. An interrupted call may have moved some of them already.
    """
    manifest = manifest_path(out)
    manifest.unlink(missing_ok=True)
    finished = [path for name in sorted(names) if (path := staging / name).exists()] + [staging / manifest.name]
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
