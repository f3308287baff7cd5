"""Learning the rounding of a whole block at once, by gradient through it. torch.

What was rounded linear by linear is the start; then the rounding of every weight, the scales of weights and activations, the
gains of norms and the biases move together so that the block's output comes closest to the float block's. Rounding passes
the gradient straight through. In the spirit of AdaRound (Nagel et al. 2020, section 3), BRECQ (Li et al. 2021, section 3.2)
and SignRound (Cheng et al. 2023, section 3). Samples held back decide which step is kept, the start included, so the block
never ends worse on them than it began.
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
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import apply_linear, deterministic_small_matmul
from qvlm_export.calibrate.quantization.quantizer import (
    activation_scale_nearest,
    expand_scales,
    squared_sum,
    stored_weight_scale,
)

HELD_OUT_EVERY = 8  # every eighth picture decides, with all prompts about it; the others teach
STEP_TOKENS = 768
NUM_CHECKS = 4  # times that the held-back samples are looked at
RATES = {"offset": 0.02, "scale": 1e-3, "input_scale": 1e-3, "float": 3e-4}  # Adam, in steps, log, log, units of the tensor


@dataclass(frozen=True)
class LearningBatch:
    """x: inputs from the quantized prefix, y: what the float model gives there, float32 [B, tokens, width].

    root: of what an error counts, float32 [B, tokens, 1]. group: int64 [B], of each input; those of a group, all prompts
    about one picture, teach or decide together.
    """

    x: torch.Tensor
    y: torch.Tensor
    root: torch.Tensor
    group: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> LearningBatch:
        """Some of its inputs, by mask or number."""
        return LearningBatch(self.x[chosen], self.y[chosen], self.root[chosen], self.group[chosen.to(self.group.device)])


@dataclass(frozen=True)
class Learned:
    """What learning found. errors: relative squared error on the held-back samples, at the start and of what was kept."""

    linears: Mapping[str, QuantizedLinear]
    floats: Mapping[str, torch.Tensor]  # by name inside the block; what was learned, gains and biases, float16 can hold
    error_before: float
    error_after: float
    forwards: int  # samples that ran through the block
    backwards: int


class _Straight(torch.autograd.Function):
    """Rounds to nearest; the gradient passes as if it did not."""

    @staticmethod
    def forward(_ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(_ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Straight.apply(x)
    return out


class LearnedLinear(nn.Module):
    """A linear whose rounding, scales and bias learn. Starts as exactly the quantized linear it is given."""

    def __init__(self, layer: nn.Linear, linear: QuantizedLinear) -> None:
        super().__init__()
        self.scheme: LinearScheme = linear.scheme
        self.columns = layer.in_features
        device = layer.weight.device
        self.register_buffer("codes", torch.from_numpy(linear.codes).float().to(device))
        self.register_buffer("start", torch.from_numpy(linear.scale).float().reshape(layer.out_features, -1).to(device))
        self.offset = nn.Parameter(torch.zeros(layer.out_features, layer.in_features, device=device))
        self.log_scale = nn.Parameter(torch.zeros_like(self.get_buffer("start")))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        scale = linear.input_scale
        self.log_input = None if scale is None else nn.Parameter(torch.tensor(math.log(scale), device=device))

    def scale(self) -> torch.Tensor:
        """float32 [out, groups]."""
        return self.get_buffer("start") * self.log_scale.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start, bits = self.get_buffer("start"), self.scheme.activation_bits
        # The value a code stood for at the start stays; other scales may give it another code.
        moved = self.get_buffer("codes") * expand_scales(start / self.scale(), self.columns) + self.offset
        weight = _rounded(moved).clamp(self.scheme.qmin, self.scheme.qmax) * expand_scales(self.scale(), self.columns)
        if self.log_input is not None and bits is not None:
            step = self.log_input.exp()
            x = _rounded(x / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        return apply_linear(x, weight, self.bias)

    def quantized(self) -> QuantizedLinear:
        """What has been learned, as it will be stored."""
        with torch.no_grad():
            scale = stored_weight_scale(self.scale(), self.scheme)
            start = self.get_buffer("start")
            moved = self.get_buffer("codes") * expand_scales(start / self.scale(), self.columns) + self.offset
            codes = moved.round().clamp(self.scheme.qmin, self.scheme.qmax).to(torch.int8)
            own = None if self.log_input is None else activation_scale_nearest(float(self.log_input.exp()))
        return QuantizedLinear(self.scheme, codes.cpu().numpy(), scale.cpu().numpy(), own)

    def settle_(self) -> None:
        """Becomes exactly the linear that `quantized` gives."""
        linear = self.quantized()
        with torch.no_grad():
            self.get_buffer("codes").copy_(torch.from_numpy(linear.codes))
            self.get_buffer("start").copy_(torch.from_numpy(linear.scale).float().reshape(self.log_scale.shape))
            self.offset.zero_()
            self.log_scale.zero_()
            if self.log_input is not None and linear.input_scale is not None:
                self.log_input.fill_(math.log(linear.input_scale))


def learn_block(
    module: nn.Module,
    found: Mapping[str, QuantizedLinear],
    run: Run,
    batches: Sequence[LearningBatch],
    *,
    steps: int,
    seed: int,
) -> Learned:
    """Learns the linears `found` of a block whose float weights are in `module`.

    batches: see `make_learning_batches`.
    """
    student = copy.deepcopy(module)
    linears = {name: LearnedLinear(get_linear(student, name), linear) for name, linear in found.items()}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, linear)
    _share_ranges(module, linears)
    groups = _parameters(student, linears)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    teach, decide = _parted(batches)
    generator = torch.Generator().manual_seed(seed)
    best = before = _error(student, run, decide)
    kept = _stored(student)
    deciding = sum(len(batch.x) for batch in decide)
    forwards, backwards = deciding, 0
    for step in range(steps):
        drawn = _draw(teach, generator)
        with torch.enable_grad():
            wrong = (run(student, drawn.x) - drawn.y) * drawn.root
            loss = _squares(wrong) / _squares(drawn.y * drawn.root)
            optimizer.zero_grad()
            with deterministic_small_matmul(drawn.x):
                loss.backward()
        share = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.step()
        forwards, backwards = forwards + len(drawn.x), backwards + len(drawn.x)
        if (step + 1) % max(1, steps // NUM_CHECKS) == 0:
            settled = _settled(student)
            error = _error(settled, run, decide)
            forwards += deciding
            if error < best:
                best, kept = error, _stored(settled)
    return Learned(*kept, before, best, forwards, backwards)


def _share_ranges(module: nn.Module, linears: Mapping[str, LearnedLinear]) -> None:
    """Linears that read one input with one range go on doing so: the graph quantizes it once."""
    for group in find_shared_inputs(module):
        known: dict[tuple[float, int | None], nn.Parameter] = {}
        for linear in (linears[name] for name in group.linears if name in linears):
            if linear.log_input is not None:
                key = (float(linear.log_input.detach()), linear.scheme.activation_bits)
                linear.log_input = known.setdefault(key, linear.log_input)


def _stored(student: nn.Module) -> tuple[dict[str, QuantizedLinear], dict[str, torch.Tensor]]:
    """Its linears, and copies of its other tensors, by name inside the block."""
    linears = {name: part for name, part in student.named_modules() if isinstance(part, LearnedLinear)}
    inside = {f"{name}.{part}" for name in linears for part in ("offset", "log_scale", "log_input")}
    floats = {n: p.detach().clone() for n, p in student.named_parameters() if n not in inside}
    return {name: linear.quantized() for name, linear in linears.items()}, floats


def _parameters(student: nn.Module, linears: Mapping[str, LearnedLinear]) -> list[dict[str, object]]:
    """Parameter groups of the optimizer; everything else in the block stays as it is."""
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in RATES}
    for linear in linears.values():
        kinds["offset"].append(linear.offset)
        kinds["scale"].append(linear.log_scale)
        if linear.log_input is not None and all(linear.log_input is not other for other in kinds["input_scale"]):
            kinds["input_scale"].append(linear.log_input)
        kinds["float"] += [] if linear.bias is None else [linear.bias]
    kinds["float"] += [p for n, p in student.named_parameters() if "norm" in n]
    for parameters in kinds.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    return [{"params": parameters, "lr": RATES[kind]} for kind, parameters in kinds.items() if parameters]


def _settled(student: nn.Module) -> nn.Module:
    """A copy with everything as it will be stored."""
    settled = copy.deepcopy(student)
    for part in settled.modules():
        if isinstance(part, LearnedLinear):
            part.settle_()
    with torch.no_grad():
        for name, parameter in settled.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.copy_(parameter.half())
    return settled


def make_learning_batches(
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    groups: Sequence[torch.Tensor] | None = None,
) -> list[LearningBatch]:
    """Batches to learn from, see `LearningBatch`. weights: [B, tokens] of each, None for all alike. groups: None: each its
    own."""
    if weights is None:
        weights = [torch.ones(x.shape[:2], device=x.device) for x in inputs]
    if groups is None:
        groups = torch.arange(sum(len(x) for x in inputs)).split([len(x) for x in inputs])
    return [LearningBatch(x, y, w.sqrt()[..., None], g) for x, y, w, g in zip(inputs, wanted, weights, groups, strict=True)]


def _parted(batches: Sequence[LearningBatch]) -> tuple[list[LearningBatch], list[LearningBatch]]:
    """Those that teach and those that decide: of few groups the last one. A single group does both."""
    groups = torch.cat([batch.group for batch in batches]).unique()
    deciding = groups[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] if len(groups) >= HELD_OUT_EVERY else groups[-1:]
    held = [torch.isin(batch.group, deciding) for batch in batches]
    teach = [batch.rows(~mask) for batch, mask in zip(batches, held, strict=True) if not mask.all()]
    decide = [batch.rows(mask) for batch, mask in zip(batches, held, strict=True) if mask.any()]
    return (teach, decide) if teach and decide else (teach or decide, decide or teach)


def _draw(batches: Sequence[LearningBatch], generator: torch.Generator) -> LearningBatch:
    """Some inputs of one batch, every input of all batches being as likely."""
    sizes = torch.tensor([float(len(batch.x)) for batch in batches])
    batch = batches[int(torch.multinomial(sizes, 1, generator=generator))]
    count = max(1, STEP_TOKENS // batch.x.shape[1])
    return batch.rows(torch.randperm(len(batch.x), generator=generator)[:count])


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of squares, whose gradient passes, to the same bits on any number of threads: rows are summed one by one."""
    return x.square().flatten(0, -2).sum(1).double().cumsum(0)[-1].float()


def _error(student: nn.Module, run: Run, batches: Sequence[LearningBatch]) -> float:
    """Squared error relative to the float outputs."""
    with torch.no_grad():
        wrong = sum(squared_sum((run(student, batch.x) - batch.y) * batch.root) for batch in batches)
    return wrong / max(sum(squared_sum(batch.y * batch.root) for batch in batches), 1e-30)
