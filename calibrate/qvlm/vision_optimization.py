"""Visual-encoder optimization (Q-VLM, section 3.3): tunes gains and biases of tower and projector before they are quantized.

The objective is the paper's, L = L_task + lambda_1 * L_entropy + lambda_2 * L_err, block by block:

- L_task, the KL divergence of the answer tokens' distributions from the float model's, is its second-order expansion around
  the float model: the squared error of the block's output at every token, weighted by the squared gradient of the
  divergence there (diagonal Fisher). The paper's error of the last layer, a part of its L_err, has the same expansion.
- L_entropy is the entropy of every quantizer's codes, weighted by the norm of that gradient at its layer.
- L_err is the plain squared error of the block's output.

The block computes with rounded weights and rounded inputs, whose rounding has a straight-through gradient; absmax ranges, as
clipping ranges are searched afterwards. Its inputs come from the already tuned blocks. Gradients through the decoder are
measured once, in one backward pass (`sensitivity/measure.py`), so that a step costs a forward and a backward of one block.
The paper tunes all weights of the encoder; here weights stay, and a block whose objective does not fall stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.block_loader import open_block_loader
from qvlm_export.calibrate.blockwise.block_writer import stored_dtype
from qvlm_export.calibrate.blockwise.blocks import Block, get_linear
from qvlm_export.calibrate.blockwise.forward import Run, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, check_outputs
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import apply_linear
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.quantization.quantizer import (
    MIN_FLOAT16_SCALE,
    expand_scales,
    group_amax,
    round_to_codes,
    weight_scale,
)
from qvlm_export.calibrate.qvlm.config import QvlmConfig
from qvlm_export.calibrate.qvlm.entropy import soft_code_distribution
from qvlm_export.calibrate.qvlm.observe import set_tensors_
from qvlm_export.calibrate.sensitivity.block_backward import Sensitivity
from qvlm_export.calibrate.sensitivity.measure import count_passes, measure_sensitivity

ENTROPY_VALUES = 2**11  # of each input, from which the entropy of its codes is estimated
# The gradients that weight tokens and layers; only the weighting of tokens and the seed count.
GRADIENTS = SearchConfig("none", token_weighting="kl")


@dataclass(frozen=True)
class Terms:
    """The terms of the objective.

    task, error: relative to the energy of the float output. entropy: weighted mean in nats.
    """

    task: float
    entropy: float
    error: float


@dataclass(frozen=True)
class TunedBlock:
    """A block of the visual encoder after its optimization.

    tensors: those that changed, rounded to the types in which they are stored, by name inside the block; none where the
    objective did not fall. before, after: terms of the objective. forwards, backwards: how many images ran through it.
    """

    tensors: Mapping[str, torch.Tensor]
    before: Terms
    after: Terms
    forwards: int
    backwards: int

    def describe(self) -> dict[str, Any]:
        """Returns the entry in the block's record."""
        return {"tuned": bool(self.tensors), "before": asdict(self.before), "after": asdict(self.after)}


@dataclass(frozen=True)
class VisionOptimization:
    """The optimized blocks by prefix, and how many block forwards and backwards the gradients took beside theirs.

    samples: how many the optimization used.
    """

    blocks: Mapping[str, TunedBlock]
    samples: int = 0
    forwards: int = 0
    backwards: int = 0

    def tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """Returns the changed tensors of every block."""
        return {name: block.tensors for name, block in self.blocks.items()}


def select_vision_samples(samples: Sequence[Sample], config: QvlmConfig) -> list[int]:
    """Returns the numbers of the samples that the visual encoder is optimized on: some with pictures, evenly spaced."""
    pictured = [number for number, sample in enumerate(samples) if len(sample.pixel_values)]
    count = min(len(pictured), config.vision_samples) if config.vision_epochs else 0
    return [pictured[n * len(pictured) // count] for n in range(count)]


def list_tunable_blocks(blocks: Sequence[Block], schemes: Collection[str]) -> list[Block]:
    """Returns the blocks that have linears in `schemes`, by canonical name, and gains or biases to tune."""
    return [
        block
        for block in blocks
        if any(name in schemes for name in block.linear_names()) and any(p.ndim == 1 for p in block.module.parameters())
    ]


def optimize_vision(
    job: CalibrationJob, config: QvlmConfig, progress: Callable[[float], None] = lambda _: None
) -> VisionOptimization:
    """Tunes tower and projector; returns nothing tuned where none of their linears is quantized.

    progress: called with the share that is done. Blocks that an interrupted run tuned are read from the work folder. Raises
    UserError naming the block and the sample where activations are not finite.
    """
    numbers, blocks = select_vision_samples(job.samples, config), list_tunable_blocks(job.blocks.vision(), job.schemes)
    if not numbers or not blocks:
        return VisionOptimization({})
    part = replace(job, samples=[job.samples[n] for n in numbers], numbers=numbers)
    prompts, gradients = [[sample] for sample in part.samples], replace(GRADIENTS, seed=config.seed)
    tuned = {block.prefix: found for block in blocks if (found := _load(job, block)) is not None}
    if len(tuned) < len(blocks):
        sensitivity = measure_sensitivity(part, prompts, gradients, lambda share: progress(share / 2))
        _tune_blocks(part, config, sensitivity, tuned, lambda: progress((1 + len(tuned) / len(blocks)) / 2))
    forwards, backwards = count_passes(part, prompts, gradients)
    # The other blocks only run, in float and as quantized.
    forwards += 2 * sum(len(s.pixel_values) for s in part.samples) * (len(job.blocks.vision()) - len(blocks))
    return VisionOptimization(tuned, len(numbers), forwards, backwards)


def _tune_blocks(
    job: CalibrationJob,
    config: QvlmConfig,
    sensitivity: Sensitivity,
    tuned: dict[str, TunedBlock],
    report: Callable[[], None],
) -> None:
    """Runs the visual encoder, in float and as quantized, and adds every tunable block to `tuned` that is not there yet."""
    tunable = {block.prefix for block in list_tunable_blocks(job.blocks.vision(), job.schemes)}

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        # Copies, as autograd cannot use the inference tensors that come from the patch embeddings.
        half, moved = len(inputs) // 2, [x.clone().to(job.device) for x in inputs]
        with resident(block) as module, one_thread():  # whose sums of gradients do not depend on the number of threads
            exact = [run(module, x) for x in moved[:half]]
            check_outputs(block, exact, job.numbers_in_set(job.sample_numbers(block)))
            student = _make_student(module, job.block_schemes(block), _gradient_shares(block, sensitivity))
            weights = [w.to(job.device) for w in sensitivity.token_weights[block.prefix]]
            batches = _Batches(moved[half:], exact, weights, config.vision_batch)
            if block.prefix in tunable and block.prefix not in tuned:
                dtypes = {n: stored_dtype(f"{block.prefix}.{n}", job) for n, _ in _tunable_parameters(student)}
                tuned[block.prefix] = _tune(student, run, batches, config, dtypes)
                _save(job, block, tuned[block.prefix])
            if block.prefix in tuned:
                set_tensors_(student, tuned[block.prefix].tensors)
            outputs = [run(student, x) for x in moved[half:]]
        report()
        return [x.cpu() for x in (*exact, *outputs)]

    with torch.no_grad(), open_block_loader(job.blocks, job.source, job.device) as resident:
        run_vision_blocks(job.blocks, job.source, [*job.samples, *job.samples], step)


def _gradient_shares(block: Block, sensitivity: Sensitivity) -> dict[str, float]:
    """Returns by first linear of every shared input the norm of the gradient there, as a share of their sum in the block."""
    firsts = [shared.linears[0] for shared in find_shared_inputs(block.module)]
    norms = [sensitivity.mean_squares[f"{block.prefix}.{name}"] ** 0.5 for name in firsts]
    return {name: norm / (sum(norms) or 1.0) for name, norm in zip(firsts, norms, strict=True)}


@dataclass(frozen=True)
class _Batches:
    """Inputs X_q of a block, the float block's outputs and the weights of their tokens, on the computing device.

    inputs, targets: float32 [n, tokens, width] for each sample. weights: float32 [n, tokens]. size: samples in a batch.
    """

    inputs: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    size: int

    def select(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns input, target and weights of these samples, each as one tensor."""
        x, y, weights = (torch.cat([part[n] for n in numbers]) for part in (self.inputs, self.targets, self.weights))
        return x, y, weights

    def split(self, order: torch.Tensor) -> list[list[int]]:
        """Returns the samples in this order as batches."""
        return [part.tolist() for part in order.split(self.size)]


class _RoundedLinear(nn.Module):
    """A linear with rounded weights that rounds its input as its scheme says, in the range of what it is given.

    bits: of the codes whose entropy is measured; share: weight of that entropy in the objective, 0 for none.
    """

    def __init__(self, linear: nn.Linear, scheme: LinearScheme, bits: int, share: float) -> None:
        super().__init__()
        scale = weight_scale(group_amax(linear.weight, scheme), scheme)
        codes = round_to_codes(linear.weight, scale, scheme)
        self.register_buffer("weight", codes.float() * expand_scales(scale, linear.in_features))
        self.bias = linear.bias
        self.entropy = torch.zeros((), device=linear.weight.device)  # weighted, of the last input
        self._activation_bits, self._bits, self._share = scheme.activation_bits, bits, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._share:
            values = x.flatten()[:: max(1, x.numel() // ENTROPY_VALUES)]
            codes = soft_code_distribution(values, _absmax_scale(x, self._bits), self._bits)
            self.entropy = self._share * torch.special.entr(codes).sum().to(x)
        if self._activation_bits is not None:
            scale = _absmax_scale(x, self._activation_bits)
            steps = x / scale
            x = (steps + (steps.round() - steps).detach()) * scale  # the straight-through gradient
        return apply_linear(x, self.get_buffer("weight"), self.bias)


def _absmax_scale(x: torch.Tensor, num_bits: int) -> torch.Tensor:
    return (x.abs().amax() / (2 ** (num_bits - 1) - 1)).clamp(min=MIN_FLOAT16_SCALE)


def _make_student(module: nn.Module, schemes: Mapping[str, LinearScheme], shares: Mapping[str, float]) -> nn.Module:
    """Returns a copy of the block that computes as it would if it were quantized by round-to-nearest.

    shares: weight of the entropy of each shared input, by its first linear.
    """
    student = copy.deepcopy(module)
    for shared in find_shared_inputs(module):
        quantized = [name for name in shared.linears if name in schemes]
        bits = max((schemes[name].activation_bits or schemes[name].weight_bits for name in quantized), default=0)
        for name in quantized:
            share = shares[shared.linears[0]] if name == quantized[0] else 0.0
            student.set_submodule(name, _RoundedLinear(get_linear(student, name), schemes[name], bits, share))
    return student


def _tunable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns gains and biases by name."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.ndim == 1]


def _compute_terms(student: nn.Module, output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the terms of the objective for the output that the student computed last, float32 [3], differentiable."""
    errors, energies = (output - target).square().sum(-1), target.square().sum(-1)
    entropies = [part.entropy for part in student.modules() if isinstance(part, _RoundedLinear)]
    task, error = (errors * weights).sum() / (energies * weights).sum(), errors.sum() / energies.sum()
    return torch.stack([task, torch.stack(entropies).sum().to(task), error])


def _evaluate(student: nn.Module, run: Run, batches: _Batches) -> torch.Tensor:
    """Returns the terms of the objective, float64 [3], the mean over all samples."""
    parts = batches.split(torch.arange(len(batches.inputs)))
    total = torch.zeros(3, dtype=torch.float64)
    for numbers in parts:
        x, y, weights = batches.select(numbers)
        total += len(numbers) * _compute_terms(student, run(student, x), y, weights).double().cpu()
    return total / len(batches.inputs)


def _tune(student: nn.Module, run: Run, batches: _Batches, config: QvlmConfig, dtypes: Mapping[str, np.dtype]) -> TunedBlock:
    """Tunes the student's gains and biases in place; returns them as values of `dtypes` if the objective fell."""
    before, generator = _evaluate(student, run, batches), torch.Generator().manual_seed(config.seed)
    start = {name: parameter.detach().clone() for name, parameter in _tunable_parameters(student)}
    factors = torch.tensor([1.0, config.entropy_weight, config.error_weight]) / before.clamp(min=1e-30)
    parameters = _tunable_parameters(student)
    groups = [{"params": [p.requires_grad_()], "lr": config.vision_rate * _root_mean_square(p)} for _, p in parameters]
    optimizer, count = torch.optim.Adam(groups, betas=(0.9, 0.99)), len(batches.inputs)
    steps = [n for _ in range(config.vision_epochs) for n in batches.split(torch.randperm(count, generator=generator))]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for numbers in steps:
        x, y, weights = batches.select(numbers)
        optimizer.zero_grad()
        with torch.enable_grad():
            terms = _compute_terms(student, run(student, x), y, weights)
            (terms * factors.to(terms)).sum().backward()
        optimizer.step()
        schedule.step()
    tensors = {n: p.detach().to(getattr(torch, dtypes[n].name)).float() for n, p in parameters}
    set_tensors_(student, tensors)
    after = _evaluate(student, run, batches)
    fell = bool(torch.isfinite(after).all()) and float(factors.double() @ after) < float(factors.double() @ before)
    if not fell:
        set_tensors_(student, start)
    # Beside the steps: the float run, one evaluation before them and one after, and the run that the next block reads.
    images, epochs = sum(len(x) for x in batches.inputs), config.vision_epochs
    passes = ((4 + epochs) * images, epochs * images)
    return TunedBlock(tensors if fell else {}, Terms(*before.tolist()), Terms(*after.tolist()), *passes)


def _root_mean_square(parameter: torch.Tensor) -> float:
    return float(parameter.detach().square().mean().sqrt())


def _save_name(block: Block) -> str:
    return f"qvlm-vision-{block.prefix}"


def _save(job: CalibrationJob, block: Block, tuned: TunedBlock) -> None:
    """Saves a tuned block in the work folder, if there is one."""
    if job.work is not None:
        numbers = [*astuple(tuned.before), *astuple(tuned.after), tuned.forwards, tuned.backwards]
        tensors = {f"tensors/{name}": [tensor.cpu()] for name, tensor in tuned.tensors.items()}
        job.work.save(_save_name(block), {"numbers": [torch.tensor(numbers, dtype=torch.float64)], **tensors})


def _load(job: CalibrationJob, block: Block) -> TunedBlock | None:
    """Returns the tuned block that an interrupted run saved, or None."""
    saved = None if job.work is None else job.work.load(_save_name(block))
    if saved is None:
        return None
    numbers = saved.pop("numbers")[0].tolist()
    tensors = {name.removeprefix("tensors/"): tensor for name, (tensor,) in saved.items()}
    return TunedBlock(tensors, Terms(*numbers[:3]), Terms(*numbers[3:6]), int(numbers[6]), int(numbers[7]))
