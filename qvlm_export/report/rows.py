"""qvlm_export/report/rows.py"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvlm_export.report.contents import Linear

MODALITIES = ("image", "prompt", "answer")


@dataclass(frozen=True)
class Place:
    """Where a block stands: its component, and its number in it (None for a component of one block)."""

    component: str
    number: int | None

    def __str__(self) -> str:
        return self.component if self.number is None else f"{self.component} {self.number}"


@dataclass(frozen=True)
class BlockRow:
    """A searched block. Errors are relative and squared, of its output. error: of all tokens and inputs; nearest and errors:
    by modality, on some inputs, rounded to nearest and as searched; held_back: before and after learning, on samples it did
    not see, as they count there.

    cost: block forwards and backwards.
    """

    place: Place
    error: float
    nearest: Mapping[str, float]
    errors: Mapping[str, float]
    held_back: Sequence[float] | None
    cost: tuple[int, int]


@dataclass(frozen=True)
class LayerRow:
    """Linears that share an input. entropy: of its codes, in nats. starts: whether a joint search would begin with it."""

    place: Place
    linears: tuple[str, ...]
    bits: int
    entropy: float
    starts: bool


@dataclass(frozen=True)
class LinearRow:
    """A linear of the model, `record` being what calibration kept of it: nothing for one that stayed float."""

    linear: Linear
    place: Place
    record: Mapping[str, Any]
