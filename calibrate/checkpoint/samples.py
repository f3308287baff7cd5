"""Calibration samples: prompts with preprocessed images, and the placement of image features among the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Placement:
    """How image tokens are composed from the output of vision tower and projector: each is a weighted sum of k rows.

    rows: int64 [N, k], indices into the rows of image_embeds for each of N image tokens; -1 is the last row, which is the
    `image_newline` vector. weights: float32 [N, k], the factors of these rows.
    """

    rows: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Sample:
    """One prompt with its images, ready for the model.

    input_ids: int64 [S], with the image token already repeated once per patch. pixel_values: float32 [n, 3, R, R], the n
    images or tiles; n may be 0. answer_start: position of the first answer token; S when the sample has no answer.
    placement: how image tokens are composed from the features of the n images or tiles; None when the features are the
    image tokens, in order.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    answer_start: int
    placement: Placement | None = None


def place_features(embeds: np.ndarray, placement: Placement | None) -> np.ndarray:
    """One row per image token, [N, hidden], from image_embeds [n, hidden] as the vision graph returns them; same dtype."""
    if placement is None:
        return embeds
    if placement.rows.shape[1] == 1:
        return embeds[placement.rows[:, 0]]
    total = np.zeros((len(placement), embeds.shape[1]), np.float32)
    for rows, weights in zip(placement.rows.T, placement.weights.T, strict=True):
        total += weights[:, None] * embeds[rows].astype(np.float32)
    return total.astype(embeds.dtype)


def join_placements(placements: Sequence[Placement | None], row_counts: Sequence[int]) -> Placement | None:
    """The placement of several prompts whose images run as one batch; None when no prompt has a placement.

    row_counts: number of rows of image_embeds of each prompt, without the newline row.
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
        padding = ((0, 0), (0, widest - part.rows.shape[1]))
        shifted = np.where(part.rows < 0, part.rows, part.rows + start)
        rows.append(np.pad(shifted, padding, mode="edge"))
        weights.append(np.pad(part.weights, padding))
    return Placement(np.concatenate(rows), np.concatenate(weights))
