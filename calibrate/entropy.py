"""Proxies of cross-layer dependency: how much a joint search of two consecutive layers would gain over one by one. torch.

The paper's is the entropy of a layer's quantized activations (Q-VLM, section 3.2). As printed it needs the joint
distribution of two tensors of different shapes, which does not exist, and its softmax has the step D where only D^2 makes
it independent of units; here it is the marginal entropy of the codes, softly assigned with D^2. The others are
what docs/entropy.md measures beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibrate.quantize import fake_quantize
from calibrate.statistics import Histogram

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


def code_entropy(values: torch.Tensor, scale: float, num_bits: int) -> float:
    """Entropy in nats of the softly assigned codes of `values`: at most num_bits * log 2."""
    return entropy_nats(soft_code_distribution(values, scale, num_bits))


def histogram_entropy(histogram: Histogram, scale: float, num_bits: int) -> float:
    """`code_entropy` of the values that a histogram holds, each taken to lie in the middle of its bin."""
    filled = histogram.counts > 0
    counts = histogram.counts[filled]
    return entropy_nats(soft_code_distribution(histogram.centers()[filled], scale, num_bits, counts))


def quantization_error(values: torch.Tensor, scale: float, num_bits: int) -> float:
    """Energy of the rounding error in units of the energy of `values`; 0 where all are 0."""
    energy = values.double().square().sum()
    error = (fake_quantize(values, scale, num_bits) - values).double().square().sum()
    return float(error / energy.clamp(min=torch.finfo(torch.float64).tiny))


def error_cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine between two errors of one output: from quantizing the one layer only and the other layer only.

    0: errors add up as if the layers were independent. Positive: they amplify, negative: they cancel each other.
    """
    one, two = first.double().flatten(), second.double().flatten()
    size = one.norm() * two.norm()
    return float(one @ two / size) if float(size) > 0 else 0.0


def lookahead_regret(own: Sequence[float], ahead: Sequence[float]) -> float:
    """What choosing a layer's candidate by its own output costs at the next layer's output, relative to the best there.

    own: error of the layer's own output for each candidate. ahead: error of the next layer's output for the same
    candidates, the next layer as it is (float, or with its current ranges). 0: both agree. It costs one forward of the next
    layer a candidate, where a joint search of the two costs one a pair of candidates. Infinite when only the best is exact.
    """
    chosen, best = ahead[min(range(len(own)), key=own.__getitem__)], min(ahead)
    if chosen == best:
        return 0.0
    return chosen / best - 1.0 if best > 0 else float("inf")


def flatness(errors: Sequence[float]) -> float:
    """How little the second-best candidate is worse than the best: 1 for as good, towards 0 for a sharp optimum.

    A flat optimum of a layer's own error lets a joint search move it at little cost.
    """
    best, second = sorted(errors)[:2]
    return best / second if second > 0 else 1.0
