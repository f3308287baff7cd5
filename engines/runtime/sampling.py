"""Sampling of the next token: greedy, temperature, nucleus (Holtzman et al. 2020), repetition penalty (Keskar et al. 2019).

Logits of one position go in, a token id comes out. The caller passes the random generator, so that the same seed gives the
same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from qvlm_export.calibrate.errors import UserError

_LARGEST_LOGIT = 1e300  # differences of two such logits are finite


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    temperature: divides the logits, 0 for greedy decoding. top_p: sample from the smallest set of most likely tokens that
    has at least this probability (Holtzman et al. 2020). repetition_penalty: divides positive and multiplies negative logits
    of tokens that the sequence already has (Keskar et al. 2019). Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a value of another type or out of range; the comparisons are false for NaN."""
        if not 0 <= _as_float(self.temperature) < math.inf:
            raise UserError(f"temperature {_shorten(self.temperature)}: must be 0 (greedy) or more, and finite")
        if not 0 < _as_float(self.top_p) <= 1:
            raise UserError(f"top_p {_shorten(self.top_p)}: must be above 0 and at most 1")
        if not 0 < _as_float(self.repetition_penalty) < math.inf:
            raise UserError(
                f"repetition_penalty {_shorten(self.repetition_penalty)}: must be above 0, and finite; 1 is none"
            )
        require_whole_number("seed", self.seed, 0)


def _as_float(value: Any) -> float:
    """Returns a setting as a float: NaN for what is no number, infinity for a whole number beyond the range of float64."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def require_whole_number(name: str, value: Any, least: int) -> None:
    """Raises UserError unless the value of a setting is a whole number, and at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} {_shorten(value)}: must be a whole number")
    if int(value) < least:
        raise UserError(f"{name} {_shorten(value)}: must be at least {least}")


def _shorten(value: Any) -> str:
    """Returns a value for a message; Python refuses to print whole numbers of more than 4,300 digits."""
    is_huge = isinstance(value, Integral) and abs(int(value)) > 2**64
    return "beyond 64 bits" if is_huge else f"{value!r:.40}"


def pick_token(logits: np.ndarray, sequence: list[int], sampling: Sampling, random: np.random.Generator) -> int:
    """Returns the id of the next token. logits: float32 [vocab]. sequence: all tokens so far, for the repetition penalty."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalise_repetition(logits, sequence, float(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a quotient beyond float64 becomes minus infinity, which is the right limit
        scaled = (logits.astype(np.float64) - logits.max()) / float(sampling.temperature)
    probability = np.exp(scaled)
    probability /= probability.sum()
    if sampling.top_p < 1:
        probability = _keep_nucleus(probability, sampling.top_p)
    return int(random.choice(len(probability), p=probability))


def _penalise_repetition(logits: np.ndarray, sequence: list[int], penalty: float) -> np.ndarray:
    penalised = logits.astype(np.float64)
    ids = np.unique(np.asarray(sequence, np.int64))
    with np.errstate(over="ignore"):  # an extreme penalty makes a logit as large as can be; infinite ones have no softmax
        penalised[ids] = np.where(penalised[ids] > 0, penalised[ids] / penalty, penalised[ids] * penalty)
    return penalised.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def _keep_nucleus(probability: np.ndarray, top_p: float) -> np.ndarray:
    """Returns the probabilities [vocab], normalized over the most likely tokens up to the one that reaches top_p."""
    order = np.argsort(-probability, kind="stable")
    cumulative_before = np.cumsum(probability[order]) - probability[order]
    kept_probability = np.where(cumulative_before < top_p, probability[order], 0.0)
    nucleus = np.zeros_like(probability)
    nucleus[order] = kept_probability / kept_probability.sum()
    return nucleus
