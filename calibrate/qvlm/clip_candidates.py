"""A layer as the search of clipping ranges sees it: linears that share an input, and the ranges they can have. torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale,
    expand_scales,
    fake_quantize,
    round_to_codes,
    weight_scale,
)
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, Clip
from qvlm_export.calibrate.qvlm.partition import LayerInput

Kind = Literal["activation", "weight"]
KINDS: tuple[Kind, Kind] = ("activation", "weight")  # in the order they are searched
WHOLE = PAPER_CLIPS[0]


@dataclass(frozen=True)
class Clips:
    """The ranges of a layer: of its input, and of the weights of all its linears."""

    activation: Clip = WHOLE
    weight: Clip = WHOLE


@dataclass(frozen=True)
class QuantizableLayer:
    """A layer's linears and what they can become. weight_ranges: of each planned linear, for each paper clip."""

    linears: Mapping[str, nn.Linear]
    schemes: Mapping[str, LinearScheme]  # of these linears; one that is not in it stays float
    ranges: Mapping[Clip, float]  # of the input
    weight_ranges: Mapping[tuple[str, Clip], torch.Tensor]

    def output(self, rows: torch.Tensor, clips: Clips) -> dict[str, torch.Tensor]:
        """What the linears make of float32 [tokens, in] with these ranges: name -> float32 [tokens, out]."""
        outputs = {}
        for name, linear in self.linears.items():
            x, weight = rows, linear.weight
            if name in self.schemes:
                if (input_scale := self._input_scale(name, clips)) is not None:
                    x = fake_quantize(rows, input_scale, self.schemes[name].activation_bits or 8)
                codes, scale = self._rounded(name, clips)
                weight = codes.float() * expand_scales(scale, codes.shape[1])
            outputs[name] = nn.functional.linear(x, weight, linear.bias)
        return outputs

    def stored(self, clips: Clips) -> dict[str, QuantizedLinear]:
        """The planned linears as integers."""
        linears = {}
        for name, scheme in self.schemes.items():
            codes, scale = self._rounded(name, clips)
            linears[name] = QuantizedLinear(scheme, codes.numpy(), scale.numpy(), self._input_scale(name, clips))
        return linears

    def _input_scale(self, name: str, clips: Clips) -> float | None:
        bits = self.schemes[name].activation_bits
        return None if bits is None else activation_scale(self.ranges[clips.activation], bits)

    def _rounded(self, name: str, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
        scale = weight_scale(self.weight_ranges[name, clips.weight], self.schemes[name])
        return round_to_codes(self.linears[name].weight, scale, self.schemes[name]), scale


def make_quantizable_layer(module: nn.Module, layer: LayerInput, plan: Mapping[str, LinearScheme]) -> QuantizableLayer:
    """The layer in its resident module. plan: of the module's linears, by their names inside it."""
    linears = {name: get_linear(module, name) for name in layer.linears}
    mine = {name: plan[name] for name in linears if name in plan}
    weight_ranges = {(n, c): c.weight_amax(linears[n].weight, s) for n, s in mine.items() for c in PAPER_CLIPS}
    return QuantizableLayer(linears, mine, layer.ranges, weight_ranges)


def list_clips(layer: QuantizableLayer, now: Clips, kind: Kind) -> list[Clips]:
    """The paper's five ranges of one kind, with the other kind's as it is now; just `now` where the input stays float."""
    if kind == "weight":
        return [replace(now, weight=clip) for clip in PAPER_CLIPS]
    if all(scheme.activation_bits is None for scheme in layer.schemes.values()):
        return [now]
    return [replace(now, activation=clip) for clip in PAPER_CLIPS]
