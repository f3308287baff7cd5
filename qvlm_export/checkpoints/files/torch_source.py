"""Reads checkpoints in torch's pickle format (`pytorch_model*.bin`) with weights_only, so that no code in them is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import httpx2
import ml_dtypes
import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.safetensors_source import OpenedFile, list_indexed_files
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError

SINGLE_FILE, INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"


class TorchSource:
    """A TensorSource over `pytorch_model*.bin`. Files are mapped into memory, so opening them reads no weights.

    rename: stored tensor name -> canonical name; None drops the tensor. Raises UserError for a missing or damaged file, and
    for content other than plain tensors.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: dict[str, OpenedFile] = {}
        for path in list_indexed_files(folder, SINGLE_FILE, INDEX_FILE):
            file = OpenedFile(path)
            # Files written before torch 1.6 are not zip files and cannot be mapped.
            for stored_name, tensor in read_tensors(path, str(path), mmap=zipfile.is_zipfile(path)).items():
                name = rename(stored_name)
                if name is not None:
                    self._tensors[name], self._files[name] = tensor, file

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """Returns the numpy dtype of a tensor, bfloat16 being that of ml_dtypes."""
        return numpy_dtype(self._tensors[name])

    def files(self) -> list[Path]:
        """Returns the files that tensors are read from."""
        return [file.path for file in dict.fromkeys(self._files.values())]

    def load(self, name: str) -> np.ndarray:
        """Reads a tensor. Raises UserError when its file was changed since it was opened."""
        self._files[name].check_unchanged()
        tensor = self._tensors[name].detach()  # a stored Parameter requires gradients, which numpy() refuses
        if tensor.dtype == torch.bfloat16:
            bits: np.ndarray = tensor.view(torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: np.ndarray = tensor.numpy()
        return array


def numpy_dtype(tensor: torch.Tensor) -> np.dtype:
    """Returns the numpy dtype that corresponds to a tensor's, bfloat16 being that of ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def read_tensors(file: Path | BinaryIO, where: str, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Returns the tensors of a torch checkpoint by name. where: names the file, for errors.

    Raises UserError when it is damaged, or holds anything but plain tensors.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{where}: is damaged or holds more than tensors, and was not opened, as it could run code; "
            "download it again, or convert it to safetensors where you trust it"
        ) from error
    except httpx2.HTTPError:  # the file lies on the Hub
        raise
    except DAMAGED_FILE_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: not a readable torch checkpoint ({reason}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds no dictionary of tensors; give a folder with model weights")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise UserError(f"{where}: {name!r} is no plain tensor; give a folder with unquantized model weights")
    return content


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
