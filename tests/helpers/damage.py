"""Copies exports and changes their weights or scales so that only a comparison of values can notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from qvlm_export.engines.manifest import describe_file, describe_folder, seal


def copy_export(plan: Path, folder: Path) -> Path:
    """Copies an export into a new folder; returns the path of its plan, which need not exist."""
    shutil.copytree(plan.parent, folder)
    return folder / plan.name


def edit_weight(graph: Path, name: str, dtype: type, change: Callable[[np.ndarray], object]) -> None:
    """Changes the stored data of an initializer.

    change: edits the flat array of `dtype` in place; uint8 stands for the raw bytes.
    """
    tensor = ir.load(graph).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    path = graph.parent / tensor.location
    data = bytearray(path.read_bytes())
    change(np.frombuffer(data, np.uint8)[tensor.offset : tensor.offset + tensor.length].view(dtype))
    path.write_bytes(data)
    reseal(path)


def reseal(path: Path) -> None:
    """Updates the hash of `path` in the manifest beside it, as if the export itself had written the wrong data."""
    manifest = path.parent / (path.name.split(".")[0] + ".json")
    if not manifest.exists():  # files that --save-polygraphy wrote have none
        return
    content = json.loads(manifest.read_text(encoding="utf-8"))
    for entry in content["files"].values():
        if entry["name"] == path.name:
            entry.update(describe_file(path))
    manifest.write_text(json.dumps(seal(content)), encoding="utf-8")


def edit_scale(path: Path, name: str, factor: float) -> None:
    """Multiplies a tensor of a safetensors file by `factor`, without an update of the manifest."""
    tensors = load_file(path)
    tensors[name] = (tensors[name] * factor).astype(tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})


def reseal_folder(folder: Path) -> None:
    """Updates the hash of a folder of the export in the manifest, as `reseal` does for a file."""
    manifest = folder.with_suffix(".json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    for role, entry in content["files"].items():
        if entry["name"] == folder.name:
            content["files"][role] = describe_folder(folder)
    manifest.write_text(json.dumps(seal(content)), encoding="utf-8")


def zero(array: np.ndarray) -> None:
    array[:] = 0


def double_first(array: np.ndarray) -> None:
    array[0] *= 2


def double(array: np.ndarray) -> None:
    array *= 2


def times_one_and_a_half(array: np.ndarray) -> None:
    array *= 1.5
