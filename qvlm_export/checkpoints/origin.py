"""Where an exported checkpoint came from, as the manifest records it, and how it is found again.

Of a model on the Hub, repository, commit and the hashes of the weights' files are recorded; of a local folder its name and
the sizes. No path is recorded, as exports are given away: a folder is looked for beside the export and in the current one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.checkpoints.files.aliases import TINY
from qvlm_export.checkpoints.files.headers import Download, find_downloads
from qvlm_export.checkpoints.files.snapshot import SHA256_DIGITS, find_blob, find_origin

PACKAGE, HUB, FOLDER = "package", "hub", "folder"  # where a checkpoint can come from


def describe_origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the manifest's entry `model`, of JSON values.

    Its keys: `name` (the repository, or the name of the folder), `source` (package, hub or folder), `model_type`, the
    `repository` and `commit` of a model on the Hub, and `weights`, the files with their sizes and, from the Hub, their
    sha256. A vision tower with files of its own is described likewise under `tower`.
    """
    downloads = {download.path: download for download in find_downloads(checkpoint.source)}
    folders = dict.fromkeys((checkpoint.folder, *(path.parent for path in checkpoint.source.files())))
    own, *others = (_describe_folder(folder, checkpoint, downloads) for folder in folders)
    if checkpoint.name == TINY:
        own |= {"name": TINY, "source": PACKAGE}
    model = {**own, "model_type": str(checkpoint.hf_config.model_type)}
    return model | ({"tower": others[0]} if others else {})


def _describe_folder(folder: Path, checkpoint: Checkpoint, downloads: Mapping[Path, Download]) -> dict[str, Any]:
    origin = find_origin(folder)
    files = sorted(path for path in checkpoint.source.files() if path.parent == folder)
    weights = [_describe_file(path, downloads.get(path)) for path in files]
    if origin is None:
        return {"name": folder.resolve().name, "source": FOLDER, "weights": weights}
    return {"name": origin[0], "source": HUB, "repository": origin[0], "commit": origin[1], "weights": weights}


def _describe_file(path: Path, download: Download | None) -> dict[str, Any]:
    size = path.stat().st_size if download is None else download.size
    blob = (find_blob(path) or "") if download is None else download.blob.name
    return {"name": path.name, "bytes": size} | ({"sha256": blob} if len(blob) == SHA256_DIGITS else {})


def open_exported(model: Mapping[str, Any], near: Path) -> Checkpoint:
    """Opens the checkpoint that an export was made from.

    model: the entry of its manifest. near: the folder of the manifest. Raises UserError when the checkpoint is not found, or
    has other weights than were exported.
    """
    name, source = str(model["name"]), model.get("source")
    if source == HUB:
        checkpoint = open_checkpoint(str(model["repository"]), str(model["commit"]))
    elif source == FOLDER:
        checkpoint = open_checkpoint(str(_find_folder(name, near)))
    else:  # the package's own; or an export of version 0.9 or older, which recorded what was typed
        checkpoint = open_checkpoint(name)
    found = describe_origin(checkpoint)
    for entry, recorded in ((found, model), (found.get("tower", {}), model.get("tower", {}))):
        _check_weights(entry, recorded)
    return checkpoint


def _find_folder(name: str, near: Path) -> Path:
    places = (Path(), near, near.parent)
    found = [place / name for place in places if Path(name).name == name and (place / name / "config.json").is_file()]
    if not found:
        raise UserError(f"--model {name}: no such folder here or beside the export")
    return found[0]


def _check_weights(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Raises UserError when files have another name, size or, where both are known, another hash than was recorded."""
    actual = {file["name"]: file for file in found.get("weights", ())}
    for file in recorded.get("weights", ()):
        other = actual.get(file["name"], {})
        hashes = {entry["sha256"] for entry in (file, other) if "sha256" in entry}
        if other.get("bytes") != file["bytes"] or len(hashes) > 1:
            raise UserError(f"--model {found.get('name', recorded['name'])}: its {file['name']} is not the exported one")
