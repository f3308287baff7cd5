"""Entropy of softly assigned quantization codes: Q-VLM's proxy for the dependency of consecutive layers (section 3.2).

As printed, it needs the joint distribution of two tensors of different shapes, which does not exist, and its softmax divides
by the step D, where only D^2 makes it independent of units. Here it is the marginal entropy of the codes, with D^2.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.quantization.observers import Histogram

_MAX_OFFSET = 6  # codes further than this from the nearest one have shares below exp(-40)
_CHUNK = 2**18  # values assigned at a time


def soft_code_distribution(
    values: torch.Tensor, scale: float | torch.Tensor, num_bits: int, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the mean over the values of p(x = q_m) = softmax_m(-((x - q_m) / scale)^2), float64 [2^num_bits].

    values: float of any shape. scale: the quantizer's step. counts: how often each value occurs, of the same shape; None for
    once each. The result is scale-free: the same for (c * values, c * scale), and differentiable by both. Source: Q-VLM,
    section 3.2, with the step squared.
    """
    lowest, highest = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    offsets = torch.arange(-_MAX_OFFSET, _MAX_OFFSET + 1, device=values.device)
    shares = torch.zeros(highest - lowest + 1, dtype=torch.float64, device=values.device)
    weights = torch.ones_like(values, dtype=torch.float64) if counts is None else counts.double()
    for chunk, weight in zip(values.flatten().split(_CHUNK), weights.flatten().split(_CHUNK), strict=True):
        steps = chunk.double() / scale
        codes = steps.detach().round().clamp(lowest, highest).long()[:, None] + offsets  # [values, 13]
        distances = (steps[:, None] - codes).square_().masked_fill_((codes < lowest) | (codes > highest), torch.inf)
        assigned = torch.softmax(-distances, dim=1) * weight[:, None]
        shares.index_add_(0, codes.clamp(lowest, highest).flatten() - lowest, assigned.flatten())
    return shares / weights.sum().clamp(min=1)


def entropy_nats(shares: torch.Tensor) -> float:
    """Returns -sum p log p of a distribution, in nats; a code of probability 0 adds nothing."""
    return float(torch.special.entr(shares).sum())


def histogram_entropy(histogram: Histogram, scale: float, num_bits: int) -> float:
    """Returns the entropy in nats of the softly assigned codes of a histogram's values, taken at the bin centers."""
    filled = histogram.counts > 0
    counts = histogram.counts[filled]
    return entropy_nats(soft_code_distribution(histogram.centers()[filled], scale, num_bits, counts))
