"""The entropy of quantized activations: what the paper takes for the dependency of consecutive layers. torch.

As printed (Q-VLM, section 3.2) it needs the joint distribution of two tensors of different shapes, which does not exist, and
its softmax has the step D where only D^2 makes it independent of units; here it is the marginal entropy of the codes, softly
assigned with D^2.
"""

from __future__ import annotations

import torch

from qvlm_export.calibrate.quantization.observers import Histogram

_REACH = 6  # codes further than this from the nearest one have shares below exp(-40)
_CHUNK = 2**18  # values assigned at a time


def soft_code_distribution(
    values: torch.Tensor, scale: float, num_bits: int, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean share of each level q_m under p(x = q_m) = softmax_m(-((x - q_m) / scale)^2), float64 [2^num_bits].

    values: float of any shape; counts: how often each occurs, same shape, once each without it. Scale-free: the same for
    (c * values, c * scale). Source: Q-VLM, section 3.2, with the step squared.
    """
    lowest, highest = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    offsets = torch.arange(-_REACH, _REACH + 1)
    shares = torch.zeros(highest - lowest + 1, dtype=torch.float64)
    weights = torch.ones_like(values, dtype=torch.float64) if counts is None else counts.double()
    for part, weight in zip(values.flatten().split(_CHUNK), weights.flatten().split(_CHUNK), strict=True):
        steps = part.double() / scale
        codes = steps.round().clamp(lowest, highest).long()[:, None] + offsets  # [values, 13]
        distances = (steps[:, None] - codes).square_().masked_fill_((codes < lowest) | (codes > highest), torch.inf)
        assigned = torch.softmax(-distances, dim=1) * weight[:, None]
        shares.index_add_(0, codes.clamp(lowest, highest).flatten() - lowest, assigned.flatten())
    return shares / weights.sum().clamp(min=1)


def entropy_nats(shares: torch.Tensor) -> float:
    """-sum p log p of a distribution, in nats; an impossible code adds nothing."""
    return float(torch.special.entr(shares).sum())


def histogram_entropy(histogram: Histogram, scale: float, num_bits: int) -> float:
    """Entropy in nats of the softly assigned codes of a histogram's values, each in the middle of its bin."""
    filled = histogram.counts > 0
    counts = histogram.counts[filled]
    return entropy_nats(soft_code_distribution(histogram.centers()[filled], scale, num_bits, counts))
