"""Choosing the next token from its logits. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qvlm_export.calibrate.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p keeps the smallest set of tokens with that much probability (Holtzman et al. 2020).

    repetition_penalty divides positive and multiplies negative logits of tokens already there (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range; NaN is out of every range."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty {self.repetition_penalty}: must be above 0; 1 is none")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: must be 0 or more")


def pick_token(logits: np.ndarray, seen: list[int], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token. logits: float32 [vocab]; seen: the sequence so far, which the repetition penalty looks at."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # minus infinity is the right answer there
        scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    probability = np.exp(scaled)
    probability /= probability.sum()
    if sampling.top_p < 1:
        probability = _nucleus(probability, sampling.top_p)
    return int(random.choice(len(probability), p=probability))


def _penalised(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    changed = logits.copy()
    ids = np.unique(np.asarray(seen, np.int64))
    changed[ids] = np.where(changed[ids] > 0, changed[ids] / penalty, changed[ids] * penalty)
    return changed


def _nucleus(probability: np.ndarray, top_p: float) -> np.ndarray:
    """Zeroes all but the most likely tokens that together reach top_p; the one that crosses it stays."""
    order = np.argsort(-probability, kind="stable")
    before = np.cumsum(probability[order]) - probability[order]
    kept = np.where(before < top_p, probability[order], 0.0)
    nucleus = np.zeros_like(probability)
    nucleus[order] = kept / kept.sum()
    return nucleus
