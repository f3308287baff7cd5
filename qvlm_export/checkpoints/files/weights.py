"""Opens the weights of a folder, in safetensors or torch format. Only headers are read, no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE, SINGLE_FILE, SafetensorsSource
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.torch_source import INDEX_FILE as TORCH_INDEX
from qvlm_export.checkpoints.files.torch_source import SINGLE_FILE as TORCH_SINGLE
from qvlm_export.checkpoints.files.torch_source import TorchSource

# Files that often stand in a folder without model weights: name, what it is, what to do.
_INCOMPLETE_MODELS = (
    ("adapter_config.json", "a LoRA adapter", "merge it into its base model and give that"),
    ("mm_projector.bin", "a pretrained projector alone", "give the folder of the finetuned model"),
)


def open_weights(folder: Path, rename: Callable[[str], str | None]) -> TensorSource:
    """Returns the tensors in `folder`; safetensors are preferred to torch files.

    rename: stored tensor name -> canonical name; None drops the tensor. Raises UserError when there are no weights, or
    damaged ones.
    """
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return SafetensorsSource(folder, rename)
    if (folder / TORCH_SINGLE).exists() or (folder / TORCH_INDEX).exists():
        return TorchSource(folder, rename)
    for name, what, remedy in _INCOMPLETE_MODELS:
        if (folder / name).exists():
            raise UserError(f"{folder}: holds {what} ({name}) and no model weights; {remedy}")
    raise UserError(f"{folder}: holds config.json but no weights ({SINGLE_FILE}, {INDEX_FILE} or {TORCH_SINGLE})")
