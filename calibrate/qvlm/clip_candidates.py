"""Candidate clipping ranges of a layer, and its fake-quantized output with each of them (Q-VLM, arXiv 2410.08119).

A layer is the linears that share an input. Its candidates are the paper's five percentiles of the magnitude, for the input
and for the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import apply_linear
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    expand_scales,
    fake_quantize,
    round_to_codes,
    stored_input_scale,
    weight_scale,
)
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, Clip
from qvlm_export.calibrate.qvlm.partition import LayerInput

Kind = Literal["activation", "weight"]
KINDS: tuple[Kind, Kind] = ("activation", "weight")  # in the order they are searched
ABSMAX_CLIP = PAPER_CLIPS[0]


@dataclass(frozen=True)
class Clips:
    """The clipping ranges of a layer: of its input, and of the weights of all its linears."""

    activation: Clip = ABSMAX_CLIP
    weight: Clip = ABSMAX_CLIP


@dataclass(frozen=True)
class QuantizableLayer:
    """A layer's float linears, and the amax of its input and weights for every clip.

    schemes: of the linears to quantize; the others stay float. ranges: amax of the input. weight_ranges: amax of the weights
    of each linear in `schemes`, float32 [out, in // group_size] or [out].
    """

    linears: Mapping[str, nn.Linear]
    schemes: Mapping[str, LinearScheme]
    ranges: Mapping[Clip, float]
    weight_ranges: Mapping[tuple[str, Clip], torch.Tensor]

    def output(self, rows: torch.Tensor, clips: Clips) -> dict[str, torch.Tensor]:
        """Returns the fake-quantized outputs of the linears with these clips: name -> float32 [tokens, out].

        rows: the layer's input, float32 [tokens, in].
        """
        outputs = {}
        inputs: dict[tuple[float | None, int | None], torch.Tensor] = {(None, None): rows}  # by quantizer
        for name, linear in self.linears.items():
            quantizer, weight = self._input_quantizer(name, clips), linear.weight
            if quantizer not in inputs and quantizer[0] is not None and quantizer[1] is not None:
                inputs[quantizer] = fake_quantize(rows, quantizer[0], quantizer[1])
            if name in self.schemes:
                codes, scale = self._round_weight(name, clips)
                weight = codes.float() * expand_scales(scale, codes.shape[1])
            outputs[name] = apply_linear(inputs[quantizer], weight, linear.bias)
        return outputs

    def quantize(self, clips: Clips) -> dict[str, QuantizedLinear]:
        """Returns the linears in `schemes`, quantized to integer codes with these clips."""
        linears = {}
        for name, scheme in self.schemes.items():
            codes, scale = self._round_weight(name, clips)
            input_scale, _ = self._input_quantizer(name, clips)
            linears[name] = QuantizedLinear(scheme, codes.cpu().numpy(), scale.cpu().numpy(), input_scale)
        return linears

    def _input_quantizer(self, name: str, clips: Clips) -> tuple[float | None, int | None]:
        """Returns the scale and the number of bits of a linear's input; None for both where it stays float."""
        scheme = self.schemes.get(name)
        if scheme is None or scheme.activation_bits is None:
            return None, None
        scale = activation_scale(self.ranges[clips.activation], scheme.activation_bits)
        return stored_input_scale(scale, scheme), scheme.activation_bits

    def _round_weight(self, name: str, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight_scale(self.weight_ranges[name, clips.weight], self.schemes[name])
        return round_to_codes(self.linears[name].weight, scale, self.schemes[name]), scale


def make_quantizable_layer(module: nn.Module, layer: LayerInput, schemes: Mapping[str, LinearScheme]) -> QuantizableLayer:
    """Returns the layer whose weights are in `module`. schemes: of the module's linears, by their names inside it."""
    linears = {name: get_linear(module, name) for name in layer.linears}
    layer_schemes = {name: schemes[name] for name in linears if name in schemes}
    weight_ranges = {(n, c): c.weight_amax(linears[n].weight, s) for n, s in layer_schemes.items() for c in PAPER_CLIPS}
    return QuantizableLayer(linears, layer_schemes, layer.ranges, weight_ranges)


def list_clips(layer: QuantizableLayer, current: Clips, kind: Kind) -> list[Clips]:
    """Returns the paper's five clips of one kind, each with the current clip of the other kind.

    Returns only `current` for the activation clips of a layer whose input stays float.
    """
    if kind == "weight":
        return [replace(current, weight=clip) for clip in PAPER_CLIPS]
    if all(scheme.activation_bits is None for scheme in layer.schemes.values()):
        return [current]
    return [replace(current, activation=clip) for clip in PAPER_CLIPS]
