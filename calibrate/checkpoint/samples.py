"""What calibration runs through the model, and where its picture's features go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """How image tokens are made of what the vision tower and projector put out.

    rows: int64 [N, k], the rows of image_embeds that each of N image tokens is a sum of; -1 is the last row, which is the
    `image_newline` vector. weights: float32 [N, k].
    """

    rows: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Sample:
    """One prompt with its pictures, ready for the model.

    input_ids: int64 [S], image tokens already repeated once per patch. pixel_values: float32 [n, 3, R, R], n may be 0.
    answer_start: where the answer's tokens begin; S when the sample has no answer. placement: of the features of the n
    pictures or tiles; None when they are the image tokens, in order.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    answer_start: int
    placement: Placement | None = None


def place_features(embeds: np.ndarray, placement: Placement | None) -> np.ndarray:
    """image_embeds [n, hidden] as the vision graph puts them out -> one row for each image token, of the same type."""
    if placement is None:
        return embeds
    if placement.rows.shape[1] == 1:
        return embeds[placement.rows[:, 0]]
    total = np.zeros((len(placement), embeds.shape[1]), np.float32)
    for rows, weights in zip(placement.rows.T, placement.weights.T, strict=True):
        total += weights[:, None] * embeds[rows].astype(np.float32)
    return total.astype(embeds.dtype)


def join_placements(placements: Sequence[Placement | None], row_counts: Sequence[int]) -> Placement | None:
    """The placement of several prompts whose pictures run together; row_counts: embedding rows of each, newline apart.

    None when none has one.
    """
    if all(placement is None for placement in placements):
        return None
    starts = np.concatenate([[0], np.cumsum(row_counts)])[: len(row_counts)]
    parts = [
        Placement(np.arange(count)[:, None], np.ones((count, 1), np.float32)) if p is None else p
        for p, count in zip(placements, row_counts, strict=True)
    ]
    widest = max(part.rows.shape[1] for part in parts)
    rows, weights = [], []
    for part, start in zip(parts, starts, strict=True):
        more = ((0, 0), (0, widest - part.rows.shape[1]))
        moved = np.where(part.rows < 0, part.rows, part.rows + start)
        rows.append(np.pad(moved, more, mode="edge"))
        weights.append(np.pad(part.weights, more))
    return Placement(np.concatenate(rows), np.concatenate(weights))
