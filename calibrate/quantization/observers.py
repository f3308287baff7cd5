"""Observers of quantizer inputs: ranges and histograms of activations, gathered in one pass over batches.

Every token has a label: image, prompt or answer. The position of an answer token is a decode position: in generation the
token is fed to the model alone, after the prefill of image and prompt. With causal attention its activations do not depend
on what comes after it, so a forward pass over prompt and answer together (teacher forcing) gives exactly those of decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.tokens import ALL_LABELS, TokenLabel

BINS = 2**14  # on each side of zero
_CHUNK_VALUES = 2**18  # values counted at a time, few enough to stay in the processor's cache
_LOWEST_EXPONENT = -100  # smaller magnitudes lie in the bins beside zero


@dataclass(frozen=True)
class Histogram:
    """A histogram of values in bins of equal width around zero.

    counts: int64 [2 * BINS]; bin BINS + j holds magnitudes in [j * width, (j + 1) * width), bin BINS - 1 - j the same with a
    minus sign. amax: the exact largest magnitude, below BINS * width.
    """

    counts: torch.Tensor
    width: float
    amax: float

    def centers(self) -> torch.Tensor:
        """The center of each bin, float64 [2 * BINS]."""
        return (torch.arange(2 * BINS, dtype=torch.float64) - BINS + 0.5) * self.width

    def percentile(self, fraction: float) -> float:
        """The magnitude that `fraction` of all values do not exceed, at most one bin width above the exact percentile.

        A fraction of 1.0 gives the exact largest magnitude. A histogram without values gives 0.0.
        """
        if fraction >= 1.0:
            return self.amax
        magnitudes = self.counts[BINS:] + self.counts[:BINS].flip(0)
        total = int(magnitudes.sum())
        if not total:
            return 0.0
        index = int(torch.searchsorted(magnitudes.cumsum(0), max(1, math.ceil(fraction * total))))
        return min((index + 1) * self.width, self.amax)


class InputObserver:
    """Statistics of one quantizer's input, kept separately for each TokenLabel and updated batch by batch.

    Counts, ranges and histograms do not depend on how tokens are split into batches. The range of a histogram is a power of
    two, and doubling it merges bins in pairs, so no second pass is needed.
    """

    def __init__(self, name: str, channels: int) -> None:
        """name: of the layer, for error messages; channels: of the input."""
        self._name = name
        self._exponent = _LOWEST_EXPONENT  # the histogram covers magnitudes below 2 ** exponent
        self._batches = 0
        self._tokens = torch.zeros(len(TokenLabel), dtype=torch.int64)
        self._counts = torch.zeros(len(TokenLabel), 2 * BINS, dtype=torch.int64)
        self._amax = torch.zeros(len(TokenLabel), channels)

    def update(self, rows: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch to the statistics. rows: float32 [tokens, channels]; labels: int64 [tokens], TokenLabel values.

        Raises UserError naming layer and batch when a value is not finite; nothing of that batch is added.
        """
        magnitudes = rows.abs()
        amax = float(magnitudes.max()) if rows.numel() else 0.0  # NaN if any value is
        if not math.isfinite(amax):
            raise UserError(f"{self._name}: activations of batch {self._batches} are not finite; check the samples")
        self._batches += 1
        if not rows.numel():
            return
        self._extend_range(amax)
        counts = torch.bincount(labels, minlength=len(TokenLabel))
        self._tokens += counts
        for label in counts.nonzero().flatten().tolist():
            part = magnitudes if counts[label] == len(rows) else magnitudes[labels == label]
            self._amax[label] = torch.maximum(self._amax[label], part.amax(0))
        bins = self._bin_indices(rows, magnitudes).add_((2 * BINS * labels.int())[:, None])
        self._counts += torch.bincount(bins.flatten(), minlength=self._counts.numel()).view_as(self._counts)

    def _extend_range(self, amax: float) -> None:
        """Doubles the histogram's range until it covers `amax`, merging bins in pairs."""
        exponent = max(math.frexp(amax)[1], _LOWEST_EXPONENT) if amax else _LOWEST_EXPONENT  # amax < 2 ** exponent
        doublings = exponent - self._exponent
        if doublings > 0:
            merged = ((torch.arange(2 * BINS) - BINS) >> min(doublings, 62)) + BINS
            self._counts = torch.zeros_like(self._counts).index_add_(1, merged, self._counts)
            self._exponent = exponent

    def _bin_indices(self, rows: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        """The bin of each value, int32 [tokens, channels]; exact, as values are only multiplied by a power of two."""
        steps = (magnitudes * (BINS * 2.0**-self._exponent)).int()
        return steps.bitwise_xor_((rows < 0).int().neg_()).add_(BINS)  # ~steps below zero: -1 - steps

    def tokens(self, labels: Iterable[TokenLabel] = ALL_LABELS) -> int:
        """The number of tokens observed."""
        return int(self._tokens[list(labels)].sum())

    def amax(self, labels: Iterable[TokenLabel] = ALL_LABELS) -> torch.Tensor:
        """The exact largest magnitude of each channel, float32 [channels]."""
        return self._amax[list(labels)].amax(0)

    def histogram(self, labels: Iterable[TokenLabel] = ALL_LABELS) -> Histogram:
        """The histogram of all channels together."""
        indices = list(labels)
        return Histogram(self._counts[indices].sum(0), 2.0**self._exponent / BINS, float(self._amax[indices].max()))


def observe_rows(name: str, rows: torch.Tensor, labels: torch.Tensor | None = None) -> InputObserver:
    """An observer that has observed the rows, a few at a time, as counting takes many times their memory.

    name: of the layer that reads them. rows: float32 [tokens, channels]. labels: int64 [tokens], TokenLabel values; None if
    all tokens have the same. Raises UserError naming the layer when a value is not finite.
    """
    channels = rows.shape[1]
    observer = InputObserver(name, channels)
    row_labels = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels
    chunk = max(1, _CHUNK_VALUES // channels)
    for part, part_labels in zip(rows.split(chunk), row_labels.split(chunk), strict=True):
        observer.update(part.cpu(), part_labels.cpu())
    return observer
