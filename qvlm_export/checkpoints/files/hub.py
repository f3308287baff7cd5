"""Finds the files of a checkpoint: a local folder, an alias, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.files import read_json
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.aliases import ALIASES, TINY
from qvlm_export.checkpoints.files.snapshot import find_snapshot
from qvlm_export.checkpoints.files.source_kinds import explain_files
from qvlm_export.checkpoints.files.weights import Location

NO_REVISION = re.compile(r"^[/-]|\.\.|[\x00-\x20\x7f~^:?*\[\\]|^$|/$")  # what names of branches and tags cannot have in git


def find_checkpoint(model: str, revision: str | None = None, option: str = "--model") -> Location:
    """Returns where `model` is: an alias, a path, or a Hugging Face id, whose small files are downloaded to the cache.

    revision: a branch, tag or commit of the repository; None for its main branch. option: the name of the option, which
    begins error messages. Raises UserError when there is no such model.
    """
    path = Path(str(files("qvlm_export") / "tiny")) if model == TINY else Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"--revision {revision}: {model} is a local folder; leave it out, or give a Hugging Face id")
        return Location(path)
    if revision is not None and NO_REVISION.search(revision):
        raise UserError(f"--revision {revision!r}: is no name of a branch, tag or commit")
    if path.exists():
        raise UserError(f"{option} {model}: is a file; give the checkpoint's folder")
    repository = ALIASES[model].repository if model in ALIASES else model
    if repository.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"{option} {model}: no such folder, and neither an alias (see --list-models) nor a Hugging Face id")
    snapshot = find_snapshot(repository, revision, f"{option} {model}")
    return Location(snapshot.folder, snapshot)


def read_config(folder: Path, name: str = "config.json", what: str = "a LLaVA") -> dict[str, Any]:
    """Returns the JSON file `name` in `folder` as a dictionary. what: the kind of model that the folder should hold.

    Raises UserError when the file is missing or not a JSON object.
    """
    path = folder / name
    try:
        content = read_json(path, "readable as JSON", "download it again")
    except FileNotFoundError as error:
        if (found := explain_files(path.name for path in folder.glob("*"))) is not None:
            raise UserError(f"{folder}: holds {found[0]} and no {name}; {found[1]}") from error
        raise UserError(f"{folder}: holds no {name}, so it is no checkpoint; give the folder of {what}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content
