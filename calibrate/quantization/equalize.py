"""Moving outlier channels out of activations into the weights that make them, exactly. torch.

x / s is computed by whoever produces x (a norm's gain, the rows of v_proj or up_proj), W * s by whoever reads it, so the
float model is unchanged while the quantizers see tamer values. Source: SmoothQuant (Xiao et al. 2022, section 4) and AWQ
(Lin et al. 2023, section 3.2), with the exponent searched on the group's output error with the real quantizers in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.shared_inputs import ChannelSharing, SharedInput, find_channel_sharing
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.config import Equalization
from qvlm_export.calibrate.quantization.expected_error import (
    ErrorModel,
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

STARTS = (0.5, 0.75, 1.0)  # of the gradient descent on expected errors
EXPONENTS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
MAX_FACTOR = 256.0
SMOOTHQUANT_EXPONENT = 0.5  # its paper's


@dataclass(frozen=True)
class EqualizationInputs:
    """What a group reads: tokens [n, in]. peak, mean: magnitudes of each channel; rows: some of the tokens, to judge on.

    weights: what each token counts, float32 [n]; None for all alike.
    """

    tokens: torch.Tensor
    peak: torch.Tensor
    mean: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor | None = None


def gather_inputs(tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor | None = None) -> EqualizationInputs:
    """tokens: float32 [tokens, in]; chosen: indices of the rows to judge on; weights: what each token counts."""
    return EqualizationInputs(tokens, tokens.abs().amax(0), tokens.abs().mean(0), tokens[chosen], weights)


def choose_factors(
    folding: Equalization,
    producer: str,
    inputs: EqualizationInputs,
    weight: torch.Tensor,
    scheme: LinearScheme,
    *,
    sharing: ChannelSharing,
) -> torch.Tensor | None:
    """The factors that `equalization` gives a group whose input `preceding` makes, None for none; see `method.Folding`."""
    if folding == "none" or (folding == "smoothquant" and producer.startswith(("self_attn", "mlp"))):
        return None
    peak, size = sharing.reduce(inputs.peak), sharing.reduce(weight.abs().amax(0))
    if folding == "smoothquant":
        return _tidy(_smoothing(peak, size, SMOOTHQUANT_EXPONENT))
    if folding == "expected":
        channels = torch.arange(len(peak), device=peak.device)
        starts = [_smoothing(peak, size, exponent) for exponent in STARTS]
        energy = compute_residual_energy(inputs.tokens, inputs.weights)
        noise = ErrorModel(fit_tail(inputs.tokens), energy, subsample_rows(weight), scheme)
        return _tidy(optimize_factors(noise, starts, sharing.expand(channels)))
    if folding == "awq":
        mean = sharing.reduce(inputs.mean).clamp(min=1e-6)
        return _best([_tidy(mean ** (i / 20)) for i in range(20)], inputs, weight, scheme, sharing)
    return search_factors(inputs, weight, scheme, sharing)


def search_factors(
    inputs: EqualizationInputs, weight: torch.Tensor, scheme: LinearScheme, sharing: ChannelSharing
) -> torch.Tensor:
    """Factors s (per producer channel) with the least output error of quantized (W * s) on quantized (x / s).

    weight: float32 [out, in] of the group's linears together.
    """
    peak, mean = sharing.reduce(inputs.peak), sharing.reduce(inputs.mean)
    size = sharing.reduce(weight.abs().amax(0))
    candidates = [torch.ones_like(peak)]
    for exponent in EXPONENTS:
        candidates += [_tidy(_smoothing(peak, size, exponent)), _tidy(mean.clamp(min=1e-6) ** exponent)]
    return _best(candidates, inputs, weight, scheme, sharing)


def _smoothing(peak: torch.Tensor, size: torch.Tensor, exponent: float) -> torch.Tensor:
    """SmoothQuant's factors (section 4), untidied."""
    return peak.clamp(min=1e-6) ** exponent / size.clamp(min=1e-6) ** (1 - exponent)


def _best(
    candidates: list[torch.Tensor],
    inputs: EqualizationInputs,
    weight: torch.Tensor,
    scheme: LinearScheme,
    sharing: ChannelSharing,
) -> torch.Tensor:
    """The candidate factors with the least output error."""
    wanted = matmul(inputs.rows, weight.T)
    errors = [_output_error(inputs, weight, sharing.expand(c), scheme, wanted) for c in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _tidy(factors: torch.Tensor) -> torch.Tensor:
    """Geometric mean 1, and no factor so large that float16 would lose the rest."""
    centred = factors / factors.log().mean().exp()
    return centred.clamp(1 / MAX_FACTOR, MAX_FACTOR)


def _output_error(
    inputs: EqualizationInputs, weight: torch.Tensor, factors: torch.Tensor, scheme: LinearScheme, wanted: torch.Tensor
) -> float:
    scaled = weight * factors
    scale = weight_scale(group_amax(scaled, scheme), scheme)
    rounded = round_to_codes(scaled, scale, scheme).float() * expand_scales(scale, weight.shape[1])
    x = inputs.rows / factors
    if scheme.activation_bits is not None:
        x = fake_quantize(x, activation_scale(float(x.abs().max()), scheme.activation_bits), scheme.activation_bits)
    return squared_sum(matmul(x, rounded.T) - wanted)


def _stored_gain(folded: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """As float16 has it; where that is 0 or infinite, the gain as it was."""
    half = folded.half()
    return torch.where((half != 0) & half.isfinite(), half, gain.half()).float()


def apply_equalization_(module: nn.Module, group: SharedInput, factors: torch.Tensor) -> torch.Tensor:
    """Divides the producer's output channels and multiplies the readers' columns, in place; returns the factors used.

    Exact: a norm's new gain is rounded to float16 first (as it will be stored), and the readers are scaled by what that
    really changed.
    """
    if group.preceding is None:
        return torch.ones_like(factors)
    weight = module.get_parameter(f"{group.preceding}.weight")
    bias = dict(module.named_parameters()).get(f"{group.preceding}.bias")
    if weight.ndim > 1:
        weight.div_(factors[:, None])
    else:
        gain = weight.clone()
        weight.copy_(_stored_gain(gain / factors, gain))
        factors = torch.where(weight != 0, gain / weight, torch.ones_like(gain))
    if bias is not None:
        bias.div_(factors)
    columns = find_channel_sharing(module, group).expand(factors)
    for name in group.linears:
        get_linear(module, name).weight.mul_(columns)
    return columns
