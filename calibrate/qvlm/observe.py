"""Observation of the float model: entropy and clipping ranges of every layer's input, from which the partition follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.batching import split_by_size
from qvlm_export.calibrate.blockwise.block_loader import open_block_loader
from qvlm_export.calibrate.blockwise.blocks import Block, get_linear
from qvlm_export.calibrate.blockwise.forward import Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import MAX_INPUT, CalibrationJob, check_outputs, non_finite_error
from qvlm_export.calibrate.blockwise.resume import NamedTensors
from qvlm_export.calibrate.blockwise.shared_inputs import SharedInput, find_shared_inputs, list_linears
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.observers import InputObserver
from qvlm_export.calibrate.quantization.quantizer import activation_scale
from qvlm_export.calibrate.qvlm.entropy import histogram_entropy
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS
from qvlm_export.calibrate.qvlm.partition import LayerInput

MAX_OBSERVED_VALUES = 2**28  # float32 values between two blocks that are in memory at a time
CHUNK_VALUES = 2**18  # counted at a time, few enough to stay in the processor's cache
SAVED = "qvlm-inputs"  # name in the work folder
# By block: tensors that replace those of the checkpoint, by their names inside the block.
Tuned = Mapping[str, Mapping[str, torch.Tensor]]


def observe_inputs(
    job: CalibrationJob, tuned: Tuned | None = None, progress: Callable[[float], None] = lambda _: None
) -> tuple[list[LayerInput], int]:
    """Runs the float model once; returns statistics of the inputs of all layers to quantize, and the block forwards it took.

    The layers are in the order of computation. tuned: tensors of the visual encoder as it was optimized. progress: called
    with the share that is done. What an interrupted run observed is read from the work folder. Raises UserError naming layer
    and sample when an activation is not finite, or the layer that no sample reached.
    """
    layers = [
        (block, shared, job.block_schemes(block))
        for block in job.blocks.all()
        for shared in find_shared_inputs(block.module)
        if any(name in job.block_schemes(block) for name in shared.linears)
    ]

    def observe() -> NamedTensors:
        observation = _observe(job, tuned or {}, progress)
        observed = [_describe(b.prefix, s, schemes, observation) for b, s, schemes in layers]
        forwards = torch.tensor([observation.forwards])
        return {"statistics": [torch.tensor(observed, dtype=torch.float64)], "forwards": [forwards]}

    found = observe() if job.work is None else job.work.load_or_compute(SAVED, observe)
    inputs = [
        LayerInput(b.prefix, s.linears, _num_bits(s, schemes), entropy, dict(zip(PAPER_CLIPS, ranges, strict=True)))
        for (b, s, schemes), (entropy, *ranges) in zip(layers, found["statistics"][0].tolist(), strict=True)
    ]
    return inputs, int(found["forwards"][0])


def set_tensors_(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces the module's parameters of these names, in place."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            module.get_parameter(name).copy_(tensor)


@dataclass
class _Observation:
    """Observers by block and shared input, and how many block forwards they have seen."""

    observers: dict[tuple[str, SharedInput], InputObserver] = field(default_factory=dict)
    forwards: int = 0


def _observe(job: CalibrationJob, tuned: Tuned, progress: Callable[[float], None]) -> _Observation:
    """Observes the float model on as many samples at a time as MAX_OBSERVED_VALUES allows."""
    observation, first, done = _Observation(), job.blocks.vision()[0].module, 0
    patch_values = job.blocks.num_patches() * get_linear(first, list_linears(first)[0]).in_features
    sizes = [max(len(s.input_ids) * job.blocks.text_width(), len(s.pixel_values) * patch_values) for s in job.samples]
    for samples in split_by_size(job.samples, sizes, MAX_OBSERVED_VALUES):
        numbers = range(done, done + len(samples))
        _observe_part(replace(job, samples=samples, numbers=numbers), tuned, observation)
        done += len(samples)
        progress(done / len(job.samples))
    return observation


def _observe_part(job: CalibrationJob, tuned: Tuned, observation: _Observation) -> None:
    """Adds the samples of `job` to the observation."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        schemes, numbers = job.block_schemes(block), job.numbers_in_set(job.sample_numbers(block))
        outputs = []
        with resident(block) as module, torch.inference_mode():
            set_tensors_(module, tuned.get(block.prefix, {}))
            shared_inputs = [s for s in find_shared_inputs(module) if any(name in schemes for name in s.linears)]
            for number, x in zip(numbers, inputs, strict=True):
                with _observe_shared_inputs(block.prefix, module, shared_inputs, observation.observers, number):
                    outputs.append(run(module, x.to(job.device)).cpu())
        check_outputs(block, outputs, numbers)
        observation.forwards += sum(len(x) for x in inputs)
        return outputs

    with open_block_loader(job.blocks, job.source, job.device) as resident:
        features = run_vision_blocks(job.blocks, job.source, job.samples, step)
        run_decoder_blocks(job.blocks, job.source, job.samples, features, step)


def _num_bits(shared: SharedInput, schemes: Mapping[str, LinearScheme]) -> int:
    """Returns the bits of the input's quantizer, or of the weights' where the input stays float."""
    return max(schemes[name].activation_bits or schemes[name].weight_bits for name in shared.linears if name in schemes)


def _describe(
    prefix: str, shared: SharedInput, schemes: Mapping[str, LinearScheme], observation: _Observation
) -> list[float]:
    """Returns the entropy of a shared input's codes with the absmax range, and its amax for each of the paper's clips."""
    observer = observation.observers.get((prefix, shared))
    if observer is None:
        raise UserError(f"{prefix}: no calibration sample reached it, so its ranges are unknown; add samples")
    histogram, num_bits = observer.histogram(), _num_bits(shared, schemes)
    entropy = histogram_entropy(histogram, activation_scale(histogram.amax, num_bits), num_bits)
    return [entropy, *(clip.activation_amax(histogram) for clip in PAPER_CLIPS)]


@contextmanager
def _observe_shared_inputs(
    prefix: str,
    module: nn.Module,
    shared_inputs: Sequence[SharedInput],
    observers: dict[tuple[str, SharedInput], InputObserver],
    sample: int,
) -> Iterator[None]:
    """Observes the shared inputs of a module while the context is open, all tokens under one label.

    sample: number of the sample that runs, for errors.
    """

    def make_hook(shared: SharedInput) -> Callable[..., None]:
        name = f"{prefix}.{shared.linears[0]}"

        def hook(linear: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            largest = max((abs(float(bound)) for bound in rows.aminmax()), default=0.0)  # NaN if any value is
            if not largest <= MAX_INPUT:
                raise non_finite_error(name, sample, largest if largest < float("inf") else None)
            observer = observers.setdefault((prefix, shared), InputObserver(name, linear.in_features))
            for part in rows.cpu().split(max(1, CHUNK_VALUES // linear.in_features)):
                observer.update(part, torch.zeros(len(part), dtype=torch.int64))

        return hook

    handles = [get_linear(module, s.linears[0]).register_forward_pre_hook(make_hook(s)) for s in shared_inputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
