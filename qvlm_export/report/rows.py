"""Rows of the report's tables and plots, as frozen dataclasses; `report.py` fills them from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvlm_export.report.contents import Linear

MODALITIES = ("image", "prompt", "answer")


@dataclass(frozen=True)
class Place:
    """The position of a block: its component, and its number in the component (None for a component of one block)."""

    component: str
    number: int | None

    def __str__(self) -> str:
        return self.component if self.number is None else f"{self.component} {self.number}"


@dataclass(frozen=True)
class BlockRow:
    """A block whose quantization was searched. Errors are relative squared errors of the block's output.

    error: over all tokens of all inputs. rtn_errors, errors: by modality of the tokens, over some of the inputs, with
    round-to-nearest and as searched. cost: number of block forwards and backwards.
    """

    place: Place
    error: float
    rtn_errors: Mapping[str, float]
    errors: Mapping[str, float]
    cost: tuple[int, int]


@dataclass(frozen=True)
class LayerRow:
    """Linears that share an input.

    bits: of the input's codes; those of the weights for float inputs. entropy: of these codes, in nats. starts_block:
    whether a block that Q-VLM would search jointly begins here.
    """

    place: Place
    linears: tuple[str, ...]
    bits: int
    entropy: float
    starts_block: bool


@dataclass(frozen=True)
class LinearRow:
    """A linear of the model and its calibration record, which is empty for a linear that stayed float."""

    linear: Linear
    place: Place
    record: Mapping[str, Any]


@dataclass(frozen=True)
class MassiveActivation:
    """A massive activation of the float model, see `find_massive`.

    place: the block whose output holds it. token: its id, None in the vision tower. position: of the token in its sequence.
    treatment: what was done about it.
    """

    place: Place
    token: int | None
    position: int
    channel: int
    magnitude: float
    times_median: float
    treatment: str


@dataclass(frozen=True)
class Fallback:
    """A linear whose input stays float although the scheme quantizes it. error: what 8 bits would have added."""

    linear: str
    error: float


@dataclass(frozen=True)
class JointSearch:
    """Layers whose clipping ranges Q-VLM searched jointly.

    layers: their linears, without the name of the block, one text for each layer. activation_percentiles: of each layer,
    None where its input stays float; weight_percentiles. error_before, error_after: relative squared error of the last
    layer's linears, with absmax ranges and as chosen. layer_forwards: what the search took.
    """

    place: Place
    layers: tuple[str, ...]
    activation_percentiles: tuple[float | None, ...]
    weight_percentiles: tuple[float, ...]
    error_before: float
    error_after: float
    layer_forwards: int
