"""Protocol for lazily loaded checkpoints: named tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """A checkpoint as a collection of canonical tensor names, whose arrays are loaded one at a time."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor; does not read its data."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype: float16, float32 or ml_dtypes.bfloat16; integers in a calibrated checkpoint, too."""
        ...

    def files(self) -> Sequence[Path]:
        """Paths of the files that hold the tensors."""
        ...

    def load(self, name: str) -> np.ndarray:
        """The data as an array of the stored shape and dtype. The caller must not write to it."""
        ...
