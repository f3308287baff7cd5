"""What the record keeps of each block: errors by modality, and for every quantized linear its bits, range and SQNR. torch.

Only from what the search holds anyway: outputs, folded weights, and a histogram of every layer's input. A layer is a group
of linears that share an input. Values that do not exist (SQNR of an exact weight, errors of a modality that no sample has)
are left out or None, never infinite, as JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qvlm_export.calibrate.blockwise.blocks import Block
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.blockwise.token_kinds import TokenLabel
from qvlm_export.calibrate.calibrators.block_search import BlockSearch, weighted_relative_error
from qvlm_export.calibrate.calibrators.linear_record import make_linear_record
from qvlm_export.calibrate.calibrators.rtn_baseline import RtnBaseline
from qvlm_export.calibrate.quantization.quantizer import activation_scale
from qvlm_export.calibrate.qvlm.entropy import histogram_entropy
from qvlm_export.calibrate.qvlm.partition import LayerInput, partition_by_entropy

BlockOutputs = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]


def make_block_record(block: Block, search: BlockSearch, judged: BlockOutputs, nearest: RtnBaseline) -> dict[str, Any]:
    """One block. Errors are squared, of its output against the float model's, relative to that; None where not searched.

    judged: of every input what is wanted of the block, its output, float32 [n, tokens, width], and TokenLabel int64
    [tokens]. compared: on some of them, by label, rounded to nearest and as searched. held_back_errors: before and after
    learning, on the samples that it did not see, as they count there.
    """
    best, learned = search.best, search.learned
    wanted, outputs, labels = judged
    some = [[part[number] for number in nearest.numbers] for part in judged]
    compared = {
        "inputs": len(nearest.numbers),
        "nearest": compute_errors_by_label(nearest.outputs, some[0], some[2]),
        "searched": compute_errors_by_label(some[1], some[0], some[2]),
    }
    return {
        "name": block.prefix,
        "searched": best is not None,
        "compared": compared,
        "held_back_errors": None if learned is None else [learned.error_before, learned.error_after],
        "error": weighted_relative_error(outputs, wanted),
        "errors": compute_errors_by_label(outputs, wanted, labels),
        "layers": make_layer_records(block, search),
        "forwards": round(search.forwards, 1),
        "backwards": search.backwards,
    }


def compute_errors_by_label(
    outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Squared error relative to the squared size of what is wanted, for the tokens of each label that occurs.

    outputs, wanted: float32 [n, tokens, width]; labels: int64 [tokens], or [1] for all tokens of an input.
    """
    wrong, size = torch.zeros(2, len(TokenLabel), dtype=torch.float64)
    for output, exact, label in zip(outputs, wanted, labels, strict=True):
        tokens = label.expand(output.shape[1])
        wrong.index_add_(0, tokens, (output - exact).square().sum((0, 2)).double())
        size.index_add_(0, tokens, exact.square().sum((0, 2)).double())
    found = {int(n) for label in labels for n in label.unique()}
    return {label.name.lower(): float(wrong[label] / size[label].clamp(min=1e-30)) for label in TokenLabel if label in found}


def make_layer_records(block: Block, search: BlockSearch) -> list[dict[str, Any]]:
    """The block's layers that hold quantized linears, in the order they are computed.

    bits: of the layer's input, of its weights where that stays float. entropy: of the codes of the input as the search saw
    it, in nats, with the chosen range, with the whole one where it stays float. largest: magnitude of its input by the kind
    of token, the answer's being those of decoding.
    """
    best = search.best
    if best is None:
        return []
    records = []
    for group in find_shared_inputs(search.module):
        found = {name: best.found[name] for name in group.linears if name in best.found}
        if not found:
            continue
        seen = best.inputs[group.linears[0]]
        inputs = seen.histogram()
        bits = {name: x.scheme.activation_bits or x.scheme.weight_bits for name, x in found.items()}
        widest = max(found, key=lambda name: bits[name])
        scale = found[widest].input_scale or activation_scale(inputs.amax, bits[widest])
        linears = {
            f"{block.prefix}.{name}": make_linear_record(linear, best.fidelity[name], inputs.amax)
            for name, linear in found.items()
        }
        entropy = histogram_entropy(inputs, scale, bits[widest])
        largest = {k.name.lower(): float(seen.amax([k]).max()) for k in TokenLabel if seen.tokens([k])}
        records.append({"linears": linears, "bits": bits[widest], "entropy": entropy, "largest": largest})
    return records


def mark_partition(blocks: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The records with `starts_block` in every layer, and h0 in nats by bits.

    By the paper's rule over all layers' entropies, their median as h0: what it would have searched jointly. The search
    itself takes whole blocks.
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
