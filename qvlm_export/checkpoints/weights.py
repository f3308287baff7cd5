"""Opens the weights of a folder, whatever format they are in. No weight is read here; only headers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE, SINGLE_FILE, SafetensorsSource
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.torch_source import INDEX_FILE as TORCH_INDEX
from qvlm_export.checkpoints.torch_source import SINGLE_FILE as TORCH_SINGLE
from qvlm_export.checkpoints.torch_source import TorchSource

# What people have beside, or instead of, a whole checkpoint: file, what it is, what to do.
_PARTS = (
    ("adapter_config.json", "a LoRA adapter", "merge it into its base model and give that"),
    ("mm_projector.bin", "a pretrained projector alone", "give the folder of the finetuned model"),
)


def open_weights(folder: Path, rename: Callable[[str], str | None]) -> TensorSource:
    """The tensors of a folder by new names (None drops one). Raises UserError when there are none, or damaged ones."""
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return SafetensorsSource(folder, rename)
    if (folder / TORCH_SINGLE).exists() or (folder / TORCH_INDEX).exists():
        return TorchSource(folder, rename)
    for name, what, cure in _PARTS:
        if (folder / name).exists():
            raise UserError(f"{folder}: holds {what} ({name}) and no model weights; {cure}")
    raise UserError(f"{folder}: holds config.json but no weights ({SINGLE_FILE}, {INDEX_FILE} or {TORCH_SINGLE})")
