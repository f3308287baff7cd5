"""Distances between the logits of two runs: KL divergence, top-1 agreement, cosine similarity and SQNR.

Functions over arrays give one value a token; `measure` adds them up over a set of tokens. The reference always comes first.
Sums are float64, because the logits of a 13B model are 32,000 wide and thousands of tokens long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

ROWS_AT_ONCE = 128  # bounds the float64 copies of wide logits


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns KL(softmax(reference) || softmax(other)) in nats, logits [T, vocab] -> float64 [T]; 0 where they are equal."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    divergence: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.maximum(divergence, 0.0)  # rounding may leave -1e-17


def top1_agreement(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns whether both have the same most likely token, logits [T, vocab] -> bool [T]; ties go to the first token."""
    same: np.ndarray = reference.argmax(axis=-1) == other.argmax(axis=-1)
    return same


def token_sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Returns the SQNR of rows [T, width] in dB, in which every row counts by its own size; NaN without rows.

    It is -10 log10 of the mean of |other - reference|^2 / |reference|^2: inf when all rows are equal. A token with massive
    activations would decide a ratio of sums alone.
    """
    rows, others = reference.astype(np.float64), other.astype(np.float64)
    energy = np.square(rows).sum(axis=-1)
    errors = np.square(others - rows).sum(axis=-1) / np.maximum(energy, np.finfo(np.float32).tiny)
    return _decibels(1.0, float(errors.mean())) if len(errors) else math.nan


def cosine(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the cosine of the angle between rows, [T, width] -> float64 [T]; 1 when both rows are zero, 0 when one is."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    dot: np.ndarray = (a * b).sum(axis=-1)
    return np.where(both_zero, 1.0, dot / np.where(norms == 0, 1.0, norms))


@dataclass(frozen=True)
class Sums:
    """The metrics of a set of tokens as sums, which can be added.

    tokens: how many were measured. not_finite: how many have a NaN or infinite logit; they are in no other sum. kl: in nats.
    agreed: tokens with the same most likely token. cosine: sum of the cosines. signal, noise: sums of squared logits of the
    reference and of squared differences.
    """

    tokens: int = 0
    not_finite: int = 0
    kl: float = 0.0
    agreed: int = 0
    cosine: float = 0.0
    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Sums)))

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence in nats a token; NaN without tokens."""
        return self._mean(self.kl)

    @property
    def agreement(self) -> float:
        """Fraction of tokens with the same most likely token; one with a logit that is not finite counts as different."""
        return self.agreed / (self.tokens + self.not_finite) if self.tokens + self.not_finite else math.nan

    @property
    def mean_cosine(self) -> float:
        """Mean cosine similarity of a token's logits; NaN without tokens."""
        return self._mean(self.cosine)

    @property
    def sqnr_db(self) -> float:
        """SQNR of all logits together in dB; NaN without tokens."""
        return _decibels(self.signal, self.noise) if self.tokens else math.nan

    def _mean(self, total: float) -> float:
        return total / self.tokens if self.tokens else math.nan


def measure(reference: np.ndarray, other: np.ndarray) -> Sums:
    """Returns all metrics summed over tokens. Logits [T, vocab], T may be 0. Raises ValueError when the shapes differ."""
    total = Sums()
    for reference_rows, other_rows in _split_rows(reference, other):
        finite = np.isfinite(reference_rows).all(axis=-1) & np.isfinite(other_rows).all(axis=-1)
        total += _measure_finite(reference_rows[finite], other_rows[finite]) + Sums(not_finite=int((~finite).sum()))
    return total


def _measure_finite(reference: np.ndarray, other: np.ndarray) -> Sums:
    if len(reference) == 0:
        return Sums()
    return Sums(
        tokens=len(reference),
        kl=float(kl_divergence(reference, other).sum()),
        agreed=int(top1_agreement(reference, other).sum()),
        cosine=float(cosine(reference, other).sum()),
        signal=_energy(reference),
        noise=_energy(other.astype(np.float64) - reference),
    )


def _split_rows(reference: np.ndarray, other: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if reference.shape != other.shape:
        raise ValueError(f"logits {reference.shape} against {other.shape}")
    for start in range(0, len(reference), ROWS_AT_ONCE):
        yield reference[start : start + ROWS_AT_ONCE], other[start : start + ROWS_AT_ONCE]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    log_probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probabilities


def _energy(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
