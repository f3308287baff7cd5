"""Copies of an export, and changes to the weights in its ONNX files that nothing but a comparison can notice."""

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
    """A copy of an export in a new folder; returns its plan (which need not exist)."""
    shutil.copytree(plan.parent, folder)
    return folder / plan.name


def edit_weight(graph: Path, name: str, dtype: type, change: Callable[[np.ndarray], object]) -> None:
    """Changes the stored data of an initializer in place; `change` gets it flat, as `dtype` (uint8: its bytes)."""
    tensor = ir.load(graph).graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    path = graph.parent / tensor.location
    stored = bytearray(path.read_bytes())
    change(np.frombuffer(stored, np.uint8)[tensor.offset : tensor.offset + tensor.length].view(dtype))
    path.write_bytes(stored)
    reseal(path)


def reseal(path: Path) -> None:
    """Makes the manifest beside `path` agree with it again, as if the export itself had gone wrong."""
    manifest = path.parent / (path.name.split(".")[0] + ".json")
    if not manifest.exists():  # files that --save-polygraphy wrote have none
        return
    content = json.loads(manifest.read_text(encoding="utf-8"))
    for entry in content["files"].values():
        if entry["name"] == path.name:
            entry.update(describe_file(path))
    manifest.write_text(json.dumps(seal(content)), encoding="utf-8")


def edit_scale(path: Path, name: str, factor: float) -> None:
    """Multiplies a tensor of a safetensors file; the manifest is left as it is."""
    tensors = load_file(path)
    tensors[name] = (tensors[name] * factor).astype(tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})


def reseal_folder(folder: Path) -> None:
    """As `reseal`, for a folder of the export."""
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
