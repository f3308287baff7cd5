"""Lazy reader for checkpoint folders of safetensors files.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`. The safetensors library checks every
header against the size of the file, so sizes claimed by a damaged file are never trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

from qvlm_export.calibrate.checkpoint.files import read_json
from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import UnfinishedError, UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
NOT_FLOAT = "give unquantized weights (float16, bfloat16 or float32)"
LENGTH_BYTES = 8  # the file begins with the length of its header, in this many bytes
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class SafetensorsSource:
    """A TensorSource over a folder of safetensors files.

    rename: maps the key of a tensor in its file to the canonical name, or to None to leave the tensor out. Raises UserError
    naming folder or file when there are no weights, or when a file is damaged or holds a dtype that is not supported.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        self._locations: dict[str, tuple[OpenedFile, str]] = {}  # canonical name -> file and key in it
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._files = [OpenedFile(path) for path in shard_files(folder)]
        for file in self._files:
            self._read_header(file, rename)

    def _read_header(self, opened: OpenedFile, rename: Callable[[str], str | None]) -> None:
        path = opened.path
        try:
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                    tensor_slice = file.get_slice(key)
                    dtype_name = tensor_slice.get_dtype()
                    if dtype_name not in DTYPES:
                        raise UserError(f"{path}: tensor {key} has type {dtype_name}; {NOT_FLOAT}")
                    name = rename(key)
                    if name is None:
                        continue
                    self._locations[name] = (opened, key)
                    self._shapes[name] = tuple(tensor_slice.get_shape())
                    self._dtypes[name] = np.dtype(DTYPES[dtype_name])
            opened.find_tensors()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from error

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor; does not read its data."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """The dtype the tensor is stored in."""
        return self._dtypes[name]

    def files(self) -> list[Path]:
        """Paths of the safetensors files."""
        return [file.path for file in self._files]

    def load(self, name: str) -> np.ndarray:
        """The data, read from disk now.

        Raises UnfinishedError when the file is no longer the one that was opened, UserError when it cannot be read.
        """
        opened, key = self._locations[name]
        opened.check_unchanged()
        array = np.empty(self._shapes[name], self._dtypes[name])
        try:
            opened.read(key, array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            opened.check_unchanged()
            raise UserError(f"{opened.path}: tensor {key} can no longer be read ({error}); was the file changed?") from error
        opened.check_unchanged()
        return array


class OpenedFile:
    """A weight file that is read piece by piece; remembers its state at the start, to detect later changes."""

    def __init__(self, path: Path) -> None:
        check_regular_file(path, "a file of weights")
        self.path, self._state = path, _read_file_state(path)
        self._starts: dict[str, int] = {}

    def find_tensors(self) -> None:
        """Reads where each tensor begins from the header, which the safetensors library must have checked before."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._starts = {name: LENGTH_BYTES + length + entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, key: str, content: memoryview) -> None:
        """Fills `content` with the bytes of a tensor, from its first byte on.

        The file is not mapped, because a mapping takes memory page by page, and truncating a mapped file kills the process.
        Raises OSError when the file cannot be read or ends too early.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[key])
            done = 0
            while done < len(content):
                count = file.readinto(content[done:])
                if not count:
                    raise OSError("the file ends inside")
                done += count

    def check_unchanged(self) -> None:
        """Raises UnfinishedError when the file was written to, replaced or deleted since it was opened."""
        if _read_file_state(self.path) != self._state:
            raise UnfinishedError(f"{self.path}: was changed while it was read; put the file back as it was, or start over")


def _read_file_state(path: Path) -> tuple[int, ...]:
    """Device, inode, size and modification time, which together identify an unchanged file; (-1,) where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return (-1,)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def shard_files(folder: Path) -> list[Path]:
    """Paths of the safetensors files of a checkpoint folder, each of which exists.

    Raises UserError when the index is damaged, names a file outside the folder, or names one that is missing.
    """
    return list_indexed_files(folder, SINGLE_FILE, INDEX_FILE)


def list_indexed_files(folder: Path, single: str, index_name: str, has: Callable[[str], bool] | None = None) -> list[Path]:
    """Paths of the weight files of a folder: `folder / single`, or where there is none those that `index_name` names.

    has: whether the checkpoint has a file of a name; by default, whether the folder holds it. A single file wins over an
    index, which is then a leftover of an older, sharded save: transformers does the same. Raises UserError when there is
    neither, or when the index is damaged, names a file outside the folder, or names one that is missing.
    """
    has = has or (lambda name: (folder / name).exists())
    index = folder / index_name
    if has(single):
        return [folder / single]
    if not has(index_name):
        raise UserError(f"{folder}: holds neither {single} nor {index_name}; give a folder with model weights")
    try:
        weight_map = read_json(index, "a weight index", "download it again")["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a weight index ({error!r}); download it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: names the file {name!r}, which is not in this folder; download the index again")
        if not has(name):
            raise UserError(f"{folder / name}: this shard is named by {index_name} but missing; download it")
    return [folder / name for name in names]
