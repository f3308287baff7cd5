"""Q-VLM as printed, in the form that can be deployed: the floor that other calibrators have to beat. torch.

Symmetric quantizers with static ranges, the ranges of activations and weights by the paper's percentiles, blocks by the
entropy of their inputs and the paper's rule, a joint search in each block with inputs from the quantized prefix, rounding to
nearest. Nothing is folded and nothing is rounded by GPTQ. `calibrate_percentile` is the same search layer by layer.

The ranges of a block's activations are searched jointly first, then those of its weights: K + K^2 + K^3 layer forwards each
for a block of three, where all its quantizers at once would take K^2 + K^4 + K^6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.batching import batch_by_length
from qvlm_export.calibrate.blockwise.block_writer import BlockWriter
from qvlm_export.calibrate.blockwise.blocks import Block, get_linear, load_block
from qvlm_export.calibrate.blockwise.forward import Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress, check_outputs, check_weight
from qvlm_export.calibrate.blockwise.shared_inputs import SharedInput, find_shared_inputs
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.observers import InputObserver
from qvlm_export.calibrate.quantization.quantizer import activation_scale
from qvlm_export.calibrate.qvlm.clip_candidates import KINDS, Clips, QuantizableLayer, list_clips, make_quantizable_layer
from qvlm_export.calibrate.qvlm.entropy import histogram_entropy
from qvlm_export.calibrate.qvlm.joint_search import (
    PAPER_CLIPS,
    Outputs,
    Replay,
    SearchLayer,
    record_linear_outputs,
    relative_error,
    replay_module,
    search_tree,
)
from qvlm_export.calibrate.qvlm.partition import (
    Blocks,
    LayerInput,
    partition_by_entropy,
    partition_layerwise,
)


@dataclass(frozen=True)
class PartitionedLayers:
    """A model divided into blocks. forwards: block forwards that it took. thresholds: h0 in nats by bits."""

    inputs: Sequence[LayerInput]
    blocks: Blocks
    forwards: int
    thresholds: Mapping[str, float]


def calibrate_qvlm(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Q-VLM as printed: entropy partition and joint search. Returns the summary for the record.

    Cost in block forwards: 2 float runs and up to 155 / 3 for the search, twice that with quantized activations.
    Raises UserError naming tensor or layer when weights or activations are not finite, or the block that no sample reached.
    """
    inputs, measured = observe_inputs(job)
    blocks, thresholds = partition_by_entropy(inputs)
    return _calibrate(job, writer, progress, "printed", PartitionedLayers(inputs, blocks, measured, thresholds))


def calibrate_percentile(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """The same candidates and objective, every layer on its own: 2 float runs and 5 or 10 block forwards."""
    inputs, measured = observe_inputs(job)
    return _calibrate(
        job, writer, progress, "percentile", PartitionedLayers(inputs, partition_layerwise(len(inputs)), measured, {})
    )


def _calibrate(
    job: CalibrationJob, writer: CalibratedWriter, progress: Progress, method: str, divided: PartitionedLayers
) -> dict[str, Any]:
    inputs, blocks, forwards = divided.inputs, divided.blocks, float(divided.forwards)
    shards = BlockWriter(job, writer, progress)
    found: list[BlockResult] = []

    def step(block: Block, batches: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        nonlocal forwards
        half, plan = len(batches) // 2, job.block_schemes(block)
        mine = [b for b in blocks if inputs[b.start].block == block.prefix]
        with load_block(block, job.source) as module, torch.inference_mode():
            for name in plan:
                check_weight(f"{block.prefix}.{name}", get_linear(module, name).weight)
            layers = [[make_quantizable_layer(module, inputs[k], plan) for k in b] for b in mine]
            exact, rounded, searched = _search_module(module, layers, run, list(batches[:half]), list(batches[half:]))
            pairs = [pair for part, r in zip(layers, searched, strict=True) for pair in zip(part, r.clips, strict=True)]
            linears = {name: linear for layer, clips in pairs for name, linear in layer.stored(clips).items()}
        check_outputs(block, [*exact, *rounded], job.sample_numbers(block))
        shards.write(block, linears)
        forwards += half + sum(r.layer_forwards for r in searched) * half / max(1, sum(len(b) for b in mine))
        found.extend(searched)
        return [*exact, *rounded]

    samples = [*job.samples, *job.samples]
    features = run_vision_blocks(job.blocks, job.source, samples, step)
    run_decoder_blocks(job.blocks, job.source, samples, features, step)
    shards.write_rest()
    return {
        "method": method,
        "samples": len(job.samples),
        "tokens": sum(len(s.input_ids) for s in job.samples),
        "block_forwards": round(forwards),
        "entropy_thresholds": dict(divided.thresholds),
        "blocks": [_record([inputs[k] for k in b], result) for b, result in zip(blocks, found, strict=True)],
    }


@dataclass(frozen=True)
class BlockResult:
    """What the search of a block of layers chose. Errors: of its output, in units of the float output's energy.

    outputs: of all layers of the module up to the block's last. first_error: with all ranges whole.
    """

    clips: tuple[Clips, ...]
    outputs: Outputs
    first_error: float
    error: float
    layer_forwards: int


def search_block(
    layers: Sequence[QuantizableLayer], replay: Replay, before: Outputs, wanted: Mapping[str, torch.Tensor]
) -> BlockResult:
    """Joint search of a block's layers, with inputs from the already quantized layers before.

    before: outputs of those in the same module. wanted: the float model's outputs by linear, float32 [tokens, out].
    """

    def error(outputs: Mapping[str, torch.Tensor]) -> float:
        return relative_error(outputs, {name: wanted[name] for name in outputs})

    clips, found = [Clips()] * len(layers), []
    for kind in KINDS:
        candidates = [list_clips(layer, now, kind) for layer, now in zip(layers, clips, strict=True)]
        if any(len(options) > 1 for options in candidates):
            chain = [SearchLayer(replay.given, layer.output, c) for layer, c in zip(layers, candidates, strict=True)]
            found.append(search_tree(chain, error, before))
            clips = [options[k] for options, k in zip(candidates, found[-1].choice, strict=True)]
    forwards = sum(f.layer_forwards for f in found)
    return BlockResult(tuple(clips), found[-1].outputs, found[0].first_error, found[-1].error, forwards)


def _search_module(
    module: nn.Module,
    blocks: Sequence[Sequence[QuantizableLayer]],
    run: Run,
    exact: list[torch.Tensor],
    inputs: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[BlockResult]]:
    """Searches all blocks of a module; returns the float outputs, the quantized outputs, and what was chosen."""
    batches, found = batch_by_length(inputs), list[BlockResult]()
    layers = [tuple(layer.linears) for block in blocks for layer in block]
    exact_outputs, wanted = record_linear_outputs(module, [n for names in layers for n in names], run, batches.merge(exact))
    with replay_module(module, layers, run, batches.merge(inputs)) as replay:
        for block in blocks:
            found.append(search_block(block, replay, found[-1].outputs if found else (), wanted))
        rounded = replay.finish(found[-1].outputs if found else ())
    return batches.split(exact_outputs), batches.split(rounded), found


def _record(layers: Sequence[LayerInput], found: BlockResult) -> dict[str, Any]:
    return {
        "layers": [
            {
                "linears": [f"{layer.block}.{name}" for name in layer.linears],
                "bits": layer.num_bits,
                "entropy": layer.entropy,
                "activation_percentile": clips.activation.percentile,
                "weight_percentile": clips.weight.percentile,
            }
            for layer, clips in zip(layers, found.clips, strict=True)
        ],
        "error_before": found.first_error,
        "error_after": found.error,
        "layer_forwards": found.layer_forwards,
    }


def observe_inputs(job: CalibrationJob) -> tuple[list[LayerInput], int]:
    """One float pass: every planned layer's input, in the order of computation, and the block forwards it took.

    Raises UserError naming layer and batch when an activation is not finite, or the block that no sample reached.
    """
    layers: list[LayerInput] = []
    forwards = 0

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        nonlocal forwards
        plan = job.block_schemes(block)
        if not inputs and plan:
            raise UserError(f"{block.prefix}: no calibration sample reached it, so its ranges are unknown; add samples")
        with load_block(block, job.source) as module, torch.inference_mode():
            groups = [group for group in find_shared_inputs(module) if any(name in plan for name in group.linears)]
            with _gathered(block.prefix, module, groups) as gathered:
                outputs = [run(module, x) for x in inputs]
        check_outputs(block, outputs, job.sample_numbers(block))
        forwards += len(inputs)
        layers.extend(_layer_input(block.prefix, group.linears, plan, gathered[group]) for group in groups)
        return outputs

    features = run_vision_blocks(job.blocks, job.source, job.samples, step)
    run_decoder_blocks(job.blocks, job.source, job.samples, features, step)
    return layers, forwards


def _layer_input(
    block: str, linears: tuple[str, ...], plan: Mapping[str, LinearScheme], statistics: InputObserver
) -> LayerInput:
    num_bits = max(plan[name].activation_bits or plan[name].weight_bits for name in linears if name in plan)
    histogram = statistics.histogram()
    entropy = histogram_entropy(histogram, activation_scale(histogram.amax, num_bits), num_bits)
    return LayerInput(block, linears, num_bits, entropy, {clip: clip.activation_amax(histogram) for clip in PAPER_CLIPS})


@contextmanager
def _gathered(prefix: str, module: nn.Module, groups: Sequence[SharedInput]) -> Iterator[dict[SharedInput, InputObserver]]:
    """Gathers the statistics of the groups' inputs while the context is open, all tokens as one kind."""

    def watch(statistics: InputObserver) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            statistics.update(rows, torch.zeros(len(rows), dtype=torch.int64))

        return hook

    first = {group: get_linear(module, group.linears[0]) for group in groups}
    gathered = {g: InputObserver(f"{prefix}.{g.linears[0]}", x.in_features) for g, x in first.items()}
    handles = [layer.register_forward_pre_hook(watch(gathered[group])) for group, layer in first.items()]
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()
