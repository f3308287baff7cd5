"""Learned rounding: block reconstruction by gradient descent, in the spirit of AdaRound, BRECQ and SignRound.

Sources: AdaRound (Nagel et al. 2020, section 3), BRECQ (Li et al. 2021, section 3.2), SignRound (Cheng et al. 2023, section
3). The search starts from the codes of rounding linear by linear. The rounding of every weight, the scales of weights and
activations, the gains of norms and the biases then move together, so that the block's output comes closest to the float
block's; rounding has a straight-through gradient. Held-out samples decide which step is used, the start included, so that
the block's error on them never grows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16, LinearScheme
from qvlm_export.calibrate.numerics.matmul import apply_linear, deterministic_small_matmul
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale_nearest,
    expand_scales,
    squared_sum,
    stored_input_scale,
    stored_weight_scale,
)

HELD_OUT_EVERY = 8  # every eighth image is held out, with all prompts about it; the others are trained on
STEP_TOKENS = 768
NUM_CHECKS = 4  # evaluations on the held-out samples
# Learning rates of Adam; units: quantization steps, log scale, log scale, units of the tensor.
RATES = {"offset": 0.02, "scale": 1e-3, "input_scale": 1e-3, "float": 3e-4}


@dataclass(frozen=True)
class LearningBatch:
    """x: inputs after the already quantized preceding blocks, y: the float block's outputs, float32 [B, tokens, width].

    root_weights: square roots of the token weights, float32 [B, tokens, 1]. image_ids: int64 [B], of each input; the prompts
    about one image are either all trained on or all held out.
    """

    x: torch.Tensor
    y: torch.Tensor
    root_weights: torch.Tensor
    image_ids: torch.Tensor

    def select(self, index: torch.Tensor) -> LearningBatch:
        """The batch of some of the inputs. index: bool [B] or int64 indices."""
        return LearningBatch(
            self.x[index], self.y[index], self.root_weights[index], self.image_ids[index.to(self.image_ids.device)]
        )


@dataclass(frozen=True)
class Learned:
    """A learned block: the step with the least error on the held-out samples.

    linears, floats: quantized linears and all other tensors, learned ones as values of the graph's float type, by name
    inside the block.
    error_before, error_after: relative squared error on the held-out samples, at the start and at that step. forwards,
    backwards: number of samples in forward and backward passes through the block.
    """

    linears: Mapping[str, QuantizedLinear]
    floats: Mapping[str, torch.Tensor]
    error_before: float
    error_after: float
    forwards: int
    backwards: int


class _StraightThroughRound(torch.autograd.Function):
    """Rounds to nearest with a straight-through gradient, that of the identity."""

    @staticmethod
    def forward(_ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def _round_ste(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _StraightThroughRound.apply(x)
    return out


class LearnedLinear(nn.Module):
    """A linear with learnable rounding, scales and bias. It starts as exactly the quantized linear it is made from."""

    def __init__(self, layer: nn.Linear, linear: QuantizedLinear) -> None:
        """layer: the float linear, whose bias is the start; linear: its codes and scales."""
        super().__init__()
        self.scheme: LinearScheme = linear.scheme
        self.in_features = layer.in_features
        device = layer.weight.device
        self.register_buffer("codes", torch.from_numpy(linear.codes).float().to(device))
        self.register_buffer(
            "initial_scale", torch.from_numpy(linear.scale).float().reshape(layer.out_features, -1).to(device)
        )
        self.offset = nn.Parameter(torch.zeros(layer.out_features, layer.in_features, device=device))
        self.log_scale = nn.Parameter(torch.zeros_like(self.get_buffer("initial_scale")))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        scale = linear.input_scale
        self.log_input_scale = None if scale is None else nn.Parameter(torch.tensor(math.log(scale), device=device))

    def scale(self) -> torch.Tensor:
        """The current weight scales, float32 [out, groups]."""
        return self.get_buffer("initial_scale") * self.log_scale.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The linear's output with rounded weights and, where the scheme quantizes activations, rounded inputs."""
        initial_scale, bits = self.get_buffer("initial_scale"), self.scheme.activation_bits
        # A weight keeps the value that its code had at the start, so another scale may give it another code.
        value = self.get_buffer("codes") * expand_scales(initial_scale / self.scale(), self.in_features) + self.offset
        weight = _round_ste(value).clamp(self.scheme.qmin, self.scheme.qmax) * expand_scales(self.scale(), self.in_features)
        if self.log_input_scale is not None and bits is not None:
            step = self.log_input_scale.exp()
            x = _round_ste(x / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        return apply_linear(x, weight, self.bias)

    def to_quantized(self) -> QuantizedLinear:
        """Codes and scales at the current step, as they are stored."""
        with torch.no_grad():
            scale = stored_weight_scale(self.scale(), self.scheme)
            initial_scale = self.get_buffer("initial_scale")
            value = self.get_buffer("codes") * expand_scales(initial_scale / self.scale(), self.in_features) + self.offset
            codes = value.round().clamp(self.scheme.qmin, self.scheme.qmax).to(torch.int8)
            input_scale = None
            if self.log_input_scale is not None:
                input_scale = stored_input_scale(activation_scale_nearest(float(self.log_input_scale.exp())), self.scheme)
        return QuantizedLinear(self.scheme, codes.cpu().numpy(), scale.cpu().numpy(), input_scale)

    def snap_to_stored_(self) -> None:
        """Turns this linear, in place, into exactly the one that `to_quantized` returns."""
        linear = self.to_quantized()
        with torch.no_grad():
            self.get_buffer("codes").copy_(torch.from_numpy(linear.codes))
            self.get_buffer("initial_scale").copy_(torch.from_numpy(linear.scale).float().reshape(self.log_scale.shape))
            self.offset.zero_()
            self.log_scale.zero_()
            if self.log_input_scale is not None and linear.input_scale is not None:
                self.log_input_scale.fill_(math.log(linear.input_scale))


def learn_block(
    module: nn.Module,
    quantized: Mapping[str, QuantizedLinear],
    run: Run,
    batches: Sequence[LearningBatch],
    *,
    steps: int,
    seed: int,
) -> Learned:
    """The block with rounding, scales, gains and biases learned in `steps` steps of Adam.

    module: the block with its float weights, is not changed. quantized: its linears at the start, by name inside the block.
    run: computes a block's output from its input. batches: from `make_learning_batches`. seed: of the samples drawn.
    """
    student = copy.deepcopy(module)
    linears = {name: LearnedLinear(get_linear(student, name), linear) for name, linear in quantized.items()}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, linear)
    _share_input_scales(module, linears)
    parameter_groups = _make_parameter_groups(student, linears)
    optimizer = torch.optim.Adam(parameter_groups, betas=(0.9, 0.99))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    training, held_out = _split_held_out(batches)
    generator = torch.Generator().manual_seed(seed)
    least = before = _measure_error(student, run, held_out)
    best = _copy_learned(student)
    num_held_out = sum(len(batch.x) for batch in held_out)
    forwards, backwards = num_held_out, 0
    for step in range(steps):
        batch = _draw_batch(training, generator)
        with torch.enable_grad():
            difference = (run(student, batch.x) - batch.y) * batch.root_weights
            loss = _sum_squares(difference) / _sum_squares(batch.y * batch.root_weights)
            optimizer.zero_grad()
            with deterministic_small_matmul(batch.x):
                loss.backward()
        # Warm-up over 20 steps, then cosine decay.
        decay = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        optimizer.step()
        forwards, backwards = forwards + len(batch.x), backwards + len(batch.x)
        if (step + 1) % max(1, steps // NUM_CHECKS) == 0:
            snapped = _copy_as_stored(student)
            error = _measure_error(snapped, run, held_out)
            forwards += num_held_out
            if error < least:
                least, best = error, _copy_learned(snapped)
    return Learned(*best, before, least, forwards, backwards)


def _share_input_scales(module: nn.Module, linears: Mapping[str, LearnedLinear]) -> None:
    """Makes linears that share an input and its scale learn one scale together, as the graph quantizes the input once."""
    for shared_input in find_shared_inputs(module):
        scales: dict[tuple[float, int | None], nn.Parameter] = {}
        for linear in (linears[name] for name in shared_input.linears if name in linears):
            if linear.log_input_scale is not None:
                key = (float(linear.log_input_scale.detach()), linear.scheme.activation_bits)
                linear.log_input_scale = scales.setdefault(key, linear.log_input_scale)


def _copy_learned(student: nn.Module) -> tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]:
    """The quantized linears of `student` and copies of its other tensors, by name inside the block."""
    linears = {name: part for name, part in student.named_modules() if isinstance(part, LearnedLinear)}
    rounding = {f"{name}.{part}" for name in linears for part in ("offset", "log_scale", "log_input_scale")}
    floats = {n: p.detach().clone() for n, p in student.named_parameters() if n not in rounding}
    return {name: linear.to_quantized() for name, linear in linears.items()}, floats


def _make_parameter_groups(student: nn.Module, linears: Mapping[str, LearnedLinear]) -> list[dict[str, object]]:
    """Parameter groups of the optimizer; all other parameters of the block are not learned."""
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in RATES}
    for linear in linears.values():
        kinds["offset"].append(linear.offset)
        kinds["scale"].append(linear.log_scale)
        if linear.log_input_scale is not None and all(linear.log_input_scale is not other for other in kinds["input_scale"]):
            kinds["input_scale"].append(linear.log_input_scale)
        kinds["float"] += [] if linear.bias is None else [linear.bias]
    kinds["float"] += [p for n, p in student.named_parameters() if "norm" in n]
    for parameters in kinds.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return [{"params": parameters, "lr": RATES[kind]} for kind, parameters in kinds.items() if parameters]


def _copy_as_stored(student: nn.Module) -> nn.Module:
    """A copy of the block with every tensor as it will be stored: linears as quantized, gains and biases in 16 bits."""
    snapped, float_type = copy.deepcopy(student), FLOAT16
    for part in snapped.modules():
        if isinstance(part, LearnedLinear):
            part.snap_to_stored_()
            float_type = part.scheme.float_type
    with torch.no_grad():
        for name, parameter in snapped.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.copy_(parameter.to(getattr(torch, float_type)))
    return snapped


def make_learning_batches(
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    image_ids: Sequence[torch.Tensor] | None = None,
) -> list[LearningBatch]:
    """One `LearningBatch` for each pair of inputs and targets.

    inputs: of the block, targets: the float block's outputs, float32 [B, tokens, width]. weights: of the tokens, float32
    [B, tokens]; None if all are equal. image_ids: int64 [B]; None if every input has its own image.
    """
    if weights is None:
        weights = [torch.ones(x.shape[:2], device=x.device) for x in inputs]
    if image_ids is None:
        image_ids = torch.arange(sum(len(x) for x in inputs)).split([len(x) for x in inputs])
    parts = zip(inputs, targets, weights, image_ids, strict=True)
    return [LearningBatch(x, y, w.sqrt()[..., None], ids) for x, y, w, ids in parts]


def _split_held_out(batches: Sequence[LearningBatch]) -> tuple[list[LearningBatch], list[LearningBatch]]:
    """Batches to train on and batches that are held out.

    With fewer than HELD_OUT_EVERY images the last one is held out. A single image is both trained on and held out.
    """
    images = torch.cat([batch.image_ids for batch in batches]).unique()
    chosen = images[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] if len(images) >= HELD_OUT_EVERY else images[-1:]
    masks = [torch.isin(batch.image_ids, chosen) for batch in batches]
    training = [batch.select(~mask) for batch, mask in zip(batches, masks, strict=True) if not mask.all()]
    held_out = [batch.select(mask) for batch, mask in zip(batches, masks, strict=True) if mask.any()]
    return (training, held_out) if training and held_out else (training or held_out, held_out or training)


def _draw_batch(batches: Sequence[LearningBatch], generator: torch.Generator) -> LearningBatch:
    """About STEP_TOKENS tokens of inputs of one batch; every input of all batches is equally likely."""
    sizes = torch.tensor([float(len(batch.x)) for batch in batches])
    batch = batches[int(torch.multinomial(sizes, 1, generator=generator))]
    count = max(1, STEP_TOKENS // batch.x.shape[1])
    return batch.select(torch.randperm(len(batch.x), generator=generator)[:count])


def _sum_squares(x: torch.Tensor) -> torch.Tensor:
    """The differentiable sum of squares, float32 []: the same bits on any number of threads, as rows are added in order."""
    return x.square().flatten(0, -2).sum(1).double().cumsum(0)[-1].float()


def _measure_error(student: nn.Module, run: Run, batches: Sequence[LearningBatch]) -> float:
    """Weighted squared error of the block's outputs, relative to the weighted energy of the float outputs."""
    with torch.no_grad():
        error = sum(squared_sum((run(student, batch.x) - batch.y) * batch.root_weights) for batch in batches)
    return error / max(sum(squared_sum(batch.y * batch.root_weights) for batch in batches), 1e-30)
