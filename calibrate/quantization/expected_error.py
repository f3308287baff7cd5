"""Analytic model of the expected quantization error, from which equalization factors and activation ranges are chosen.

A rounded value is off by step / sqrt(12) in root mean square. For y = W x with x / s rounded to steps that cover the range
R, the expected squared error of y is

    sum over weights   (step of its group)^2 / 12 * v_j / s_j^2        rounding of W * s
    + sum over inputs  |W_j|^2 s_j^2 * (R / qmax)^2 / 12               rounding of x / s
    + sum over inputs  |W_j|^2 * E[(|x_j| - R s_j)+^2]                 clipping of values beyond the range

where v_j is E[x_j^2], or the part of it that GPTQ cannot compensate. Every channel has a factor of its own, whereas
SmoothQuant and AWQ search one exponent for all channels.

The calibration set is small, and deployment brings larger values than any in it. Values beyond the largest observed ones are
modelled by an exponential tail, whose length is estimated from the largest values of separate segments of the tokens.
Clipping hits few tokens hard, where rounding hits all tokens a little, and one token is enough to lose an answer, so
clipping errors are multiplied by CLIPPING_WEIGHT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import gram
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.hessian import factor_hessian
from qvlm_export.calibrate.quantization.quantizer import activation_scale

CLIPPING_WEIGHT = 10.0
TAIL_SEGMENTS = 64  # segments of tokens, from whose largest values the length of the tail is estimated
TAIL_PEAKS = 8  # the largest of those values, which are used
TAIL_VALUES = 32  # largest values kept for each channel
_GROUPED_TOKENS = 16  # consecutive tokens whose largest values are compared first
MAX_ROWS = 512  # rows of a weight that are used; more add nothing about the magnitudes of its groups
STEPS, RATE = 40, 0.1  # of Adam on the logarithms of the factors
BETA1, BETA2 = 0.9, 0.999  # of Adam, as in its paper
# Candidates for an activation range, as multiples of the largest observed magnitude.
RANGE_FACTORS = (
    *(0.1, 0.125, 0.15, 0.175),
    *(0.2 + 0.05 * i for i in range(17)),
    *(1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
)


@dataclass(frozen=True)
class OutlierTail:
    """The distribution of each channel's large magnitudes: the observed ones, each with an exponential tail beyond it.

    top: float32 [TAIL_VALUES or fewer, channels], largest first. length: float32 [channels], mean of the exponential tail.
    tokens: the number of tokens observed.
    """

    top: torch.Tensor
    length: torch.Tensor
    tokens: int

    def clipping_error(self, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected squared excess of a token's magnitude over `limit`, and minus its derivative by the limit.

        limit, both results: float32 [channels].
        """
        over = self.top - limit
        inside = over.clamp(min=0)
        # exp() is 1 for a value above the limit. Operations are in place only where autograd, which tests use, can follow.
        beyond = ((over - inside).div_(self.length).exp_() * self.length).add_(inside)
        excess = inside.square().add_(2 * self.length * beyond).sum(0)
        return excess / self.tokens, 2 * beyond.sum(0) / self.tokens

    def divide(self, factors: torch.Tensor) -> OutlierTail:
        """The tail of activations divided by `factors`, float32 [channels]."""
        return OutlierTail(self.top / factors, self.length / factors, self.tokens)


def fit_tail(rows: torch.Tensor) -> OutlierTail:
    """The tail of observed activations. rows: float32 [tokens, channels], the samples in order."""
    magnitudes = rows.abs()
    count = max(1, min(TAIL_SEGMENTS, len(magnitudes) // 4))
    segment_peaks = torch.stack([part.amax(0) for part in magnitudes.tensor_split(count)])
    peaks = segment_peaks.topk(min(TAIL_PEAKS + 1, count), dim=0).values
    length = (peaks[:-1] - peaks[-1:]).mean(0) if len(peaks) > 1 else peaks[0]
    top = _find_largest(magnitudes, min(TAIL_VALUES, len(magnitudes)))
    # A channel that hardly varies here may vary in deployment; one that is always 0 still gets a length above 0.
    return OutlierTail(top, torch.maximum(length, 0.05 * top[0]).clamp(min=1e-8), len(magnitudes))


def _find_largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest values of each channel, largest first, float32 [count, channels].

    magnitudes: float32 [tokens, channels], is not changed. On a CPU most tokens are passed over: no group of them can hold
    one of these values unless its largest is among the `count` largest of all groups.
    """
    tokens, channels = magnitudes.shape
    grouped = tokens // _GROUPED_TOKENS * _GROUPED_TOKENS
    if magnitudes.device.type != "cpu" or grouped < 2 * count * _GROUPED_TOKENS:
        return magnitudes.topk(count, dim=0).values
    largest = magnitudes[:grouped].view(-1, _GROUPED_TOKENS, channels).amax(1).T.contiguous().numpy()
    groups = np.argpartition(largest, -count, axis=1)[:, -count:]
    rows = (groups[:, :, None] * _GROUPED_TOKENS + np.arange(_GROUPED_TOKENS)).reshape(channels, -1)
    candidates = torch.cat([magnitudes[:grouped].T.gather(1, torch.from_numpy(rows)), magnitudes[grouped:].T], dim=1)
    return candidates.topk(count, dim=1).values.T.contiguous()


def compute_residual_energy(rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The part of each input's mean square that GPTQ cannot compensate, 1 / U_jj^2 with U as in `gptq.py`: float32 [in].

    It scales with the square of the input. rows: float32 [tokens, in]; weights: of the tokens, float32 [tokens], None if all
    are equal.
    """
    return factor_hessian(gram(rows, weights)).residual_energy() / len(rows)


@dataclass(frozen=True)
class ErrorModel:
    """Expected output error of the linears that share an input, as a function of the range of each input channel.

    tail: of the input. residual_energy: v_j of the module docstring, float32 [in]. weight: float32 [out, in] of all linears
    together. scheme: of their weights and inputs.
    """

    tail: OutlierTail
    residual_energy: torch.Tensor
    weight: torch.Tensor
    scheme: LinearScheme

    @cached_property
    def column_energy(self) -> torch.Tensor:
        """|W_j|^2, float32 [in], by which the squared error of each input is multiplied."""
        return self.weight.square().sum(0)

    @cached_property
    def magnitudes(self) -> torch.Tensor:
        """|W_ij|, float32 [out, in]; ranges are above 0, so |W_ij| times a range is the magnitude of the product."""
        return self.weight.abs()

    def expected_error(self, ranges: torch.Tensor) -> torch.Tensor:
        """Expected squared error of a token's output, float32 []. ranges: R s_j of the module docstring, float32 [in].

        The equalization factors s_j are the ranges up to a common factor, on which the error does not depend.
        """
        qmax, bits = self.scheme.qmax, self.scheme.activation_bits
        scaled = self.magnitudes * ranges
        width = self.scheme.group_size or scaled.shape[1]
        steps = (scaled.reshape(len(scaled), -1, width).amax(-1) / qmax).square().sum(0)
        error = (steps.repeat_interleave(width) * self.residual_energy / ranges.square()).sum() / 12
        if bits is None:
            return error
        rounding = (self.column_energy * ranges.square()).sum() / (12 * (2 ** (bits - 1) - 1) ** 2)
        return error + rounding + CLIPPING_WEIGHT * (self.column_energy * self.tail.clipping_error(ranges)[0]).sum()

    def error_and_gradient(self, ranges: torch.Tensor) -> tuple[float, torch.Tensor]:
        """`expected_error` and its gradient with respect to the logarithms of the ranges, float32 [in].

        The gradient is written out because autograd takes four times as long, a third of all time on a small model.
        """
        qmax, bits, width = self.scheme.qmax, self.scheme.activation_bits, self.scheme.group_size or self.weight.shape[1]
        scaled = (self.magnitudes * ranges).reshape(len(self.weight), -1, width)
        positions = _argmax_last(scaled)
        amax = scaled.gather(-1, positions[..., None])[..., 0]
        squared_steps = (amax / qmax).square_()
        steps = squared_steps.sum(0)  # [groups]
        shares = (self.residual_energy / ranges.square()).reshape(-1, width) / 12
        noise = shares.sum(1)
        # A larger range widens the steps of the rows whose largest weight it multiplies, and shrinks its own input's part.
        wider = torch.zeros_like(ranges).index_add_(
            0,
            (positions + width * torch.arange(len(steps), device=positions.device)).flatten(),
            (squared_steps * noise).flatten(),
        )
        gradient = 2 * (wider - (shares * steps[:, None]).flatten())
        error = float((steps * noise).sum())
        if bits is None:
            return error, gradient
        rounding = self.column_energy * ranges.square() / (12 * (2 ** (bits - 1) - 1) ** 2)
        clipping, falling = (CLIPPING_WEIGHT * self.column_energy * part for part in self.tail.clipping_error(ranges))
        gradient += 2 * rounding - ranges * falling
        return error + float(rounding.sum() + clipping.sum()), gradient


def _argmax_last(x: torch.Tensor) -> torch.Tensor:
    """The index, int64, of the largest value along the last dimension; by numpy on a CPU, as torch does not vectorize it."""
    return torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)


def subsample_rows(weight: torch.Tensor) -> torch.Tensor:
    """At most MAX_ROWS evenly spread rows of a weight [out, in], the first and the last among them."""
    return weight[torch.linspace(0, len(weight) - 1, MAX_ROWS).long()] if len(weight) > MAX_ROWS else weight


def optimize_factors(model: ErrorModel, starts: list[torch.Tensor], expand: torch.Tensor) -> torch.Tensor:
    """The factors with the least expected error, float32 [factors], by STEPS steps of Adam from the best of `starts`.

    starts: float32 [factors] each; expand: int64 [in], index of each input's factor.
    """
    with one_thread():
        peak = model.tail.top[0].clamp(min=1e-6)
        # A start fixes the ratios of the factors. As ranges they are scaled to cover the largest values, and twice those.
        candidates = [start * (peak / start[expand]).amax() * room for start in starts for room in (1.0, 2.0)]
        errors = [float(model.expected_error(candidate[expand])) for candidate in candidates]
        least = min(errors)
        best = logs = candidates[errors.index(least)].log()
        mean, square = torch.zeros_like(logs), torch.zeros_like(logs)
        for step in range(STEPS):
            error, range_gradient = model.error_and_gradient(logs.exp()[expand])
            if error < least:
                least, best = error, logs
            # Adam (Kingma and Ba 2014, algorithm 1) on the logarithm of the error, with a linearly decaying rate.
            gradient = torch.zeros_like(logs).index_add_(0, expand, range_gradient) / error
            mean = BETA1 * mean + (1 - BETA1) * gradient
            square = BETA2 * square + (1 - BETA2) * gradient.square()
            root = (square / (1 - BETA2 ** (step + 1))).sqrt() + 1e-8
            logs = logs - RATE * (1 - step / STEPS) * mean / (1 - BETA1 ** (step + 1)) / root
        return best.exp()


def choose_expected_scale(tail: OutlierTail, energy: torch.Tensor, num_bits: int) -> float:
    """The static per-tensor input scale with the least expected error of rounding and clipping.

    tail: of the shared input; energy: |W_j|^2 of the columns of all linears that read it, float32 [in]; num_bits: of the
    codes.
    """
    qmax = 2 ** (num_bits - 1) - 1
    peak = float(tail.top[0].max())

    def error(limit: float) -> float:
        rounding = limit**2 * float(energy.sum()) / (12 * qmax**2)
        return rounding + CLIPPING_WEIGHT * float((energy * tail.clipping_error(torch.full_like(energy, limit))[0]).sum())

    with one_thread():
        return activation_scale(min((error(peak * factor), peak * factor) for factor in RANGE_FACTORS)[1], num_bits)
