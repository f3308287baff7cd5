"""What an export writes where, and whose the files are that stand there already.

A file is ours when a manifest of this export lists it and it is as the manifest says. Names prove nothing: anything else is
the user's, or another export's, and is not replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qvlm_export.calibrate.checkpoint.calibrated import is_as_recorded
from qvlm_export.calibrate.checkpoint.files import WRITING
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest, check_intact, read_manifest

FOLDER_ROLES = ("processor", "calibrated")  # written as folders X.processor and X.calibrated
# Entries of the work folder, and of the state in `--work-dir`, which nobody but an export writes into.
STATE, STAGING, ASIDE, CALIBRATED = ".export", "out", "old", "calibrated"
_SCRATCH_ENTRIES = {STATE, STAGING, ASIDE, CALIBRATED}
LOCK, BEGUN, STAGES, BLOCKS, WRITTEN = "lock", "begun.json", "stages.json", "blocks", "written"
_STATE_ENTRIES = {LOCK, BEGUN, STAGES, BLOCKS, WRITTEN, ASIDE, CALIBRATED, *(f"{WRITING}{name}" for name in (BEGUN, STAGES))}


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
        "prefix": f"{stem}.prefix.safetensors",
        "report": f"{stem}.report.html",
    }


def all_names(out: Path) -> list[str]:
    """Returns the names of all files and folders that an export may write beside its manifest, X.json."""
    return [*file_names(out).values(), *(f"{out.stem}.{role}" for role in FOLDER_ROLES)]


def manifest_path(out: Path) -> Path:
    """Returns the path of the manifest, X.json beside X.plan."""
    return out.with_suffix(".json")


def scratch_folder(out: Path) -> Path:
    """Returns the work folder beside the output."""
    return out.parent / f".{out.stem}.work"


def state_folder(work_dir: Path) -> Path:
    """Returns the folder with the state of calibration, in the work folder or in `--work-dir`."""
    return work_dir / STATE


def check_outputs(out: Path, overwrite: bool) -> None:
    """Raises UserError when a file or folder stands where an output goes, unless it is this export's own and intact.

    overwrite: whether the user insists; what belongs to another export is refused even then. Large files are compared by
    size only, as hashing them would take minutes.
    """
    scratch = scratch_folder(out)
    for folder, entries in ((scratch, _SCRATCH_ENTRIES), (state_folder(scratch), _STATE_ENTRIES)):
        _refuse_foreign_entries(folder, entries, f"--out {out}")
    manifests = [m for m in map(_read_or_none, _find_manifests(out)) if m is not None]
    for path in (manifest_path(out), *(out.parent / name for name in all_names(out))):
        if not os.path.lexists(path):
            continue
        if owner := _find_other_owner(path, out):
            raise UserError(f"--out {out}: would replace {path}, which belongs to the export {owner}; choose another name")
        if not overwrite and (reason := _find_objection(path, out, manifests)):
            raise UserError(
                f"--out {out}: would replace {path}, {reason}; move it away, choose another name, or add --overwrite"
            )


def _find_manifests(out: Path) -> Iterator[Path]:
    """Yields where manifests of this export may be: in place, and in the work folder, when publishing was interrupted."""
    name, scratch = manifest_path(out).name, scratch_folder(out)
    yield from (f / name for f in (out.parent, scratch / STAGING, scratch / ASIDE) if os.path.lexists(f / name))


def _read_or_none(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except UserError:
        return None


def _find_objection(path: Path, out: Path, manifests: list[Manifest]) -> str | None:
    """Returns why a path cannot be shown to be this export's, as the second half of a sentence; None when it can."""
    foreign = "which qvlm-export did not write"
    if path == manifest_path(out):
        return None if _read_or_none(path) is not None else foreign
    reason = foreign
    for manifest in manifests:
        for role, entry in manifest.files.items():
            if entry["name"] == path.name:
                try:
                    check_intact(replace(manifest, path=manifest_path(out)), role)
                except UserError as error:
                    if manifest.path != manifest_path(out):  # one in the work folder, which nobody can see
                        continue
                    reason = f"which was changed since it was exported ({str(error).rpartition(';')[0]})"
                else:
                    return None
    return reason


def _find_other_owner(path: Path, out: Path) -> str | None:
    """Returns the name of the manifest of another export that lists `path`, such as x.json for x.vision.onnx."""
    parts = path.name.split(".")
    for length in range(1, len(parts) + 1):
        other = path.with_name(".".join(parts[:length]) + ".json")
        if other == manifest_path(out) or not other.is_file():
            continue
        manifest = _read_or_none(other)
        if manifest is not None and path.name in {entry["name"] for entry in manifest.files.values()}:
            return other.name
    return None


def find_obsolete(out: Path, names: set[str]) -> list[str]:
    """Returns the names in the place of outputs that an export of `names` does not replace, such as older engines."""
    return [name for name in all_names(out) if name not in names and os.path.lexists(out.parent / name)]


def check_work_dir_contents(folder: Path, out: Path, overwrite: bool) -> None:
    """Raises UserError when working in `--work-dir` would replace files that are not an earlier calibration's own."""
    option = f"--work-dir {folder}"
    places = [scratch_folder(out), *(out.parent / name for name in all_names(out))]
    if any(place.resolve() in (folder.resolve(), *folder.resolve().parents) for place in places):
        raise UserError(f"{option}: lies where the export itself goes; choose another folder")
    _refuse_foreign_entries(state_folder(folder), _STATE_ENTRIES, option)
    calibrated = folder / CALIBRATED
    if os.path.lexists(calibrated) and not overwrite and not is_empty(calibrated) and not is_as_recorded(calibrated):
        raise UserError(
            f"{option}: {calibrated} holds what qvlm-export did not write, or what was changed since; choose another folder "
            "or add --overwrite"
        )


def is_empty(folder: Path) -> bool:
    """Returns whether a path is a folder without entries."""
    return folder.is_dir() and not any(folder.iterdir())


def _refuse_foreign_entries(folder: Path, own: set[str], option: str) -> None:
    """Raises UserError when a folder that only exports write into is no folder, or holds anything else."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{option}: {folder} is no folder, but an export works there; move it away")
    if foreign := {path.name for path in folder.iterdir()} - own:
        raise UserError(
            f"{option}: {folder / min(foreign)} is not qvlm-export's, but lies in the folder it works in; move it away"
        )
