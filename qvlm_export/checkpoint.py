"""Opens a checkpoint: finds its folder, reads its configuration, and checks every tensor's name and shape.

No weight is read here; only headers are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import LlavaConfig

from calibrate.errors import UserError
from calibrate.safetensors_source import INDEX_FILE, SINGLE_FILE, SafetensorsSource
from calibrate.tensors import TensorSource
from engines.config import ModelConfig
from engines.graph import TIED_HEAD, expected_shapes
from qvlm_export.families import ALIASES, TINY, find_family, model_config, renamer
from qvlm_export.torch_source import SINGLE_FILE as TORCH_SINGLE
from qvlm_export.torch_source import TorchSource

_DOWNLOAD = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
_DOWNLOAD_TORCH = ["pytorch_model*.bin"]  # only where a repository has no safetensors
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype("bfloat16"))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `config_json` is config.json as it stands, `hf_config` as transformers completes it."""

    name: str
    folder: Path
    config_json: dict[str, Any]
    hf_config: LlavaConfig
    config: ModelConfig
    source: TensorSource


def open_checkpoint(model: str) -> Checkpoint:
    """Opens `--model`: an alias, a local folder, or a Hugging Face id.

    Raises UserError for whatever keeps it from being a LLaVA with complete, well-formed weights.
    """
    folder = find_folder(model)
    config_json = read_config(folder)
    family = find_family(config_json.get("model_type"), str(folder / "config.json"))
    try:
        hf_config = LlavaConfig.from_dict(config_json)
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder / 'config.json'}: not a valid configuration ({error}); download it again") from error
    config = model_config(hf_config, str(folder / "config.json"))
    rename = renamer(family)
    has_safetensors = (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()
    has_torch = (folder / TORCH_SINGLE).exists() or (folder / f"{TORCH_SINGLE}.index.json").exists()
    if not has_safetensors and not has_torch:
        raise UserError(f"{folder}: holds config.json but no weights ({SINGLE_FILE}, {INDEX_FILE} or {TORCH_SINGLE})")
    source: TensorSource = SafetensorsSource(folder, rename) if has_safetensors else TorchSource(folder, rename)
    check_tensors(source, config, folder)
    return Checkpoint(model, folder, config_json, hf_config, config, source)


def find_folder(model: str) -> Path:
    """The folder of an alias, a path or a Hugging Face id (downloaded, or taken from its cache)."""
    if model == TINY:
        return Path(str(files("qvlm_export") / "tiny"))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"--model {model}: is a file; give the checkpoint's folder")
    repository = ALIASES.get(model, model)
    if repository.count("/") != 1 or model.startswith((".", "/", "~")):
        known = ", ".join((TINY, *ALIASES))
        raise UserError(f"--model {model}: no such folder, and neither an alias ({known}) nor a Hugging Face id")
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_DOWNLOAD))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=_DOWNLOAD_TORCH))
        return folder
    except HFValidationError as error:
        raise UserError(f"--model {model}: no such folder, and not a Hugging Face id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"--model {model}: cannot be downloaded from Hugging Face ({_first_line(error)}); "
            "check the name and the network, or give a local folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises UserError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: holds no config.json, so it is no checkpoint; give the folder of a LLaVA")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({_first_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content


def check_tensors(source: TensorSource, config: ModelConfig, folder: Path) -> None:
    """Every tensor the graphs need must be there, of the right shape and of a float type."""
    for name, wanted in expected_shapes(config).items():
        if name not in source:
            if name == TIED_HEAD:
                raise UserError(f"{folder}: lacks {name} though config.json does not tie it to the embeddings")
            raise UserError(f"{folder}: lacks the tensor {name}; the checkpoint is incomplete, download it again")
        if source.shape(name) != wanted:
            raise UserError(
                f"{folder}: {name} has shape {list(source.shape(name))}, but config.json says {list(wanted)}; "
                "weights and config do not belong together"
            )
        if source.dtype(name) not in _FLOATS:
            raise UserError(
                f"{folder}: {name} is {source.dtype(name)}; give an unquantized checkpoint (float16, bfloat16 or float32)"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
