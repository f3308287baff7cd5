"""Sampling of the next token: greedy, temperature, nucleus (Holtzman et al. 2020), repetition penalty (Keskar et al. 2019).

Logits of one position go in, a token id comes out. The caller passes the random generator, so that the same seed gives the
same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qvlm_export.calibrate.errors import UserError


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
        """Raises UserError for a value out of range; the comparisons are written so that NaN is out of every range."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty {self.repetition_penalty}: must be above 0; 1 is none")
        if self.seed < 0:
            raise UserError(f"seed {self.seed}: must be 0 or more")


def pick_token(logits: np.ndarray, sequence: list[int], sampling: Sampling, random: np.random.Generator) -> int:
    """Returns the id of the next token. logits: float32 [vocab]. sequence: all tokens so far, for the repetition penalty."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalise_repetition(logits, sequence, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a quotient beyond float64 becomes minus infinity, which is the right limit
        scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
    probability = np.exp(scaled)
    probability /= probability.sum()
    if sampling.top_p < 1:
        probability = _keep_nucleus(probability, sampling.top_p)
    return int(random.choice(len(probability), p=probability))


def _penalise_repetition(logits: np.ndarray, sequence: list[int], penalty: float) -> np.ndarray:
    penalised = logits.copy()
    ids = np.unique(np.asarray(sequence, np.int64))
    penalised[ids] = np.where(penalised[ids] > 0, penalised[ids] / penalty, penalised[ids] * penalty)
    return penalised


def _keep_nucleus(probability: np.ndarray, top_p: float) -> np.ndarray:
    """Returns the probabilities [vocab], normalized over the most likely tokens up to the one that reaches top_p."""
    order = np.argsort(-probability, kind="stable")
    cumulative_before = np.cumsum(probability[order]) - probability[order]
    kept_probability = np.where(cumulative_before < top_p, probability[order], 0.0)
    nucleus = np.zeros_like(probability)
    nucleus[order] = kept_probability / kept_probability.sum()
    return nucleus
