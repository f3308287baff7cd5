"""Named tensors that are read when they are asked for. numpy only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """A checkpoint seen as a mapping from canonical names to arrays that are loaded one at a time."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading its data."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The stored type: float16, float32, or ml_dtypes.bfloat16; integers in a calibrated checkpoint."""
        ...

    def files(self) -> Sequence[Path]:
        """The files that the tensors lie in."""
        ...

    def load(self, name: str) -> np.ndarray:
        """The data. The caller must not write to it."""
        ...
