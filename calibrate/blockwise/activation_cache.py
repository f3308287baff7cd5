"""What flows between two blocks: one tensor a sample, in memory or in a file. torch.

Both an uninterrupted run and a resumed one read what was kept, never what was computed, so that they end in the same bits.
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
class _Item:
    """One tensor. offset: of its bytes in `path`; tensor: the same in memory, None when it is read each time."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    path: Path
    tensor: torch.Tensor | None

    def read(self) -> torch.Tensor:
        """float32, in memory of its own: aligned alike wherever it comes from, as last bits of products may depend on it."""
        stored = self.tensor if self.tensor is not None else self._from_file()
        return stored.to(torch.float32, copy=True)

    def _from_file(self) -> torch.Tensor:
        kind, count = _TYPES[self.dtype], math.prod(self.shape)
        if not count:
            return torch.zeros(self.shape, dtype=kind)
        content = np.fromfile(self.path, np.uint8, count * kind.itemsize, offset=self.offset)
        if content.size != count * kind.itemsize:
            raise UserError(f"{self.path}: is shorter than it was written; delete the work folder and begin anew")
        return torch.from_numpy(content).view(kind).reshape(self.shape)


class CachedActivations(Sequence[torch.Tensor]):
    """float32 tensors, made one at a time from what is kept."""

    def __init__(self, items: Sequence[_Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> CachedActivations: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | CachedActivations:
        return CachedActivations(self._items[index]) if isinstance(index, slice) else self._items[index].read()

    def described(self) -> list[dict[str, Any]]:
        """Shape, type and place of each tensor, for JSON."""
        return [{"shape": list(item.shape), "dtype": item.dtype, "offset": item.offset} for item in self._items]


def to_16_bits(tensor: torch.Tensor) -> torch.Tensor:
    """float16, or bfloat16 where a value is beyond float16."""
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor.bfloat16()


def cache_activations(outputs: Iterable[torch.Tensor], path: Path, *, narrow: bool, memory_bytes: int) -> CachedActivations:
    """Writes the tensors to `path` as they come; those that together fit into `memory_bytes` stay in memory, too.

    narrow: 16 bits instead of 32. A kill leaves no half file at `path`.
    """
    items: list[_Item] = []
    offset, temporary = 0, path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for output in outputs:
            kept = (to_16_bits(output) if narrow else output).contiguous()
            dtype = str(kept.dtype).removeprefix("torch.")
            if kept.numel():
                file.write(kept.flatten().view(torch.uint8).numpy().data)
            in_memory = kept.clone() if offset + kept.nbytes <= memory_bytes else None
            items.append(_Item(tuple(kept.shape), dtype, offset, path, in_memory))
            offset += kept.nbytes
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return CachedActivations(items)


def open_cached_activations(described: Sequence[dict[str, Any]], path: Path) -> CachedActivations:
    """What `cache_activations` wrote to `path`, as `described` says."""
    return CachedActivations([_Item(tuple(d["shape"]), d["dtype"], d["offset"], path, None) for d in described])


def zeros_of_cached_shapes(described: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """Zeros of these shapes that take no memory: for whoever looks at the shapes of what nobody needs any more."""
    return [torch.zeros(()).expand(d["shape"]) for d in described]
