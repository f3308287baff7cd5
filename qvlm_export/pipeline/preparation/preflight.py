"""Preflight checks of the places that an export writes to: the output path, the work folder, and the room on their disks.

Nothing is written but nameless temporary files, so that a refused export leaves no trace.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm_export.calibrate.checkpoint.files import is_utf8, printable
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.pipeline.preparation.outputs import (
    check_outputs,
    check_work_dir_contents,
    scratch_folder,
    state_folder,
)

PLAN_OVERHEAD_BYTES = 8 * 2**20  # kernels and program text of a TensorRT-RTX plan, whatever the size of the model
MAX_NAME_BYTES = 230  # of the 255 that file systems allow; the rest is for suffixes such as .vision.onnx.data.tmp


@dataclass(frozen=True)
class Disk:
    """The most bytes that an export has on disk at a time.

    out_bytes: ONNX data and plans, on the disk of the output. work_bytes: the calibrated checkpoint and the state of
    calibration, in the work folder.
    """

    out_bytes: int
    work_bytes: int

    @property
    def bytes(self) -> int:
        """The bytes in both places together."""
        return self.out_bytes + self.work_bytes


def disk_needed(
    sizes: Sizes,
    *,
    calibrates: bool,
    builds: bool,
    activations_bytes: int = 0,
    sensitivity_bytes: int = 0,
    dense_bytes: int = 0,
) -> Disk:
    """Returns the disk space that an export needs.

    sizes: of all weights. calibrates, builds: whether linears are quantized, and whether engines are built.
    activations_bytes: of the activation cache on disk. sensitivity_bytes: of what is on disk while sensitivities are
    measured, which is before the first block is calibrated. dense_bytes: what the calibrated checkpoint takes more than
    graphs, because linears of tower and projector are dense in it.
    """
    plans = sizes.quantized_bytes + 2 * PLAN_OVERHEAD_BYTES if builds else 0
    work = max(sizes.quantized_bytes + dense_bytes + activations_bytes, sensitivity_bytes) if calibrates else 0
    return Disk(sizes.quantized_bytes + plans, work)


def check_out(out: Path, overwrite: bool = False) -> None:
    """Raises UserError when `out` is not a .plan path in a writable folder, or when an output would replace a foreign file.

    overwrite: whether foreign files may be replaced.
    """
    shown = f"--out {out}"
    if out.suffix != ".plan":
        raise UserError(f"{shown}: must end in .plan; the other files are named after it")
    if not is_utf8(str(out.absolute())):
        raise UserError(f"{shown}: the path is not UTF-8, which ONNX needs; choose another place or name")
    if printable(out.name) != out.name:  # it goes into the manifest, and into every message
        raise UserError(f"{shown}: the name holds a control character; choose another")
    if "\\" in out.name or ".." in out.name:
        raise UserError(f"{shown}: the name holds a backslash or two dots, which ONNX takes for a path; choose another")
    if len(os.fsencode(out.name)) > MAX_NAME_BYTES:
        raise UserError(f"{shown}: the name is too long, as the other files append to it; shorten it")
    check_writable(out.parent, shown)
    if out.is_dir():
        raise UserError(f"{shown}: is a folder; name a file in it")
    check_outputs(out, overwrite)


def check_work_dir(folder: Path, out: Path, overwrite: bool = False) -> None:
    """Raises UserError when `folder` cannot be written to, or when working there would replace foreign files."""
    check_writable(folder, f"--work-dir {folder}")
    check_work_dir_contents(folder, out, overwrite)


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError when `folder` cannot be written to or, where it does not exist, cannot be made. Does not make it.

    option: the option that names the folder, for the message.
    """
    if "\0" in str(folder):
        raise UserError(f"{option}: no folder can have this name; choose another")
    try:
        with tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass
    except OSError as error:
        raise UserError(f"{option}: its folder cannot be written ({error.strerror}); choose another") from error


def nearest_folder(folder: Path) -> Path:
    """Returns `folder`, or the closest of its parents that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_disk(disk: Disk, out: Path, work_dir: Path | None, cache: Path | None = None, download_bytes: int = 0) -> None:
    """Raises UserError when a disk has too little room; what goes to the same disk adds up.

    cache: the folder that `download_bytes` of weights are downloaded to, or None. What an unfinished export to the same
    place occupies counts as free, as a resumed one uses it and a new one removes it.
    """
    needs = [
        _Need(out.parent, disk.out_bytes, scratch_folder(out), "write --out to another disk"),
        _Need(
            work_dir or out.parent,
            disk.work_bytes,
            scratch_folder(out) if work_dir is None else state_folder(work_dir),
            "write --work-dir to another disk",
        ),
    ]
    if cache is not None:
        remedy = "let HF_HOME name a folder on another disk for downloads"
        needs.append(_Need(cache, download_bytes, None, remedy))
    for device in dict.fromkeys(_get_disk(need.folder) for need in needs):
        _check_room([need for need in needs if _get_disk(need.folder) == device])


@dataclass(frozen=True)
class _Need:
    """Bytes needed on the disk of a folder. reusable: a folder whose files count as free. remedy: against too little."""

    folder: Path
    bytes: int
    reusable: Path | None
    remedy: str


def _check_room(needs: Sequence[_Need]) -> None:
    """Raises UserError when the disk that all `needs` are on has too little room."""
    reusable = {need.reusable for need in needs if need.reusable is not None}
    reusable_bytes = sum(path.stat().st_size for own in reusable for path in own.rglob("*") if path.is_file())
    needed_bytes, folder = sum(need.bytes for need in needs), needs[0].folder
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free + reusable_bytes < needed_bytes:
        remedies = dict.fromkeys(need.remedy for need in needs if need.bytes)
        raise UserError(
            f"{folder}: {needed_bytes / 2**30:.1f} GiB are needed on this disk and {free / 2**30:.1f} GiB are free; "
            f"free some, or {', or '.join(remedies)}"
        )


def _get_disk(folder: Path) -> int:
    return nearest_folder(folder).stat().st_dev
