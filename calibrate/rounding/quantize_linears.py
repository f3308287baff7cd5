"""Quantizes the linears that share an input: input range, output matching (ridge regression), weight scales and rounding.

What goes in are their float weights and their shared input in the float and in the quantized model; what comes out are codes
and scales. They are quantized together because they have one input range and one input Hessian H = X_q^T X_q
(tokens as rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import gram, matmul, transposed_matmul
from qvlm_export.calibrate.quantization.config import LinearConfig
from qvlm_export.calibrate.quantization.equalize import EqualizationInputs
from qvlm_export.calibrate.quantization.expected_error import choose_expected_scale, fit_tail
from qvlm_export.calibrate.quantization.hessian import HessianFactor, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    activation_scale_nearest,
    covering_scale,
    fake_quantize,
    group_amax,
    round_to_codes,
    stored_input_scale,
    weight_scale,
)
from qvlm_export.calibrate.rounding.gptq import gptq_round
from qvlm_export.calibrate.rounding.kronecker_rounding import factor_output_hessian, kronecker_round
from qvlm_export.calibrate.rounding.output_hessian import root_output_importance
from qvlm_export.calibrate.rounding.output_matching import match_outputs, match_outputs_by_tokens
from qvlm_export.calibrate.rounding.range_search import (
    search_activation_scale,
    search_residual_scale,
    search_weight_scale,
)
from qvlm_export.calibrate.rounding.scale_refit import refit_scales

# From this many inputs on, output matching for more outputs than inputs solves for the identity instead, and multiplies.
WIDE_INPUT = 1024
MAX_SEARCH_ROWS = 512  # rows of a shared input on which equalization and activation ranges are judged


@dataclass(frozen=True)
class LayerInputs:
    """The shared input of linears: X in the float model, X_q after the already quantized preceding blocks.

    float_rows: X, quantized_rows: X_q, float32 [tokens, in]. weights: of the tokens, float32 [tokens]; None if all equal.
    residual_gap: what the output should make up for where it is added to the residual stream, the float stream minus the
    quantized one, float32 [tokens, out]; None for nothing.
    scales: of the quantized input by number of bits, where they are known already.
    """

    float_rows: torch.Tensor
    quantized_rows: torch.Tensor
    weights: torch.Tensor | None = None
    residual_gap: torch.Tensor | None = None
    scales: Mapping[int, float] = field(default_factory=dict)

    def scale_by_root_weights(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [tokens, in], each multiplied by the square root of its token's weight."""
        return rows if self.weights is None else rows * self.weights.sqrt()[:, None]

    def scale_by_weights(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [tokens, in], each multiplied by its token's weight: w X_q, with which the Hessian is (w X_q)^T X_q."""
        return rows if self.weights is None else rows * self.weights[:, None]

    def cross_term(self, weighted_rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W X^T (w X_q), float32 [out, in], with the smaller of W X^T and X^T (w X_q) in between.

        With a residual gap it is (X W^T + gap)^T (w X_q). weighted_rows: w X_q, as `scale_by_weights` returns it; weight:
        W [out, in].
        """
        if self.residual_gap is None and len(weight) >= weight.shape[1]:
            return matmul(weight, transposed_matmul(self.float_rows, weighted_rows))
        target = matmul(self.float_rows, weight.T)
        if self.residual_gap is not None:
            target += self.residual_gap
        return transposed_matmul(target, weighted_rows)

    def match_outputs(
        self, weight: torch.Tensor, quantized_rows: torch.Tensor, hessian: torch.Tensor, ridge: float
    ) -> torch.Tensor:
        """The weight V [out, in] that output matching gives for W, see `output_matching.py`.

        weight: W [out, in]; quantized_rows: X_q after the input quantizer; hessian: H of those [in, in]. Output matching is
        linear in W, so for many outputs without a residual gap the identity is matched and multiplied by W.
        """
        into = weight.shape[1]
        if len(quantized_rows) < into:
            return match_outputs_by_tokens(
                weight,
                self.scale_by_root_weights(self.float_rows),
                self.scale_by_root_weights(quantized_rows),
                hessian,
                ridge,
                residual_gap=None if self.residual_gap is None else self.scale_by_root_weights(self.residual_gap),
            )
        weighted_rows = self.scale_by_weights(quantized_rows)
        if self.residual_gap is None and WIDE_INPUT <= into < len(weight):
            cross_term = transposed_matmul(self.float_rows, weighted_rows)
            return matmul(weight, match_outputs(torch.eye(into, device=weight.device), hessian, cross_term, ridge))
        return match_outputs(weight, hessian, self.cross_term(weighted_rows, weight), ridge)


def quantize_linears(
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, LinearScheme],
    config: LinearConfig,
    inputs: LayerInputs,
    output_hessians: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, QuantizedLinear]:
    """The quantized linears by name, in the order of `weights`.

    weights: float32 [out, in] of linears that share an input, equalized. schemes: of each linear. output_hessians: G of each
    linear's output or its sketch (`output_hessian.py`), needed for Kronecker-factored rounding only.
    """
    linears: dict[str, QuantizedLinear] = {}
    # Linears that read the input in other bits read other values, and so have another Hessian.
    for bits, part in split_by_activation_bits(weights, schemes).items():
        linears |= _quantize_same_bits(part, schemes, bits, (config, inputs, output_hessians))
    return {name: linears[name] for name in weights}


def split_by_activation_bits(
    weights: Mapping[str, torch.Tensor], schemes: Mapping[str, LinearScheme]
) -> dict[int | None, dict[str, torch.Tensor]]:
    """The weights of linears by the bits in which they read their input, None for float."""
    parts: dict[int | None, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        parts.setdefault(schemes[name].activation_bits, {})[name] = weight
    return parts


def _quantize_same_bits(
    weights: dict[str, torch.Tensor],
    schemes: Mapping[str, LinearScheme],
    num_bits: int | None,
    settings: tuple[LinearConfig, LayerInputs, Mapping[str, torch.Tensor] | None],
) -> dict[str, QuantizedLinear]:
    """`quantize_linears` for linears that read their input in the same number of bits, None for float."""
    config, inputs, output_hessians = settings
    input_scale: float | None = None
    quantized_rows = inputs.quantized_rows
    if num_bits is not None:
        known = inputs.scales.get(num_bits)
        chosen = choose_input_scale(config, weights, inputs, output_hessians, num_bits) if known is None else known
        input_scale = stored_input_scale(chosen, schemes[next(iter(weights))])
        quantized_rows = fake_quantize(quantized_rows, input_scale, num_bits)
    hessian = gram(quantized_rows, inputs.weights)
    if config.ridge is not None:
        joined = torch.cat(list(weights.values())) if len(weights) > 1 else next(iter(weights.values()))
        matched = inputs.match_outputs(joined, quantized_rows, hessian, config.ridge)
        weights = dict(zip(weights, matched.split([len(w) for w in weights.values()]), strict=True))
        del joined, matched
    del quantized_rows
    factor = factor_hessian(hessian, config.damping) if config.rounding != "nearest" else None
    linears = {}
    for names in _join_for_rounding(weights, schemes):
        scheme, sizes = schemes[names[0]], [len(weights[name]) for name in names]
        weight = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        measured = [output_hessians[name] for name in names] if config.rounding == "kronecker" and output_hessians else []
        output_factors = [factor_output_hessian(one, weight.device, config.output_damping) for one in measured]
        codes, scale = _round_weight(weight, hessian, factor, output_factors, (config, scheme))
        for name, code, step in zip(names, codes.split(sizes), scale.split(sizes), strict=True):
            linears[name] = QuantizedLinear(scheme, code.cpu().numpy(), step.cpu().numpy(), input_scale)
    return linears


def _join_for_rounding(weights: Mapping[str, torch.Tensor], schemes: Mapping[str, LinearScheme]) -> list[list[str]]:
    """Lists of names of linears to round as if they were one: those of one scheme."""
    names_by_scheme: dict[LinearScheme, list[str]] = {}
    for name in weights:
        names_by_scheme.setdefault(schemes[name], []).append(name)
    return list(names_by_scheme.values())


def _round_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factor: HessianFactor | None,
    output_factors: Sequence[HessianFactor],
    settings: tuple[LinearConfig, LinearScheme],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales as stored.

    factor: of the Hessian, None for round-to-nearest; output_factors: of each linear's output Hessian, empty for all but
    Kronecker-factored rounding.
    """
    config, scheme = settings
    scale = choose_weight_scale(config, weight, hessian, factor, scheme)
    if factor is None:
        return round_to_codes(weight, scale, scheme), scale
    if output_factors:
        fitted = hessian if config.refit_scales else None
        return kronecker_round(weight, factor, output_factors, scale, scheme, hessian=fitted)
    codes = gptq_round(weight, factor, scale, scheme)
    if config.refit_scales:
        scale = refit_scales(weight, hessian, codes, scale, scheme, damping=factor.damping)
    return codes, scale


def choose_weight_scale(
    config: LinearConfig, weight: torch.Tensor, hessian: torch.Tensor, factor: HessianFactor | None, scheme: LinearScheme
) -> torch.Tensor:
    """The weight scales, as stored, of the range that `config.weight_ranges` chooses before rounding.

    weight: float32 [out, in]; hessian: of its input [in, in]; factor: of the Hessian, None for round-to-nearest, which
    compensates nothing.
    """
    if config.weight_ranges == "residual" and factor is not None:
        return search_residual_scale(weight, factor, scheme)
    if config.weight_ranges == "output":
        return search_weight_scale(weight, hessian, scheme)
    if config.weight_ranges == "absmax":
        return weight_scale(group_amax(weight, scheme), scheme)
    return covering_scale(weight, scheme)


def choose_input_scale(
    config: LinearConfig,
    weights: Mapping[str, torch.Tensor],
    inputs: LayerInputs,
    output_hessians: Mapping[str, torch.Tensor] | None,
    num_bits: int,
) -> float:
    """The scale of the shared input, in `num_bits` bits, of the range that `config.activation_ranges` chooses.

    The other arguments are those of `quantize_linears`.
    """
    joined = torch.cat(list(weights.values()))
    if config.rounding == "kronecker" and config.by_output and output_hessians is not None:
        joined.mul_(root_output_importance([output_hessians[name] for name in weights], joined.device)[:, None])
    return _search_input_scale(config, inputs.quantized_rows, inputs.float_rows, joined, num_bits)


def predict_input_scale(
    config: LinearConfig, statistics: EqualizationInputs, weight: torch.Tensor, columns: torch.Tensor, num_bits: int
) -> float:
    """About the scale that `choose_input_scale` will choose for the shared input once it is divided by `columns`.

    statistics: of the input in the float model; weight: float32 [out, in] of all linears, not yet multiplied by `columns`,
    float32 [in].
    """
    if config.activation_ranges == "expected":
        energy = weight.square().sum(0) * columns.square()
        return choose_expected_scale(statistics.tail.divide(columns), energy, num_bits)
    rows = statistics.rows / columns
    return _search_input_scale(config, rows, rows, weight * columns, num_bits)


def _search_input_scale(
    config: LinearConfig, quantized_rows: torch.Tensor, float_rows: torch.Tensor, weight: torch.Tensor, num_bits: int
) -> float:
    if config.activation_ranges == "absmax":
        return activation_scale(float(quantized_rows.abs().max()), num_bits)
    if config.activation_ranges == "expected":
        return choose_expected_scale(fit_tail(quantized_rows), weight.square().sum(0), num_bits)
    rows = select_rows(quantized_rows)
    return activation_scale_nearest(search_activation_scale(quantized_rows[rows], float_rows[rows], weight, num_bits))


def select_rows(rows: torch.Tensor) -> torch.Tensor:
    """Indices, int64, of at most MAX_SEARCH_ROWS rows: evenly spread over all samples, and those with the largest values.

    A few tokens, mostly the first of a sequence, have values far beyond all others. Without them, a range that clips them
    would look safe.
    """
    if len(rows) <= MAX_SEARCH_ROWS:
        return torch.arange(len(rows), device=rows.device)
    extreme = torch.topk(rows.abs().amax(dim=1), MAX_SEARCH_ROWS // 8).indices
    spread = torch.linspace(0, len(rows) - 1, MAX_SEARCH_ROWS - len(extreme)).long().to(rows.device)
    return torch.unique(torch.cat([spread, extreme]))
