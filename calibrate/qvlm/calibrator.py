"""Q-VLM (arXiv 2410.08119) as a baseline: entropy-based block partition and joint search of percentile clipping ranges.

It is the method as printed, in a form that can be deployed: symmetric quantizers with static ranges and round-to-nearest,
without equalization and without GPTQ. The clipping ranges of activations and weights are the paper's percentiles, blocks are
formed by the entropy of their inputs and the paper's rule, and each block is searched jointly, with inputs from the already
quantized preceding blocks. `calibrate_percentile` is the same search layer by layer.

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
    """The layers of a model and their partition into blocks.

    forwards: block forwards that observing the inputs took. thresholds: h0 in nats by number of bits.
    """

    inputs: Sequence[LayerInput]
    blocks: Blocks
    forwards: int
    thresholds: Mapping[str, float]


def calibrate_qvlm(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes by Q-VLM, entropy partition and joint search, into `writer`'s folder; returns the summary for the record.

    Cost in block forwards: 2 float runs and up to 155 / 3 for the search, twice that with quantized activations.
    Raises UserError naming tensor or layer when weights or activations are not finite, or the block that no sample reached.
    """
    inputs, forwards = observe_inputs(job)
    blocks, thresholds = partition_by_entropy(inputs)
    return _calibrate(job, writer, progress, "qvlm", PartitionedLayers(inputs, blocks, forwards, thresholds))


def calibrate_percentile(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes with the candidates and objective of `calibrate_qvlm`, but searches every layer on its own.

    Returns the summary for the record. Cost in block forwards: 2 float runs and 5 for the search, 10 with quantized
    activations. Raises UserError as `calibrate_qvlm`.
    """
    inputs, forwards = observe_inputs(job)
    return _calibrate(
        job, writer, progress, "percentile", PartitionedLayers(inputs, partition_layerwise(len(inputs)), forwards, {})
    )


def _calibrate(
    job: CalibrationJob, writer: CalibratedWriter, progress: Progress, method: str, partition: PartitionedLayers
) -> dict[str, Any]:
    inputs, blocks, forwards = partition.inputs, partition.blocks, float(partition.forwards)
    shards = BlockWriter(job, writer, progress)
    results: list[BlockResult] = []

    def step(block: Block, batches: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        nonlocal forwards
        half, schemes = len(batches) // 2, job.block_schemes(block)
        inside = [b for b in blocks if inputs[b.start].block == block.prefix]
        with load_block(block, job.source) as module, torch.inference_mode():
            for name, scheme in schemes.items():
                check_weight(f"{block.prefix}.{name}", get_linear(module, name).weight, scheme)
            layers = [[make_quantizable_layer(module, inputs[k], schemes) for k in b] for b in inside]
            exact, rounded, module_results = _search_module(module, layers, run, list(batches[:half]), list(batches[half:]))
            pairs = [
                pair for part, r in zip(layers, module_results, strict=True) for pair in zip(part, r.clips, strict=True)
            ]
            linears = {name: linear for layer, clips in pairs for name, linear in layer.quantize(clips).items()}
        check_outputs(block, [*exact, *rounded], job.sample_numbers(block))
        shards.write(block, linears)
        forwards += half + sum(r.layer_forwards for r in module_results) * half / max(1, sum(len(b) for b in inside))
        results.extend(module_results)
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
        "entropy_thresholds": dict(partition.thresholds),
        "blocks": [_make_record([inputs[k] for k in b], result) for b, result in zip(blocks, results, strict=True)],
    }


@dataclass(frozen=True)
class BlockResult:
    """The chosen clips of a block of layers.

    outputs: of all layers of the module up to the block's last one. error: squared error of the block's output relative to
    the float output's squared norm; first_error: the same with absmax ranges everywhere. layer_forwards: how many layer
    forwards the search took.
    """

    clips: tuple[Clips, ...]
    outputs: Outputs
    first_error: float
    error: float
    layer_forwards: int


def search_block(
    layers: Sequence[QuantizableLayer], replay: Replay, before: Outputs, float_outputs: Mapping[str, torch.Tensor]
) -> BlockResult:
    """Searches the clips of a block's layers jointly, with inputs from the already quantized layers before.

    before: outputs of the layers before the block in the same module. float_outputs: the float model's outputs by linear,
    float32 [tokens, out].
    """

    def error(outputs: Mapping[str, torch.Tensor]) -> float:
        return relative_error(outputs, {name: float_outputs[name] for name in outputs})

    clips, searches = [Clips()] * len(layers), []
    for kind in KINDS:
        candidates = [list_clips(layer, current, kind) for layer, current in zip(layers, clips, strict=True)]
        if any(len(options) > 1 for options in candidates):
            chain = [SearchLayer(replay.layer_input, layer.output, c) for layer, c in zip(layers, candidates, strict=True)]
            searches.append(search_tree(chain, error, before))
            clips = [options[k] for options, k in zip(candidates, searches[-1].choice, strict=True)]
    forwards = sum(search.layer_forwards for search in searches)
    return BlockResult(tuple(clips), searches[-1].outputs, searches[0].first_error, searches[-1].error, forwards)


def _search_module(
    module: nn.Module,
    blocks: Sequence[Sequence[QuantizableLayer]],
    run: Run,
    exact: list[torch.Tensor],
    inputs: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[BlockResult]]:
    """Searches all blocks of a module; returns its float outputs, its quantized outputs, and a result for every block.

    exact: inputs of the module in the float model; inputs: those from the already quantized modules before it.
    """
    batches, results = batch_by_length(inputs), list[BlockResult]()
    layers = [tuple(layer.linears) for block in blocks for layer in block]
    names = [name for layer in layers for name in layer]
    exact_outputs, linear_outputs = record_linear_outputs(module, names, run, batches.merge(exact))
    with replay_module(module, layers, run, batches.merge(inputs)) as replay:
        for block in blocks:
            results.append(search_block(block, replay, results[-1].outputs if results else (), linear_outputs))
        rounded = replay.finish(results[-1].outputs if results else ())
    return batches.split(exact_outputs), batches.split(rounded), results


def _make_record(layers: Sequence[LayerInput], result: BlockResult) -> dict[str, Any]:
    return {
        "layers": [
            {
                "linears": [f"{layer.block}.{name}" for name in layer.linears],
                "bits": layer.num_bits,
                "entropy": layer.entropy,
                "activation_percentile": clips.activation.percentile,
                "weight_percentile": clips.weight.percentile,
            }
            for layer, clips in zip(layers, result.clips, strict=True)
        ],
        "error_before": result.first_error,
        "error_after": result.error,
        "layer_forwards": result.layer_forwards,
    }


def observe_inputs(job: CalibrationJob) -> tuple[list[LayerInput], int]:
    """Runs the float model once; returns statistics of the inputs of all layers to quantize, and the block forwards it took.

    The layers are in the order of computation. Raises UserError naming layer and batch when an activation is not finite, or
    the block that no sample reached.
    """
    layers: list[LayerInput] = []
    forwards = 0

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        nonlocal forwards
        schemes = job.block_schemes(block)
        if not inputs and schemes:
            raise UserError(f"{block.prefix}: no calibration sample reached it, so its ranges are unknown; add samples")
        with load_block(block, job.source) as module, torch.inference_mode():
            shared_inputs = [s for s in find_shared_inputs(module) if any(name in schemes for name in s.linears)]
            with _observe_shared_inputs(block.prefix, module, shared_inputs) as observers:
                outputs = [run(module, x) for x in inputs]
        check_outputs(block, outputs, job.sample_numbers(block))
        forwards += len(inputs)
        layers.extend(_make_layer_input(block.prefix, s.linears, schemes, observers[s]) for s in shared_inputs)
        return outputs

    features = run_vision_blocks(job.blocks, job.source, job.samples, step)
    run_decoder_blocks(job.blocks, job.source, job.samples, features, step)
    return layers, forwards


def _make_layer_input(
    block: str, linears: tuple[str, ...], schemes: Mapping[str, LinearScheme], observer: InputObserver
) -> LayerInput:
    num_bits = max(schemes[name].activation_bits or schemes[name].weight_bits for name in linears if name in schemes)
    histogram = observer.histogram()
    entropy = histogram_entropy(histogram, activation_scale(histogram.amax, num_bits), num_bits)
    return LayerInput(block, linears, num_bits, entropy, {clip: clip.activation_amax(histogram) for clip in PAPER_CLIPS})


@contextmanager
def _observe_shared_inputs(
    prefix: str, module: nn.Module, shared_inputs: Sequence[SharedInput]
) -> Iterator[dict[SharedInput, InputObserver]]:
    """Observes the shared inputs while the context is open, with all tokens under one label; yields the observers."""

    def make_hook(observer: InputObserver) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            observer.update(rows, torch.zeros(len(rows), dtype=torch.int64))

        return hook

    first_linears = {shared: get_linear(module, shared.linears[0]) for shared in shared_inputs}
    observers = {s: InputObserver(f"{prefix}.{s.linears[0]}", linear.in_features) for s, linear in first_linears.items()}
    handles = [linear.register_forward_pre_hook(make_hook(observers[s])) for s, linear in first_linears.items()]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()
