"""The tiny LLaVA as one row of layers, all in memory, for studies of what quantizing some of them does to the others.

A layer is a group of linears that share an input. What lies between layers (norms, attention, the residual stream, the
placement of the picture among the tokens) is replayed with transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, get_linear, load_block, load_finite, make_blocks
from qvlm_export.calibrate.blockwise.forward import EMBEDDING, Run, embed_tokens, load_head
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import fit_scheme, parse_scheme_bits
from qvlm_export.calibrate.quantization.observers import make_histogram
from qvlm_export.calibrate.qvlm.clip_candidates import WHOLE, Clips, QuantizableLayer
from qvlm_export.calibrate.qvlm.joint_search import (
    Clip,
    Outputs,
    Replay,
    record_linear_outputs,
    relative_error,
    replay_module,
)
from qvlm_export.checkpoints.checkpoint import Checkpoint

Bridge = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # outputs of one block -> inputs of the next
Logits = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Chain:
    """A whole model as a row of layers, over one set of samples. Layers before the one in question make
    `list_linears_before`."""

    replays: tuple[Replay, ...]  # one a block
    bridges: tuple[Bridge, ...]  # outputs of the block before -> inputs of this one
    whole: tuple[nn.Module, ...]  # the float blocks
    places: tuple[tuple[int, int], ...]  # of each layer: its block, and its number in it
    layers: tuple[QuantizableLayer, ...]
    inputs: tuple[torch.Tensor, ...]  # of each layer in the float model, float32 [tokens, in]
    wanted: tuple[Any, ...]  # of each layer: what its linears make in the float model
    before: tuple[Any, ...]  # the same, or quantized
    names: tuple[str, ...]
    logits: Logits

    def given(self, first: int, window: Outputs) -> torch.Tensor:
        """What layer first + len(window) is given if the layers from `first` on make `window`: [tokens, in]."""
        block, target = self.places[first][0], self.places[first + len(window)][0]
        outputs = (*self._prefix(first), *window)
        replay = self.replays[block]
        if target == block:
            return replay.given(outputs)
        inputs = self.bridges[target](replay.finish(outputs[: len(replay.layers)]))
        return replace(self.replays[target], inputs=inputs).given(outputs[len(replay.layers) :])

    def final(self, first: int, window: Outputs) -> torch.Tensor:
        """The answers' logits if the layers from `first` on make `window` and those behind are float: [tokens, vocab]."""
        block = self.places[first][0]
        replay, outputs, number = self.replays[block], (*self._prefix(first), *window), first + len(window)
        while True:
            while len(outputs) < len(replay.layers):
                outputs = (*outputs, {n: x(replay.given(outputs)) for n, x in self.layers[number].linears.items()})
                number += 1
            hidden = replay.finish(outputs[: len(replay.layers)])
            outputs, block = outputs[len(replay.layers) :], block + 1
            if not outputs:
                break
            replay = replace(self.replays[block], inputs=self.bridges[block](hidden))
        for later in range(block, len(self.replays)):
            run = self.replays[later].run
            hidden = [run(self.whole[later], x) for x in self.bridges[later](hidden)]
        return self.logits(hidden)

    def _prefix(self, first: int) -> Outputs:
        return self.before[first - self.places[first][1] : first]


@contextmanager
def open_chain(checkpoint: Checkpoint, samples: Sequence[Sample], scheme: str, grid: Sequence[Clip]) -> Iterator[Chain]:
    """Samples have one picture each; those of one length are a batch. grid: the ranges that layers can be asked for."""
    lengths = sorted({len(s.input_ids) for s in samples})
    batches = [[s for s in samples if len(s.input_ids) == length] for length in lengths]
    ordered = [s for batch in batches for s in batch]
    tapped, whole = make_blocks(checkpoint.hf_config), make_blocks(checkpoint.hf_config)
    table, head = (
        load_finite(checkpoint.source, EMBEDDING),
        load_head(checkpoint.source, checkpoint.config.text.rms_norm_eps),
    )

    def placed(features: list[torch.Tensor]) -> list[torch.Tensor]:
        images = iter(features[0])
        return [torch.cat([embed_tokens(table, tapped.image_token_id, s, next(images)) for s in b]) for b in batches]

    def decode(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        rope = tapped.rotary(x, position_ids=positions)
        out: torch.Tensor = module(x, attention_mask=None, position_ids=positions, position_embeddings=rope)
        return out

    def logits(hidden: list[torch.Tensor]) -> torch.Tensor:
        rows = [row[None] for part in hidden for row in part]
        return torch.cat([head.logits(row[0])[s.answer_start - 1 : -1] for row, s in zip(rows, ordered, strict=True)])

    with ExitStack() as stack, torch.inference_mode():
        hidden = [torch.from_numpy(np.concatenate([s.pixel_values for s in ordered]))]
        for block in tapped.entries:
            hidden = [stack.enter_context(load_block(block, checkpoint.source))(hidden[0])]
        built = _Builder(stack, checkpoint, scheme, grid)
        for pair in zip(tapped.vision_layers, whole.vision_layers, strict=True):
            hidden = built.add(*pair, lambda module, x: module(x, attention_mask=None), lambda outputs: outputs, hidden)
        hidden = built.add(
            tapped.projector, whole.projector, lambda module, x: module(x), lambda out: [x[:, 1:] for x in out], hidden
        )
        for number, pair in enumerate(zip(tapped.text_layers, whole.text_layers, strict=True)):
            hidden = built.add(*pair, decode, (lambda outputs: outputs) if number else placed, hidden)
        yield built.chain(logits)


class _Builder:
    """Gathers a Chain block by block."""

    def __init__(self, stack: ExitStack, checkpoint: Checkpoint, scheme: str, grid: Sequence[Clip]) -> None:
        self._stack, self._source, self._scheme, self._grid = stack, checkpoint.source, scheme, grid
        fields = ("replays", "bridges", "whole", "places", "layers", "inputs", "wanted", "names")
        self._parts: dict[str, list[Any]] = {name: [] for name in fields}

    def add(self, tapped: Block, whole: Block, run: Run, bridge: Bridge, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the float block on what the block before made, keeps what its layers saw and made; returns its outputs."""
        module = self._stack.enter_context(load_block(tapped, self._source))
        batches, groups = bridge(hidden), [group.linears for group in find_shared_inputs(module)]
        rows: dict[str, list[torch.Tensor]] = {linears[0]: [] for linears in groups}

        def keeper(name: str) -> Callable[..., None]:
            return lambda _, args: rows[name].append(args[0].flatten(0, -2))

        handles = [get_linear(module, name).register_forward_pre_hook(keeper(name)) for name in rows]
        outputs, made = record_linear_outputs(module, [n for linears in groups for n in linears], run, batches)
        for handle in handles:
            handle.remove()
        parts = self._parts
        for place, linears in enumerate(groups):
            parts["places"].append((len(parts["replays"]), place))
            parts["inputs"].append(torch.cat(rows[linears[0]]))
            parts["wanted"].append({name: made[name] for name in linears})
            parts["layers"].append(self._planned({n: get_linear(module, n) for n in linears}, parts["inputs"][-1]))
            parts["names"].append(f"{tapped.prefix}.{linears[0]}")
        parts["whole"].append(self._stack.enter_context(load_block(whole, self._source)))
        parts["bridges"].append(bridge)
        parts["replays"].append(self._stack.enter_context(replay_module(module, groups, run, batches)))
        return outputs

    def _planned(self, linears: dict[str, nn.Linear], given: torch.Tensor) -> QuantizableLayer:
        histogram = make_histogram(given)
        plan = {
            name: fit_scheme(name, tuple(x.weight.shape), *parse_scheme_bits(self._scheme)) for name, x in linears.items()
        }
        weights = {(name, WHOLE): WHOLE.weight_amax(x.weight, plan[name]) for name, x in linears.items()}
        return QuantizableLayer(linears, plan, {clip: clip.activation_amax(histogram) for clip in self._grid}, weights)

    def chain(self, logits: Logits) -> Chain:
        parts = {name: tuple(values) for name, values in self._parts.items()}
        return Chain(**parts, before=parts["wanted"], logits=logits)


def with_quantized_prefix(chain: Chain, grid: Sequence[Clip]) -> Chain:
    """The same chain where what comes before is quantized, each layer with the range that is best for its own output."""
    for k, (block, place) in enumerate(chain.places):
        if place == 0 and block:
            last = chain.replays[block - 1]
            inputs = chain.bridges[block](last.finish(chain.before[k - len(last.layers) : k]))
            replays = (*chain.replays[:block], replace(chain.replays[block], inputs=inputs), *chain.replays[block + 1 :])
            chain = replace(chain, replays=replays)
        rows, layer, wanted = chain.given(k, ()), chain.layers[k], chain.wanted[k]
        best = min((layer.output(rows, Clips(c)) for c in grid), key=lambda output: relative_error(output, wanted))
        chain = replace(chain, before=(*chain.before[:k], best, *chain.before[k + 1 :]))
    return chain
