"""Calibration record of a searched block: errors by modality, and bits, range coverage and SQNR of every quantized linear.

It is computed from what the search holds anyway: outputs, equalized weights, and a histogram of every shared input. A layer
of the record is the linears that share an input. Values that do not exist (SQNR of an exact weight, errors of a modality
that no sample has) are left out or None, never infinite, as JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qvlm_export.calibrate.blockwise.block_writer import FALLBACKS
from qvlm_export.calibrate.blockwise.blocks import Block
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.quantization.quantizer import activation_scale
from qvlm_export.calibrate.quantization.record import (
    RtnBaseline,
    compute_errors_by_label,
    describe_massive,
    make_linear_record,
)
from qvlm_export.calibrate.quantization.tokens import TokenLabel, mean_token_error
from qvlm_export.calibrate.qvlm.entropy import histogram_entropy
from qvlm_export.calibrate.qvlm.partition import LayerInput, partition_by_entropy

BlockOutputs = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]


def make_block_record(
    block: Block, search: BlockSearch, results: BlockOutputs, baseline: RtnBaseline, texts: Sequence[Sample] = ()
) -> dict[str, Any]:
    """Returns the record of one block. Errors are means over tokens of the squared error relative to the float output.

    results: of every input, the block's output in the float model and in the quantized one, float32 [n, tokens, width], and
    the TokenLabel of its tokens, int64 [tokens].
    texts: of a decoder layer, the prompts of its inputs. massive_activation: see `describe_massive`.
    activation_errors: by linear, what an input in 8 bits adds to the block's error. FALLBACKS: linears whose input stays
    float for that reason.
    compared: errors by label on the baseline's inputs, of round-to-nearest and of the search.
    """
    float_outputs, outputs, labels = results
    compared_floats, compared_outputs, compared_labels = ([part[n] for n in baseline.numbers] for part in results)
    compared = {
        "inputs": len(baseline.numbers),
        "rtn": compute_errors_by_label(baseline.outputs, compared_floats, compared_labels),
        "searched": compute_errors_by_label(compared_outputs, compared_floats, compared_labels),
    }
    return {
        "name": block.prefix,
        "searched": search.quantized is not None,
        "compared": compared,
        "error": mean_token_error(outputs, float_outputs),
        "errors": compute_errors_by_label(outputs, float_outputs, labels),
        "layers": make_layer_records(block, search),
        "largest_activations": dict(search.largest_activations),
        "activation_errors": dict(search.activation_errors),
        FALLBACKS: search.fallbacks(),
        "massive_activation": describe_massive(float_outputs, texts),
        "forwards": round(search.forwards, 1),
    }


def make_layer_records(block: Block, search: BlockSearch) -> list[dict[str, Any]]:
    """Returns the records of the block's layers that hold quantized linears, in the order in which they are computed.

    bits: of the layer's input, or of its weights where the input stays float.
    entropy: of the codes of the quantized model's input, in nats, with the chosen clipping range, or with the absmax range
    where the input stays float.
    largest: magnitude of the input by the kind of token; the answer's is that of decode positions.
    """
    quantized = search.quantized
    if quantized is None:
        return []
    records = []
    for shared in find_shared_inputs(search.module):
        linears = {name: quantized.linears[name] for name in shared.linears if name in quantized.linears}
        if not linears:
            continue
        observer = quantized.inputs[shared.linears[0]]
        histogram = observer.histogram()
        bits = {name: x.scheme.activation_bits or x.scheme.weight_bits for name, x in linears.items()}
        widest = max(linears, key=lambda name: bits[name])
        scale = linears[widest].input_scale or activation_scale(histogram.amax, bits[widest])
        linear_records = {
            f"{block.prefix}.{name}": make_linear_record(linear, quantized.sqnr[name], histogram.amax)
            for name, linear in linears.items()
        }
        entropy = histogram_entropy(histogram, scale, bits[widest])
        largest = {k.name.lower(): float(observer.amax([k]).max()) for k in TokenLabel if observer.tokens([k])}
        records.append({"linears": linear_records, "bits": bits[widest], "entropy": entropy, "largest": largest})
    return records


def mark_partition(blocks: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Returns the records with `starts_block` in every layer, and the thresholds h0 in nats by bits.

    `starts_block` marks the blocks that Q-VLM (arXiv 2410.08119) would have searched jointly, by its rule over the entropies
    of all layers with their median as h0. It is for information only: the search here takes whole transformer blocks.
    """
    layers = [
        LayerInput(block["name"], tuple(layer["linears"]), layer["bits"], layer["entropy"], {})
        for block in blocks
        for layer in block["layers"]
    ]
    parts, thresholds = partition_by_entropy(layers)
    starts = iter([k in {part.start for part in parts} for k in range(len(layers))])
    marked = [
        {**block, "layers": [{**layer, "starts_block": next(starts)} for layer in block["layers"]]} for block in blocks
    ]
    return marked, thresholds
