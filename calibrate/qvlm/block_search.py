"""Search of one module: its blocks of layers, one after the other, each jointly (Q-VLM, section 3.1).

A module is a transformer block or the projector. The ranges of a block's activations are searched jointly first, then those
of its weights: K + K^2 + K^3 layer forwards each for a block of three, where all its quantizers at once would take
K^2 + K^4 + K^6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.batching import batch_by_length
from qvlm_export.calibrate.blockwise.block_loader import CPU, move_tensors
from qvlm_export.calibrate.blockwise.blocks import get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.shared_inputs import list_linears, share_of_weights
from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.activation_range import OUTPUT, observe_magnitudes
from qvlm_export.calibrate.quantization.quantizer import sqnr_db
from qvlm_export.calibrate.quantization.record import LinearSqnr, RtnBaseline, measure_weight_sqnr, run_rtn_baseline
from qvlm_export.calibrate.qvlm.clip_candidates import (
    KINDS,
    Clips,
    QuantizableLayer,
    list_clips,
    make_quantizable_layer,
)
from qvlm_export.calibrate.qvlm.joint_search import (
    Outputs,
    Replay,
    SearchLayer,
    record_linear_outputs,
    relative_error,
    replay_module,
    search_tree,
)
from qvlm_export.calibrate.qvlm.observe import set_tensors_
from qvlm_export.calibrate.qvlm.partition import LayerInput

SQNR_ROWS = 128  # tokens on which the SQNR of a linear's output is measured
Layers = Sequence[QuantizableLayer]


@dataclass(frozen=True)
class BlockResult:
    """The chosen clips of a block of layers.

    outputs: of all layers of the module up to the block's last one. error: squared error of the block's output relative to
    the float output's squared norm; first_error: the same with absmax ranges everywhere. calls: how often the output of each
    layer was computed.
    """

    clips: tuple[Clips, ...]
    outputs: Outputs
    first_error: float
    error: float
    calls: tuple[int, ...]


def search_block(layers: Layers, replay: Replay, before: Outputs, float_outputs: Mapping[str, torch.Tensor]) -> BlockResult:
    """Searches the clips of a block's layers jointly, with inputs from the already quantized layers before.

    before: outputs of the layers before the block in the same module. float_outputs: the float model's outputs of the
    linears of the last layer, float32 [tokens, out].
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
    calls = tuple(map(sum, zip(*(search.calls for search in searches), strict=True)))
    return BlockResult(tuple(clips), searches[-1].outputs, searches[0].first_error, searches[-1].error, calls)


@dataclass(frozen=True)
class FloatRun:
    """What a module's search needs of the float model.

    outputs: of the module, for every batch. targets: of the linears of each block's last layer, float32 [tokens, out].
    probes: of all linears, for the tokens `rows` only.
    """

    outputs: list[torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    probes: Mapping[str, torch.Tensor]
    rows: torch.Tensor


def run_float(module: nn.Module, blocks: Sequence[Layers], run: Run, inputs: Sequence[torch.Tensor]) -> FloatRun:
    """Runs the float module on all batches of inputs, float32 [B, tokens, width]."""
    targets = {name for block in blocks for name in block[-1].linears}
    names = [name for block in blocks for layer in block for name in layer.linears]
    tokens = sum(x.shape[:-1].numel() for x in inputs)
    rows = torch.linspace(0, tokens - 1, min(SQNR_ROWS, tokens)).long()
    device = inputs[0].device if inputs else rows.device
    kept = dict.fromkeys((name for name in names if name not in targets), rows.to(device))
    outputs, linears = record_linear_outputs(module, names, run, inputs, kept)
    whole = {name: linears[name] for name in names if name in targets}
    probes = {name: whole[name][rows.to(device)] if name in whole else linears[name] for name in names}
    return FloatRun(outputs, whole, probes, rows.to(device))


@dataclass(frozen=True)
class ModuleSearch:
    """The searched blocks of a module.

    outputs: of the quantized module, for every batch. linears: the quantized linears; sqnr: of each of them. forwards: how
    often the module was run, by the share of its weights that computed.
    """

    outputs: list[torch.Tensor]
    results: tuple[BlockResult, ...]
    linears: Mapping[str, QuantizedLinear]
    sqnr: Mapping[str, LinearSqnr]
    forwards: float


def search_module(
    module: nn.Module, blocks: Sequence[Layers], run: Run, inputs: Sequence[torch.Tensor], exact: FloatRun
) -> ModuleSearch:
    """Searches all blocks of a module; there is at least one.

    inputs: of the module, from the already quantized modules before it, batches float32 [B, tokens, width].
    """
    results: list[BlockResult] = []
    layers = [layer for block in blocks for layer in block]
    names = [tuple(layer.linears) for layer in layers]
    with replay_module(module, names, run, inputs) as replay:
        for block in blocks:
            results.append(search_block(block, replay, results[-1].outputs if results else (), exact.targets))
        outputs = replay.finish(results[-1].outputs)
    clips = [clip for result in results for clip in result.clips]
    linears = {n: x for layer, chosen in zip(layers, clips, strict=True) for n, x in layer.quantize(chosen).items()}
    rounded = {name: rows for layer in results[-1].outputs for name, rows in layer.items()}
    sqnr = {
        name: LinearSqnr(
            measure_weight_sqnr(get_linear(module, name).weight, linear).weight_db,
            sqnr_db(exact.probes[name], rounded[name][exact.rows]),
        )
        for name, linear in linears.items()
    }
    calls = [count for result in results for count in result.calls]
    forwards = count_forwards(module, names, calls, [replay.runs[n] for n in range(len(names) + 1)])
    return ModuleSearch(outputs, tuple(results), linears, sqnr, forwards)


def count_forwards(
    module: nn.Module, layers: Sequence[tuple[str, ...]], calls: Sequence[int], replays: Sequence[int]
) -> float:
    """Returns how often a search runs the module, by the share of its weights that compute.

    layers: names of their linears. calls: how often the output of each layer is computed. replays: how often the module is
    replayed up to each layer, and to its end; only linears of no layer compute then, those that stay float.
    """
    names = list_linears(module)
    searched = {name for layer in layers for name in layer}
    forwards = sum(count * share_of_weights(module, layer) for layer, count in zip(layers, calls, strict=True))
    stops = [*(names.index(layer[0]) for layer in layers), len(names)]
    for stop, count in zip(stops, replays, strict=True):
        forwards += count * share_of_weights(module, [name for name in names[:stop] if name not in searched])
    return forwards


@dataclass(frozen=True)
class ModuleInputs:
    """What a module is searched on.

    schemes: of its linears that are quantized. inputs: of the module in the float model, then as many from the already
    quantized modules before it, float32 [n, tokens, width]. tuned: tensors that replace the module's own while it is
    quantized, by name inside it.
    """

    schemes: Mapping[str, LinearScheme]
    run: Run
    inputs: Sequence[torch.Tensor]
    tuned: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SearchedModule:
    """A module after its search.

    float_outputs, outputs: of the float module and of the quantized one, for every input, on the CPU. search: None where
    nothing is quantized. baseline: of round-to-nearest. largest: magnitudes, as from `observe_magnitudes`, of the float
    module and at the output of the quantized one. forwards: how often the module was run, in inputs.
    """

    float_outputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    search: ModuleSearch | None
    baseline: RtnBaseline
    largest: Mapping[str, float]
    forwards: float

    def linears(self) -> Mapping[str, QuantizedLinear]:
        """Returns the quantized linears by name inside the module."""
        return {} if self.search is None else self.search.linears


def search_both(
    module: nn.Module, blocks: Sequence[Sequence[LayerInput]], given: ModuleInputs, device: torch.device
) -> SearchedModule:
    """Runs the float module and searches the quantized one, which `given.tuned` changes in place. device: of the module."""
    half, run = len(given.inputs) // 2, given.run
    batches = batch_by_length(given.inputs[:half])
    halves = (given.inputs[:half], given.inputs[half:])
    baseline = run_rtn_baseline(module, given.schemes, run, list(zip(*halves, strict=True)), device)
    float_inputs, inputs = (move_tensors(device, batches.merge(part)) for part in halves)
    layers = [[make_quantizable_layer(module, layer, given.schemes) for layer in block] for block in blocks]
    with observe_magnitudes(module) as largest:
        exact = run_float(module, layers, run, float_inputs)
    del float_inputs
    set_tensors_(module, given.tuned)
    search = search_module(module, layers, run, inputs, exact) if layers and inputs else None
    outputs = [run(module, x) for x in inputs] if search is None else search.outputs
    largest[OUTPUT] = max([largest.get(OUTPUT, 0.0), *(float(x.abs().max()) for x in outputs)])
    forwards = (1 + (1 if search is None else search.forwards)) * sum(len(x) for x in inputs)
    float_outputs, split = (move_tensors(CPU, batches.split(part)) for part in (exact.outputs, outputs))
    return SearchedModule(float_outputs, split, search, baseline, largest, forwards)
