"""Equalization: moves outlier channels of activations into the weights that read them (SmoothQuant, AWQ).

The preceding layer (a norm's gain, the rows of v_proj or up_proj) computes x / s, and the linears that read x use W * s, so
the float model does not change while its quantizers see smaller outliers. Source: SmoothQuant (Xiao et al. 2022, section 4)
and AWQ (Lin et al. 2023, section 3.2). Exponents are searched by the output error of the linears that share the input, with
the real quantizers in the loop; "expected" factors come from `expected_error.py` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.shared_inputs import ChannelSharing, SharedInput, find_channel_sharing
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16, LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.config import Equalization
from qvlm_export.calibrate.quantization.expected_error import (
    ErrorModel,
    OutlierTail,
    compute_residual_energy,
    fit_tail,
    optimize_factors,
    subsample_rows,
)
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    expand_scales,
    fake_quantize,
    group_amax,
    round_to_codes,
    squared_sum,
    weight_scale,
)

STARTS = (0.5, 0.75, 1.0)  # SmoothQuant exponents from which the descent on the expected error starts
EXPONENTS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
MAX_FACTOR = 256.0
SMOOTHQUANT_EXPONENT = 0.5  # as in its paper


@dataclass(frozen=True)
class EqualizationInputs:
    """A shared input and its statistics.

    tokens: float32 [n, in]. peak, mean: largest and mean magnitude of each channel, float32 [in]. rows: some of the tokens,
    on which output errors are measured. weights: of the tokens, float32 [n]; None if all are equal.
    """

    tokens: torch.Tensor
    peak: torch.Tensor
    mean: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor | None = None

    @cached_property
    def tail(self) -> OutlierTail:
        """The distribution of each channel's large magnitudes."""
        return fit_tail(self.tokens)

    @cached_property
    def residual_energy(self) -> torch.Tensor:
        """The part of each channel's mean square that GPTQ cannot compensate, float32 [in]."""
        return compute_residual_energy(self.tokens, self.weights)


def gather_inputs(tokens: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor | None = None) -> EqualizationInputs:
    """The statistics of a shared input.

    tokens: float32 [n, in]; indices: int64, of the rows on which output errors are measured; weights: of the tokens, float32
    [n], None if all are equal.
    """
    magnitudes = tokens.abs()
    return EqualizationInputs(tokens, magnitudes.amax(0), magnitudes.mean(0), tokens[indices], weights)


def choose_factors(
    equalization: Equalization,
    preceding: str,
    inputs: EqualizationInputs,
    weight: torch.Tensor,
    scheme: LinearScheme,
    *,
    sharing: ChannelSharing,
) -> torch.Tensor | None:
    """Equalization factors, float32 [channels of the preceding layer]; None where nothing is equalized.

    equalization: how they are found, see `config.Equalization`. preceding: name of the layer that computes the input;
    weight: float32 [out, in] of the linears that read it; scheme: their scheme; sharing: which inputs share a factor.
    """
    if equalization == "none" or (equalization == "smoothquant" and preceding.startswith(("self_attn", "mlp"))):
        return None
    peak, weight_peak = sharing.reduce(inputs.peak), sharing.reduce(weight.abs().amax(0))
    if equalization == "smoothquant":
        return _normalize(_smoothquant_factors(peak, weight_peak, SMOOTHQUANT_EXPONENT))
    if equalization == "expected":
        channels = torch.arange(len(peak), device=peak.device)
        starts = [_smoothquant_factors(peak, weight_peak, exponent) for exponent in STARTS]
        model = ErrorModel(inputs.tail, inputs.residual_energy, subsample_rows(weight), scheme)
        return _normalize(optimize_factors(model, starts, sharing.expand(channels)))
    if equalization == "awq":
        mean = sharing.reduce(inputs.mean).clamp(min=1e-6)
        return _select_best([_normalize(mean ** (i / 20)) for i in range(20)], inputs, weight, scheme, sharing)
    return search_factors(inputs, weight, scheme, sharing)


def search_factors(
    inputs: EqualizationInputs, weight: torch.Tensor, scheme: LinearScheme, sharing: ChannelSharing
) -> torch.Tensor:
    """Factors s with the least output error of quantized W * s on quantized x / s.

    The result is float32 [channels of the preceding layer]; the candidates are powers of magnitudes (EXPONENTS). weight:
    float32 [out, in] of all linears that share the input.
    """
    peak, mean = sharing.reduce(inputs.peak), sharing.reduce(inputs.mean)
    weight_peak = sharing.reduce(weight.abs().amax(0))
    candidates = [torch.ones_like(peak)]
    for exponent in EXPONENTS:
        candidates += [
            _normalize(_smoothquant_factors(peak, weight_peak, exponent)),
            _normalize(mean.clamp(min=1e-6) ** exponent),
        ]
    return _select_best(candidates, inputs, weight, scheme, sharing)


def _smoothquant_factors(peak: torch.Tensor, weight_peak: torch.Tensor, exponent: float) -> torch.Tensor:
    """SmoothQuant's factors (section 4), before `_normalize`."""
    return peak.clamp(min=1e-6) ** exponent / weight_peak.clamp(min=1e-6) ** (1 - exponent)


def _select_best(
    candidates: list[torch.Tensor],
    inputs: EqualizationInputs,
    weight: torch.Tensor,
    scheme: LinearScheme,
    sharing: ChannelSharing,
) -> torch.Tensor:
    """The candidate factors with the least output error."""
    float_outputs = matmul(inputs.rows, weight.T)
    errors = [_measure_output_error(inputs, weight, sharing.expand(c), scheme, float_outputs) for c in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _normalize(factors: torch.Tensor) -> torch.Tensor:
    """Factors with geometric mean 1, clamped so that none is so large that float16 would lose the others."""
    centred = factors / factors.log().mean().exp()
    return centred.clamp(1 / MAX_FACTOR, MAX_FACTOR)


def _measure_output_error(
    inputs: EqualizationInputs,
    weight: torch.Tensor,
    factors: torch.Tensor,
    scheme: LinearScheme,
    float_outputs: torch.Tensor,
) -> float:
    """Squared error of the outputs of quantized weight * factors on quantized rows / factors. factors: float32 [in]."""
    scaled = weight * factors
    scale = weight_scale(group_amax(scaled, scheme), scheme)
    rounded = round_to_codes(scaled, scale, scheme).float() * expand_scales(scale, weight.shape[1])
    x = inputs.rows / factors
    if scheme.activation_bits is not None:
        x = fake_quantize(x, activation_scale(float(x.abs().max()), scheme.activation_bits), scheme.activation_bits)
    return squared_sum(matmul(x, rounded.T) - float_outputs)


def _round_gain(equalized: torch.Tensor, gain: torch.Tensor, float_type: str) -> torch.Tensor:
    """The equalized gain rounded to `float_type`; the original one, rounded, where the equalized becomes 0 or infinite."""
    dtype = getattr(torch, float_type)
    rounded = equalized.to(dtype)
    return torch.where((rounded != 0) & rounded.isfinite(), rounded, gain.to(dtype)).float()


def apply_equalization_(
    module: nn.Module, shared_input: SharedInput, factors: torch.Tensor, float_type: str = FLOAT16
) -> torch.Tensor:
    """Divides the preceding layer's outputs and multiplies the linears' columns, in place; returns the column factors.

    factors: float32 [channels of the preceding layer]. The result, float32 [in], holds the factors that were really applied:
    a norm's new gain is rounded to `float_type` first, as the graph stores it, and the linears are multiplied by the ratio
    of old and new gain, so the float model stays exact. Without a preceding layer nothing changes.
    """
    if shared_input.preceding is None:
        return torch.ones_like(factors)
    weight = module.get_parameter(f"{shared_input.preceding}.weight")
    bias = dict(module.named_parameters()).get(f"{shared_input.preceding}.bias")
    if weight.ndim > 1:
        weight.div_(factors[:, None])
    else:
        gain = weight.clone()
        weight.copy_(_round_gain(gain / factors, gain, float_type))
        factors = torch.where(weight != 0, gain / weight, torch.ones_like(gain))
    if bias is not None:
        bias.div_(factors)
    columns = find_channel_sharing(module, shared_input).expand(factors)
    for name in shared_input.linears:
        get_linear(module, name).weight.mul_(columns)
    return columns
