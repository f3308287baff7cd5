"""Quantizing the linears that share an input: its range, where their weights aim, scales and codes. torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.config import LinearConfig
from qvlm_export.calibrate.quantization.expected_error import choose_expected_scale, fit_tail
from qvlm_export.calibrate.quantization.hessian import HessianFactor, factor_hessian
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    activation_scale_nearest,
    covering_scale,
    fake_quantize,
    group_amax,
    round_to_codes,
    weight_scale,
)
from qvlm_export.calibrate.quantization.range_search import search_activation_scale, search_weight_scale
from qvlm_export.calibrate.rounding.gptq import gptq_round, search_gptq_scale
from qvlm_export.calibrate.rounding.kronecker_rounding import factor_output_hessian, kronecker_round
from qvlm_export.calibrate.rounding.output_hessian import root_output_importance
from qvlm_export.calibrate.rounding.output_matching import match_outputs, match_outputs_by_tokens

WIDE_INPUT = 1024  # inputs from which on solving for as many columns as there are outputs takes longer than a product
MAX_SEARCH_ROWS = 512  # rows of a group's input that folding and activation ranges are judged on


@dataclass(frozen=True)
class LayerInputs:
    """A group's input, float32 [tokens, in]. wanted: in the float model, seen: from the quantized prefix.

    weights: what each row counts, float32 [tokens]; None for all alike.
    """

    float_rows: torch.Tensor
    quantized_rows: torch.Tensor
    weights: torch.Tensor | None = None

    def scale_by_root_weights(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` by the root of what each counts."""
        return rows if self.weights is None else rows * self.weights.sqrt()[:, None]

    def scale_by_weights(self, seen: torch.Tensor) -> torch.Tensor:
        """`quantized_rows` by what each row counts: with C for it, the Gram matrix is C^T seen."""
        return seen if self.weights is None else seen * self.weights[:, None]

    def cross_term(self, counted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W wanted^T C, float32 [out, in]; by way of the smaller of W wanted^T and wanted^T C. weight: W [out, in]."""
        if len(weight) < weight.shape[1]:
            return matmul(matmul(self.float_rows, weight.T).T, counted)
        return matmul(weight, matmul(self.float_rows.T, counted))

    def match_outputs(self, weight: torch.Tensor, seen: torch.Tensor, gram: torch.Tensor, ridge: float) -> torch.Tensor:
        """`match_outputs` of W [out, in]. It is linear, so for many outputs the identity is aimed, and multiplied by W.

        seen: as quantized; gram: of it.
        """
        into = weight.shape[1]
        if len(seen) < into:
            return match_outputs_by_tokens(
                weight, self.scale_by_root_weights(self.float_rows), self.scale_by_root_weights(seen), gram, ridge
            )
        counted = self.scale_by_weights(seen)
        if WIDE_INPUT <= into < len(weight):
            pulled = matmul(self.float_rows.T, counted)
            return matmul(weight, match_outputs(torch.eye(into, device=weight.device), gram, pulled, ridge))
        return match_outputs(weight, gram, self.cross_term(counted, weight), ridge)


def quantize_linears(
    weights: Mapping[str, torch.Tensor],
    plan: Mapping[str, LinearScheme],
    variant: LinearConfig,
    rows: LayerInputs,
    metrics: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, QuantizedLinear]:
    """Ranges and codes of linears that share an input. weights: float32 [out, in], folded.

    metrics: by linear, of its output, as `kronecker_rounding.py` keeps them; for two-sided rounding.
    """
    found: dict[str, QuantizedLinear] = {}
    for bits, part in split_by_activation_bits(weights, plan).items():  # those of other bits read other values
        found |= _quantized_alike(part, plan, bits, (variant, rows, metrics))
    return {name: found[name] for name in weights}


def split_by_activation_bits(
    weights: Mapping[str, torch.Tensor], plan: Mapping[str, LinearScheme]
) -> dict[int | None, dict[str, torch.Tensor]]:
    """The weights of linears that read their input in as many bits, None for float."""
    parts: dict[int | None, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        parts.setdefault(plan[name].activation_bits, {})[name] = weight
    return parts


def _quantized_alike(
    weights: dict[str, torch.Tensor],
    plan: Mapping[str, LinearScheme],
    num_bits: int | None,
    how: tuple[LinearConfig, LayerInputs, Mapping[str, torch.Tensor] | None],
) -> dict[str, QuantizedLinear]:
    """`quantize_linears` of linears whose input has the same bits, None for float."""
    variant, rows, metrics = how
    input_scale: float | None = None
    seen = rows.quantized_rows
    if num_bits is not None:
        input_scale = choose_input_scale(variant, weights, rows, metrics, num_bits)
        seen = fake_quantize(seen, input_scale, num_bits)
    gram = matmul(rows.scale_by_weights(seen).T, seen)
    if variant.ridge is not None:
        whole = torch.cat(list(weights.values())) if len(weights) > 1 else next(iter(weights.values()))
        aimed = rows.match_outputs(whole, seen, gram, variant.ridge)
        weights = dict(zip(weights, aimed.split([len(w) for w in weights.values()]), strict=True))
        del whole, aimed
    del seen
    rounder = factor_hessian(gram) if variant.rounding != "nearest" else None
    found = {}
    for names in _alike(weights, plan, apart=variant.rounding == "two-sided"):
        scheme, sizes = plan[names[0]], [len(weights[name]) for name in names]
        weight = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        metric = (metrics or {})[names[0]] if variant.rounding == "two-sided" else None
        codes, scale = _rounded(weight, gram, rounder, metric, (variant, scheme))
        for name, code, step in zip(names, codes.split(sizes), scale.split(sizes), strict=True):
            found[name] = QuantizedLinear(scheme, code.cpu().numpy(), step.cpu().numpy(), input_scale)
    return found


def _alike(weights: Mapping[str, torch.Tensor], plan: Mapping[str, LinearScheme], *, apart: bool) -> list[list[str]]:
    """Linears of one scheme together, whose outputs can be rounded as if of one linear; or each of them apart."""
    together: dict[object, list[str]] = {}
    for name in weights:
        together.setdefault(name if apart else plan[name], []).append(name)
    return list(together.values())


def _rounded(
    weight: torch.Tensor,
    gram: torch.Tensor,
    rounder: HessianFactor | None,
    metric: torch.Tensor | None,
    how: tuple[LinearConfig, LinearScheme],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales as stored. rounder: None for rounding to nearest; metric: for two-sided rounding."""
    variant, scheme = how
    scale = choose_weight_scale(variant, weight, gram, scheme)
    if rounder is None:
        return round_to_codes(weight, scale, scheme), scale
    if variant.weight_ranges == "rounded":
        scale = search_gptq_scale(weight, gram, rounder, scale, scheme)
    if metric is None:
        return gptq_round(weight, rounder, scale, scheme), scale
    return kronecker_round(weight, rounder, factor_output_hessian(metric, weight.device), scale, scheme), scale


def choose_weight_scale(
    variant: LinearConfig, weight: torch.Tensor, gram: torch.Tensor, scheme: LinearScheme
) -> torch.Tensor:
    """As stored, of the range that the variant chooses before it rounds. weight: float32 [out, in]; gram: of its input."""
    if variant.weight_ranges == "output":
        return search_weight_scale(weight, gram, scheme)
    if variant.weight_ranges == "absmax":
        return weight_scale(group_amax(weight, scheme), scheme)
    return covering_scale(weight, scheme)


def choose_input_scale(
    variant: LinearConfig,
    weights: Mapping[str, torch.Tensor],
    rows: LayerInputs,
    metrics: Mapping[str, torch.Tensor] | None,
    num_bits: int,
) -> float:
    """Of the range that the variant chooses for linears that read their input in so many bits; as `quantize_linears`."""
    whole = torch.cat(list(weights.values()))
    if variant.rounding == "two-sided" and variant.by_output and metrics is not None:
        whole.mul_(root_output_importance([metrics[name] for name in weights], whole.device)[:, None])
    return _input_scale(variant, rows.quantized_rows, rows.float_rows, whole, num_bits)


def _input_scale(
    variant: LinearConfig, seen: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor, num_bits: int
) -> float:
    if variant.activation_ranges == "absmax":
        return activation_scale(float(seen.abs().max()), num_bits)
    if variant.activation_ranges == "expected":
        return choose_expected_scale(fit_tail(seen), weight, num_bits)
    rows = select_rows(seen)
    return activation_scale_nearest(search_activation_scale(seen[rows], wanted[rows], weight, num_bits))


def select_rows(rows: torch.Tensor) -> torch.Tensor:
    """Indices of at most SEARCH_TOKENS rows: evenly spread over all samples, and those with the largest values.

    A few tokens (the first of a sequence, mostly) have values far beyond all others; without them a range would look safe
    that clips them.
    """
    if len(rows) <= MAX_SEARCH_ROWS:
        return torch.arange(len(rows), device=rows.device)
    extreme = torch.topk(rows.abs().amax(dim=1), MAX_SEARCH_ROWS // 8).indices
    spread = torch.linspace(0, len(rows) - 1, MAX_SEARCH_ROWS - len(extreme)).long().to(rows.device)
    return torch.unique(torch.cat([spread, extreme]))
