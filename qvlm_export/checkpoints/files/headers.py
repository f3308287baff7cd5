"""The tensors of weights that are not downloaded yet: names, shapes and dtypes, from the headers of their files.

Headers are foreign data: sizes and types are checked before they are used, as the safetensors library does with whole files.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import httpx2
import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.safetensors_source import DTYPES, LENGTH_BYTES, NOT_FLOAT
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.hub_errors import first_line, hub_errors
from qvlm_export.checkpoints.files.ranges import open_remote
from qvlm_export.checkpoints.files.snapshot import Snapshot
from qvlm_export.checkpoints.files.torch_source import numpy_dtype, read_tensors

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
METADATA = "__metadata__"

Header = dict[str, tuple[tuple[int, ...], np.dtype]]  # stored name -> shape and dtype
HeaderReader = Callable[[BinaryIO, int, str], Header]


@dataclass(frozen=True)
class Download:
    """A weight file that is not in the cache yet."""

    snapshot: Snapshot
    name: str

    @property
    def path(self) -> Path:
        """Where the file will be in the cache."""
        return self.snapshot.folder / self.name

    @property
    def partial(self) -> Path:
        """The file that holds what was downloaded until now."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def blob(self) -> Path:
        """The file that `path` links to, named after its content."""
        return self.snapshot.folder.parents[1] / "blobs" / self.snapshot.files[self.name].blob

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.snapshot.files[self.name].size


@runtime_checkable
class NeedsDownloads(Protocol):
    """A TensorSource that cannot load before files are downloaded."""

    def downloads(self) -> tuple[Download, ...]:
        """Returns the files."""
        ...


def find_downloads(source: TensorSource) -> tuple[Download, ...]:
    """Returns the files that must be downloaded before `source` can load every tensor."""
    return source.downloads() if isinstance(source, NeedsDownloads) else ()


class HeaderSource:
    """A TensorSource that knows its tensors but cannot load them.

    names: the weight files, of which at least one is not in the cache. read_header: see `read_safetensors_header`.
    rename: stored tensor name -> canonical name; None drops the tensor. Raises UserError when a header is damaged or the Hub
    does not give it.
    """

    def __init__(
        self, snapshot: Snapshot, names: Sequence[str], read_header: HeaderReader, rename: Callable[[str], str | None]
    ) -> None:
        self._snapshot, self._names = snapshot, tuple(names)
        self._tensors: Header = {}
        for name in names:
            where = f"{snapshot.repository}/{name}"
            with hub_errors(where, snapshot.repository), _open(snapshot, name) as file:
                header = read_header(file, snapshot.files[name].size, where)
            for stored, tensor in header.items():
                canonical = rename(stored)
                if canonical is not None:
                    self._tensors[canonical] = tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._tensors[name][0]

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor."""
        return self._tensors[name][1]

    def files(self) -> list[Path]:
        """Returns the paths in the cache, where some files are still missing."""
        return [self._snapshot.folder / name for name in self._names]

    def downloads(self) -> tuple[Download, ...]:
        """Returns the files that are missing in the cache."""
        downloads = (Download(self._snapshot, name) for name in self._names)
        return tuple(download for download in downloads if not download.path.exists())

    def load(self, name: str) -> np.ndarray:
        """Raises RuntimeError, as weights are downloaded before they are loaded."""
        raise RuntimeError(f"{name}: its file is not downloaded")


def _open(snapshot: Snapshot, name: str) -> BinaryIO:
    path = snapshot.folder / name
    return path.open("rb") if path.exists() else open_remote(snapshot, name)


def read_safetensors_header(file: BinaryIO, size: int, where: str) -> Header:
    """Returns shape and dtype of every tensor, by stored name.

    size: bytes of the whole file. Raises UserError for what the safetensors library would refuse once it has the whole file.
    """
    try:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError(f"its header would have {length} bytes")
        content = json.loads(file.read(length))
        if not isinstance(content, dict):
            raise ValueError("its header is no JSON object")
        content.pop(METADATA, None)
        entries = {name: _read_entry(name, entry, where) for name, entry in content.items()}
        end = 0
        for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if begin != end:
                raise ValueError(f"{name} begins at byte {begin}, not at {end}")
            end = stop
        if end != size - LENGTH_BYTES - length:
            raise ValueError(f"its tensors end at byte {end} of {size - LENGTH_BYTES - length}")
    except httpx2.HTTPError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a readable safetensors file ({first_line(error)}); tell its owner") from error
    return {name: (shape, dtype) for name, (shape, dtype, _, _) in entries.items()}


def _read_entry(name: str, entry: Any, where: str) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Returns shape, dtype, and the first and the last byte of a tensor. Raises ValueError for other than such an entry."""
    content = entry if isinstance(entry, dict) else {}
    name_of_dtype = content.get("dtype")
    if not isinstance(name_of_dtype, str) or name_of_dtype not in DTYPES:
        raise UserError(f"{where}: tensor {name} has type {name_of_dtype!r}; {NOT_FLOAT}")
    dtype, shape = np.dtype(DTYPES[name_of_dtype]), _read_counts(name, content.get("shape"))
    offsets = _read_counts(name, content.get("data_offsets"))
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has the data_offsets {list(offsets)}, which do not fit its shape {list(shape)}")
    return shape, dtype, offsets[0], offsets[1]


def _read_counts(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{name} has {values!r} for its shape or data_offsets, not whole numbers")
    return tuple(values)


def read_torch_header(file: BinaryIO, size: int, where: str) -> Header:  # noqa: ARG001  (a HeaderReader)
    """Returns shape and dtype of every tensor in a torch file, by stored name; of its data nothing is read.

    Raises UserError for damaged files, for content other than plain tensors, and for files older than torch 1.6, which have
    no header.
    """
    if not zipfile.is_zipfile(file):
        raise UserError(
            f"{where}: was written before torch 1.6 or is damaged, so it cannot be checked before the download; get the "
            "repository with `hf download`, and give that folder"
        )
    file.seek(0)
    with torch.serialization.skip_data():
        tensors = read_tensors(file, where)
    return {name: (tuple(tensor.shape), numpy_dtype(tensor)) for name, tensor in tensors.items()}
