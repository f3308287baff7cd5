"""Checkpoint folders of safetensors files, read lazily. numpy only.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`. The safetensors library checks every
header against the file's size, so sizes claimed by a damaged file are never trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

from qvlm_export.calibrate.errors import UnfinishedError, UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8  # before the header, of its length
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class SafetensorsSource:
    """A TensorSource over a folder. `rename` maps stored names to canonical ones (None drops a tensor)."""

    def __init__(self, folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        self._where: dict[str, tuple[OpenedFile, str]] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, np.dtype] = {}
        self._files = [OpenedFile(path) for path in shard_files(folder)]
        for file in self._files:
            self._read_header(file, rename)

    def _read_header(self, opened: OpenedFile, rename: Callable[[str], str | None]) -> None:
        path = opened.path
        try:
            with safe_open(path, "np") as file:
                for stored in file.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                    piece = file.get_slice(stored)
                    kind = piece.get_dtype()
                    if kind not in _DTYPES:
                        raise UserError(f"{path}: tensor {stored} has type {kind}, which is not supported; convert it")
                    name = rename(stored)
                    if name is None:
                        continue
                    self._where[name] = (opened, stored)
                    self._shape[name] = tuple(piece.get_shape())
                    self._dtype[name] = np.dtype(_DTYPES[kind])
            opened.find_tensors()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from error

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def dtype(self, name: str) -> np.dtype:
        return self._dtype[name]

    def files(self) -> list[Path]:
        return [file.path for file in self._files]

    def load(self, name: str) -> np.ndarray:
        """Raises UnfinishedError when the file is no longer the one that was opened."""
        opened, stored = self._where[name]
        opened.check_unchanged()
        array = np.empty(self._shape[name], self._dtype[name])
        try:
            opened.read(stored, array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            opened.check_unchanged()
            raise UserError(
                f"{opened.path}: tensor {stored} can no longer be read ({error}); was the file changed?"
            ) from error
        opened.check_unchanged()
        return array


class OpenedFile:
    """A file as it was when it was opened first."""

    def __init__(self, path: Path) -> None:
        self.path, self._facts = path, _facts(path)
        self._starts: dict[str, int] = {}

    def find_tensors(self) -> None:
        """Learns where the file's tensors begin, of a header that the safetensors library found to be right."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._starts = {name: LENGTH_BYTES + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, stored: str, content: memoryview) -> None:
        """Fills `content`. Not mapped: memory would be taken page by page, and a new end kill the process.

        Raises OSError when the file cannot be read or ends too early.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[stored])
            done = 0
            while done < len(content):
                count = file.readinto(content[done:])
                if not count:
                    raise OSError("the file ends inside")
                done += count

    def check_unchanged(self) -> None:
        """Raises UnfinishedError when it was written to, replaced or deleted since."""
        if _facts(self.path) != self._facts:
            raise UnfinishedError(f"{self.path}: was changed while it was read; put the file back as it was, or begin anew")


def _facts(path: Path) -> tuple[int, ...]:
    try:
        facts = path.stat()
    except OSError:
        return (-1,)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, each checked to be there.

    Raises UserError when the index is damaged, names a file outside the folder, or names one that is missing.
    """
    return indexed_files(folder, SINGLE_FILE, INDEX_FILE)


def indexed_files(folder: Path, single: str, index_name: str) -> list[Path]:
    """The weight files named by `folder / index_name`, or `folder / single` where there is no index."""
    index = folder / index_name
    if not index.exists():
        if not (folder / single).exists():
            raise UserError(f"{folder}: holds neither {single} nor {index_name}; give a folder with model weights")
        return [folder / single]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a weight index ({error!r}); download it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: names the file {name!r}, which is not in this folder; download the index again")
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: this shard is named by {index_name} but missing; download it")
    return [folder / name for name in names]
