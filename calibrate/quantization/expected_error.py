"""What quantization will cost on data not seen yet, from statistics; and the factors and ranges that make it least. torch.

A rounded value is off by step / sqrt(12) on average. For y = W x with x / s rounded to steps that cover R, the
expected squared error of y is

    sum over weights   (step of its group)^2 / 12 * v_j / s_j^2        rounding of W * s
    + sum over inputs  |W_j|^2 s_j^2 * (R / qmax)^2 / 12               rounding of x / s
    + sum over inputs  |W_j|^2 * E[(|x_j| - R s_j)+^2]                 values beyond the range

where v_j is E[x_j^2], or what GPTQ leaves of it. Every channel has a factor of its own, where SmoothQuant and AWQ search one
exponent for all.

Calibration sees few samples, and the largest value that deployment brings is larger than theirs. Values beyond the largest
ones seen are taken to be as likely as an exponential tail makes them, its length from the largest values of separate
stretches of tokens. Clipping hits few tokens hard where rounding hits all of them a little, and an answer is lost by one
token, so clipping counts CONCENTRATION times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.hessian import gptq_residual_energy
from qvlm_export.calibrate.quantization.quantizer import activation_scale

CLIPPING_WEIGHT = 10.0
STRETCHES = 64  # of tokens, whose largest values tell how long the tail is
LARGEST = 8  # of those
TAIL_VALUES = 32  # largest values of each channel
_SORTED = 512  # channels at a time
MAX_ROWS = 512  # of a weight; more say the same about its groups
STEPS, RATE = 40, 0.1  # of Adam on the logarithms of the factors
FADE_MEAN, FADE_SQUARE = 0.9, 0.999  # Adam's own
RANGES = (0.1, 0.125, 0.15, 0.175, *(0.2 + 0.05 * i for i in range(17)), 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True)
class OutlierTail:
    """The largest magnitudes of each channel, and beyond. top: float32 [KEPT, channels], largest first.

    length: float32 [channels], the mean of what a value lies beyond a large one. tokens: how many the values are of.
    """

    top: torch.Tensor
    length: torch.Tensor
    tokens: int

    def clipped(self, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected squared excess of a token's magnitude over `limit`, and how fast it falls when the limit rises.

        limit, both results: float32 [channels].
        """
        over = self.top - limit
        inside = over.clamp(min=0)
        # exp() is 1 for a value above the limit. In place only where autograd, by which tests derive it, can follow.
        beyond = ((over - inside).div_(self.length).exp_() * self.length).add_(inside)
        excess = inside.square().add_(2 * self.length * beyond).sum(0)
        return excess / self.tokens, 2 * beyond.sum(0) / self.tokens


def fit_tail(rows: torch.Tensor) -> OutlierTail:
    """rows: float32 [tokens, channels], samples one behind another."""
    size = rows.abs()
    count = max(1, min(STRETCHES, len(size) // 4))
    stretches = torch.stack([part.amax(0) for part in size.tensor_split(count)])
    largest = stretches.topk(min(LARGEST + 1, count), dim=0).values
    length = (largest[:-1] - largest[-1:]).mean(0) if len(largest) > 1 else largest[0]
    top = _largest(size, min(TAIL_VALUES, len(size)))
    # A channel that hardly varies may do so tomorrow; one that is always 0 has a length above 0 all the same.
    return OutlierTail(top, torch.maximum(length, 0.05 * top[0]).clamp(min=1e-8), len(size))


def _largest(size: torch.Tensor, count: int) -> torch.Tensor:
    """Of each channel, largest first: float32 [count, channels]. size: float32 [tokens, channels].

    On a CPU by numpy, channel by channel: its partition takes less than half the time of topk.
    """
    if size.device.type != "cpu":
        return size.topk(count, dim=0).values
    found = []
    for part in size.split(_SORTED, dim=1):
        channels = part.T.clone(memory_format=torch.contiguous_format).numpy()  # sorted in place
        channels.partition(len(size) - count, axis=1)
        found.append(np.sort(channels[:, len(size) - count :], axis=1)[:, ::-1].T)
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(found, axis=1)))


def compute_residual_energy(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """What GPTQ leaves of each input's mean square: 1 / U_jj^2 with U as in `gptq.py`. Scaling inputs scales it alike.

    rows: float32 [tokens, in]; weights: what they count, None for all alike.
    """
    return gptq_residual_energy(matmul((rows if weights is None else rows * weights[:, None]).T, rows)) / len(rows)


@dataclass(frozen=True)
class ErrorModel:
    """Linears that share an input. energy: of each input as rounding meets it, float32 [in]. weight: float32 [out, in]."""

    tail: OutlierTail
    energy: torch.Tensor
    weight: torch.Tensor
    scheme: LinearScheme

    @cached_property
    def read(self) -> torch.Tensor:
        """What an error of each input is multiplied by, squared: |W_j|^2, float32 [in]."""
        return self.weight.square().sum(0)

    @cached_property
    def sizes(self) -> torch.Tensor:
        """|W_ij|, float32 [out, in]; ranges are above 0, so it is multiplied by them as it is."""
        return self.weight.abs()

    def expected(self, ranges: torch.Tensor) -> torch.Tensor:
        """Expected squared error of a token's output. ranges: float32 [in], what each input's range covers before folding.

        The factors are the ranges, but for a common one, which the error does not depend on.
        """
        qmax, bits = self.scheme.qmax, self.scheme.activation_bits
        sizes = self.sizes * ranges
        width = self.scheme.group_size or sizes.shape[1]
        steps = (sizes.reshape(len(sizes), -1, width).amax(-1) / qmax).square().sum(0)
        error = (steps.repeat_interleave(width) * self.energy / ranges.square()).sum() / 12
        if bits is None:
            return error
        rounding = (self.read * ranges.square()).sum() / (12 * (2 ** (bits - 1) - 1) ** 2)
        return error + rounding + CLIPPING_WEIGHT * (self.read * self.tail.clipped(ranges)[0]).sum()

    def slopes(self, ranges: torch.Tensor) -> tuple[float, torch.Tensor]:
        """`expected` and its derivatives by the logarithms of the ranges, float32 [in].

        By hand: autograd takes four times as long for it, which would be a third of all time on a small model.
        """
        qmax, bits, width = self.scheme.qmax, self.scheme.activation_bits, self.scheme.group_size or self.weight.shape[1]
        sizes = (self.sizes * ranges).reshape(len(self.weight), -1, width)
        places = _places(sizes)
        largest = sizes.gather(-1, places[..., None])[..., 0]
        squares = (largest / qmax).square_()
        steps = squares.sum(0)  # [groups]
        shares = (self.energy / ranges.square()).reshape(-1, width) / 12
        noise = shares.sum(1)
        # A range widens the steps of the rows whose largest weight it multiplies, and shrinks its own input's part.
        wider = torch.zeros_like(ranges).index_add_(
            0, (places + width * torch.arange(len(steps), device=places.device)).flatten(), (squares * noise).flatten()
        )
        slopes = 2 * (wider - (shares * steps[:, None]).flatten())
        error = float((steps * noise).sum())
        if bits is None:
            return error, slopes
        rounding = self.read * ranges.square() / (12 * (2 ** (bits - 1) - 1) ** 2)
        clipped, falling = (CLIPPING_WEIGHT * self.read * part for part in self.tail.clipped(ranges))
        slopes += 2 * rounding - ranges * falling
        return error + float(rounding.sum() + clipped.sum()), slopes


def _places(sizes: torch.Tensor) -> torch.Tensor:
    """Where the largest value of each row is, int64; by numpy on a CPU, where torch looks at one value after another."""
    return torch.from_numpy(sizes.numpy().argmax(-1)) if sizes.device.type == "cpu" else sizes.argmax(-1)


def subsample_rows(weight: torch.Tensor) -> torch.Tensor:
    """At most ROWS rows, evenly spread."""
    return weight[torch.linspace(0, len(weight) - 1, MAX_ROWS).long()] if len(weight) > MAX_ROWS else weight


def optimize_factors(noise: ErrorModel, starts: list[torch.Tensor], expand: torch.Tensor) -> torch.Tensor:
    """The factors with the least expected error, by gradient from the best of `starts`.

    starts: float32 [factors]; expand: int64 [in], the factor of each input.
    """
    with one_thread():
        peak = noise.tail.top[0].clamp(min=1e-6)
        # A start says how factors relate; as ranges they cover the largest values, once just so and once with room.
        ranged = [start * (peak / start[expand]).amax() * room for start in starts for room in (1.0, 2.0)]
        errors = [float(noise.expected(start[expand])) for start in ranged]
        best = min(errors)
        found = logs = ranged[errors.index(best)].log()
        mean, square = torch.zeros_like(logs), torch.zeros_like(logs)
        for step in range(STEPS):
            error, slopes = noise.slopes(logs.exp()[expand])
            if error < best:
                best, found = error, logs
            # Adam (Kingma and Ba 2014, algorithm 1) on the error's logarithm, in ever smaller steps.
            slope = torch.zeros_like(logs).index_add_(0, expand, slopes) / error
            mean = FADE_MEAN * mean + (1 - FADE_MEAN) * slope
            square = FADE_SQUARE * square + (1 - FADE_SQUARE) * slope.square()
            sizes = (square / (1 - FADE_SQUARE ** (step + 1))).sqrt() + 1e-8
            logs = logs - RATE * (1 - step / STEPS) * mean / (1 - FADE_MEAN ** (step + 1)) / sizes
        return found.exp()


def choose_expected_scale(tail: OutlierTail, weight: torch.Tensor, num_bits: int) -> float:
    """The static per-tensor scale with the least expected error. weight: float32 [out, in] of all linears that read it."""
    energy, qmax = weight.square().sum(0), 2 ** (num_bits - 1) - 1
    peak = float(tail.top[0].max())

    def error(limit: float) -> float:
        rounding = limit**2 * float(energy.sum()) / (12 * qmax**2)
        return rounding + CLIPPING_WEIGHT * float((energy * tail.clipped(torch.full_like(energy, limit))[0]).sum())

    with one_thread():
        return activation_scale(min((error(peak * part), peak * part) for part in RANGES)[1], num_bits)
