"""Activation cache: a block's outputs, which the next block reads, one tensor for each input, on disk and in memory.

An uninterrupted run reads the stored values, too, never those that were computed, so that it ends in the same bits as a
resumed one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from qvlm_export.calibrate.errors import UserError

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _CachedTensor:
    """One stored tensor. offset: of its bytes in `path`. tensor: its copy in memory, None when it is read from the file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    path: Path
    tensor: torch.Tensor | None

    def read(self) -> torch.Tensor:
        """A float32 copy: last bits of products may depend on its alignment, which is then the same for file and memory."""
        stored = self.tensor if self.tensor is not None else self._read_file()
        return stored.to(torch.float32, copy=True)

    def _read_file(self) -> torch.Tensor:
        dtype, count = _TYPES[self.dtype], math.prod(self.shape)
        if not count:
            return torch.zeros(self.shape, dtype=dtype)
        content = np.fromfile(self.path, np.uint8, count * dtype.itemsize, offset=self.offset)
        if content.size != count * dtype.itemsize:
            raise UserError(f"{self.path}: is shorter than it was written; delete the work folder and start over")
        return torch.from_numpy(content).view(dtype).reshape(self.shape)


class CachedActivations(Sequence[torch.Tensor]):
    """Cached tensors; indexing reads one as a new float32 tensor.

    Reading raises UserError naming the file when it is shorter than it was written.
    """

    def __init__(self, items: Sequence[_CachedTensor]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> CachedActivations: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | CachedActivations:
        return CachedActivations(self._items[index]) if isinstance(index, slice) else self._items[index].read()

    def describe(self) -> list[dict[str, Any]]:
        """Shape, dtype and offset in bytes of each tensor, for JSON."""
        return [{"shape": list(item.shape), "dtype": item.dtype, "offset": item.offset} for item in self._items]


def to_16_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as float16, or as bfloat16 where a value is beyond float16's range."""
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor.bfloat16()


def cache_activations(outputs: Iterable[torch.Tensor], path: Path, *, narrow: bool, memory_bytes: int) -> CachedActivations:
    """Writes the tensors to `path` as they come; those whose bytes end within the first `memory_bytes` stay in memory, too.

    narrow: stores 16 bits a value instead of 32. The file is written under another name and renamed, so a killed run leaves
    no partial file at `path`. Returns the tensors as they are stored.
    """
    items: list[_CachedTensor] = []
    offset, temporary = 0, path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for output in outputs:
            stored = (to_16_bits(output) if narrow else output).contiguous()
            dtype = str(stored.dtype).removeprefix("torch.")
            if stored.numel():
                file.write(stored.flatten().view(torch.uint8).numpy().data)
            in_memory = stored.clone() if offset + stored.nbytes <= memory_bytes else None
            items.append(_CachedTensor(tuple(stored.shape), dtype, offset, path, in_memory))
            offset += stored.nbytes
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return CachedActivations(items)


def open_cached_activations(description: Sequence[dict[str, Any]], path: Path) -> CachedActivations:
    """The tensors that `cache_activations` wrote to `path`. description: as `CachedActivations.describe` returned it."""
    return CachedActivations([_CachedTensor(tuple(d["shape"]), d["dtype"], d["offset"], path, None) for d in description])


def zeros_of_cached_shapes(description: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """Zeros of the cached shapes that take no memory, in place of outputs of which only the shapes are still needed."""
    return [torch.zeros(()).expand(d["shape"]) for d in description]
