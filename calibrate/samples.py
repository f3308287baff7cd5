"""What calibration runs through the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One prompt with its pictures, ready for the model.

    input_ids: int64 [S], image tokens already repeated once per patch. pixel_values: float32 [n, 3, R, R], n may be 0.
    answer_start: where the answer's tokens begin; S when the sample has no answer.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    answer_start: int
