"""Calibration record of Q-VLM: the blocks of the partition, the chosen percentiles, and the errors of every module.

A module's record has the keys of any searched effort, so that reports and warnings read it alike, and its own beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qvlm_export.calibrate.augmentation.prompts import label_block_inputs
from qvlm_export.calibrate.blockwise.blocks import Block
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.quantization.record import compute_errors_by_label, describe_massive, make_linear_record
from qvlm_export.calibrate.quantization.tokens import mean_token_error
from qvlm_export.calibrate.qvlm.block_search import BlockResult, ModuleSearch, SearchedModule
from qvlm_export.calibrate.qvlm.clip_candidates import ABSMAX_CLIP, Clips
from qvlm_export.calibrate.qvlm.partition import LayerInput
from qvlm_export.calibrate.qvlm.vision_optimization import TunedBlock, VisionOptimization


def make_block_record(
    job: CalibrationJob,
    block: Block,
    layers: Sequence[Sequence[LayerInput]],
    found: SearchedModule,
    tuned: TunedBlock | None,
) -> dict[str, Any]:
    """Returns the record of one module. Errors are means over tokens of the squared error relative to the float output.

    layers: of the module, by blocks of the partition. compared: errors by kind of token on the baseline's inputs, of
    round-to-nearest and of the search. joint_searches: one for each block of the partition. vision_optimization: terms of
    the objective, see `Terms`; None where the module was not optimized.
    """
    labels = label_block_inputs(block, job.blocks, [[sample] for sample in job.samples])
    results, numbers = (found.outputs, found.float_outputs, labels), found.baseline.numbers
    outputs, float_outputs, compared_labels = ([part[n] for n in numbers] for part in results)
    compared = {
        "inputs": len(numbers),
        "rtn": compute_errors_by_label(found.baseline.outputs, float_outputs, compared_labels),
        "searched": compute_errors_by_label(outputs, float_outputs, compared_labels),
    }
    texts = job.samples if block in job.blocks.text_layers else ()
    return {
        "name": block.prefix,
        "searched": found.search is not None,
        "compared": compared,
        "error": mean_token_error(found.outputs, found.float_outputs),
        "errors": compute_errors_by_label(*results),
        "layers": [] if found.search is None else _make_layer_records(block, layers, found.search),
        "joint_searches": [] if found.search is None else [_describe_search(r) for r in found.search.results],
        "vision_optimization": None if tuned is None else tuned.describe(),
        "largest_activations": dict(found.largest),
        "massive_activation": describe_massive(found.float_outputs, texts),
        "forwards": round(found.forwards + (0 if tuned is None else tuned.forwards), 1),
        "backwards": 0 if tuned is None else tuned.backwards,
    }


def _make_layer_records(block: Block, layers: Sequence[Sequence[LayerInput]], search: ModuleSearch) -> list[dict[str, Any]]:
    """Returns the records of the layers. starts_block: whether a block of the partition begins with the layer."""
    return [
        _make_layer_record(block, layer, clips, search) | {"starts_block": number == 0}
        for part, result in zip(layers, search.results, strict=True)
        for number, (layer, clips) in enumerate(zip(part, result.clips, strict=True))
    ]


def _make_layer_record(block: Block, layer: LayerInput, clips: Clips, search: ModuleSearch) -> dict[str, Any]:
    """Returns the record of the linears that share an input. A percentile is None where the input stays float."""
    linears = {name: search.linears[name] for name in layer.linears if name in search.linears}
    amax = layer.ranges[ABSMAX_CLIP]
    quantized_input = any(linear.input_scale is not None for linear in linears.values())
    return {
        "linears": {f"{block.prefix}.{n}": make_linear_record(x, search.sqnr[n], amax) for n, x in linears.items()},
        "bits": layer.num_bits,
        "entropy": layer.entropy,
        "activation_percentile": clips.activation.percentile if quantized_input else None,
        "weight_percentile": clips.weight.percentile,
    }


def _describe_search(result: BlockResult) -> dict[str, Any]:
    """Returns the record of one joint search. Errors are relative squared errors of the last layer's linears."""
    return {
        "layers": len(result.clips),
        "error_before": result.first_error,
        "error_after": result.error,
        "layer_forwards": sum(result.calls),
    }


def summarize_vision(vision: VisionOptimization) -> Mapping[str, Any] | None:
    """Returns the record of the visual-encoder optimization, None where there was none.

    It holds how many of its blocks were tuned, and the terms of the objective at the last one, next to the decoder.
    """
    if not vision.blocks:
        return None
    last = list(vision.blocks.values())[-1]
    tuned = sum(bool(block.tensors) for block in vision.blocks.values())
    terms = {"before": asdict(last.before), "after": asdict(last.after)}
    return {"samples": vision.samples, "blocks": len(vision.blocks), "tuned": tuned, **terms}
