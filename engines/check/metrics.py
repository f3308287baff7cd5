"""How far two runs' logits are apart, token by token and summed over groups of tokens. numpy only.

The reference always comes first. Sums are float64: a 13B model's logits are 32,000 wide and thousands of tokens long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

ROWS_AT_ONCE = 128  # bounds the float64 copies of wide logits


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(other)) in nats. Logits [T, vocab] -> float64 [T]; 0 where they are equal."""
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    divergence: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.maximum(divergence, 0.0)  # rounding may leave -1e-17


def top1_agreement(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether both choose the same token. Logits [T, vocab] -> bool [T]; of equal logits the first counts."""
    same: np.ndarray = reference.argmax(axis=-1) == other.argmax(axis=-1)
    return same


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise of whole arrays: 10 log10(sum reference^2 / sum (other - reference)^2).

    inf where they are equal, -inf where the reference is all zero and the other is not.
    """
    return _decibels(_energy(reference), _energy(other.astype(np.float64) - reference))


def cosine(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the rows. [T, width] -> float64 [T]; 1 for two zero rows, 0 for one of them."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    dot: np.ndarray = (a * b).sum(axis=-1)
    return np.where(both_zero, 1.0, dot / np.where(lengths == 0, 1.0, lengths))


@dataclass(frozen=True)
class Sums:
    """What a group of tokens adds up to. `non_finite_error` tokens have a NaN or infinite logit and are in no other sum."""

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
        """Nats a token; NaN for no token."""
        return self._mean(self.kl)

    @property
    def agreement(self) -> float:
        """Share of tokens whose most likely token is the same; those that are not finite do not agree."""
        return self.agreed / (self.tokens + self.not_finite) if self.tokens + self.not_finite else math.nan

    @property
    def mean_cosine(self) -> float:
        """Mean over tokens; NaN for no token."""
        return self._mean(self.cosine)

    @property
    def sqnr_db(self) -> float:
        """Of the group's logits together; NaN for no token."""
        return _decibels(self.signal, self.noise) if self.tokens else math.nan

    def _mean(self, total: float) -> float:
        return total / self.tokens if self.tokens else math.nan


def measure(reference: np.ndarray, other: np.ndarray) -> Sums:
    """All metrics over some tokens. Logits [T, vocab]; T may be 0."""
    total = Sums()
    for a, b in _pieces(reference, other):
        finite = np.isfinite(a).all(axis=-1) & np.isfinite(b).all(axis=-1)
        total += _measure_finite(a[finite], b[finite]) + Sums(not_finite=int((~finite).sum()))
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


def _pieces(reference: np.ndarray, other: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if reference.shape != other.shape:
        raise ValueError(f"logits {reference.shape} against {other.shape}")
    for start in range(0, len(reference), ROWS_AT_ONCE):
        yield reference[start : start + ROWS_AT_ONCE], other[start : start + ROWS_AT_ONCE]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    normalised: np.ndarray = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return normalised


def _energy(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
