"""Finds the folder of a checkpoint: a local folder, an alias, or a repository on the Hugging Face hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qvlm_export.calibrate.checkpoint.files import read_json
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.aliases import ALIASES, TINY

_DOWNLOAD = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
_DOWNLOAD_TORCH = ["pytorch_model*.bin"]  # only where a repository has no safetensors


def find_folder(model: str, option: str = "--model") -> Path:
    """Returns the folder of `model`: an alias, a path, or a Hugging Face id, which is downloaded or taken from the cache.

    option: the name of the option, which begins error messages. Raises UserError when there is no such model.
    """
    if model == TINY:
        return Path(str(files("qvlm_export") / "tiny"))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{option} {model}: is a file; give the checkpoint's folder")
    repository = ALIASES[model].repository if model in ALIASES else model
    if repository.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"{option} {model}: no such folder, and neither an alias (see --list-models) nor a Hugging Face id")
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_DOWNLOAD))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=_DOWNLOAD_TORCH))
        return folder
    except HFValidationError as error:
        raise UserError(f"{option} {model}: no such folder, and not a Hugging Face id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{option} {model}: cannot be downloaded from Hugging Face ({first_line(error)}); "
            "check the name and the network, or give a local folder"
        ) from error


def read_config(folder: Path, name: str = "config.json", what: str = "a LLaVA") -> dict[str, Any]:
    """Returns the JSON file `name` in `folder` as a dictionary. what: the kind of model that the folder should hold.

    Raises UserError when the file is missing or not a JSON object.
    """
    path = folder / name
    try:
        content = read_json(path, "readable as JSON", "download it again")
    except FileNotFoundError as error:
        raise UserError(f"{folder}: holds no {name}, so it is no checkpoint; give the folder of {what}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class when it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
