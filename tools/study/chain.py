"""Layer-by-layer replay of a whole LLaVA in memory, to measure what quantizing some layers does to later ones.

A layer is a set of linears that share an input, such as q, k and v. The computations between layers (norms, attention, the
residual stream, the placement of the image features among the tokens) are replayed with transformers' own modules. The whole
model must fit into memory, so this is for small models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, get_linear, load_block, load_finite, make_blocks
from qvlm_export.calibrate.blockwise.forward import (
    EMBEDDING,
    Run,
    compute_prefix,
    embed_tokens,
    float_step,
    load_head,
    make_decoder_run,
    run_vision_blocks,
)
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import fit_scheme, parse_scheme_bits
from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.qvlm.clip_candidates import ABSMAX_CLIP, Clips, QuantizableLayer
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
    """A whole model as a sequence of layers, over one set of samples.

    Layers that precede the ones in question have the outputs `preceding_outputs`, of float or of quantized layers.
    """

    replays: tuple[Replay, ...]  # one per block
    bridges: tuple[Bridge, ...]  # outputs of the preceding block -> inputs of this one
    float_blocks: tuple[nn.Module, ...]
    places: tuple[tuple[int, int], ...]  # of each layer: the number of its block, and its number in the block
    layers: tuple[QuantizableLayer, ...]
    inputs: tuple[torch.Tensor, ...]  # input of each layer in the float model, float32 [tokens, in]
    float_outputs: tuple[Any, ...]  # of each layer: the outputs of its linears in the float model, by name
    preceding_outputs: tuple[Any, ...]  # the same, or those of quantized layers
    names: tuple[str, ...]  # of the first linear of each layer
    logits: Logits  # outputs of the last block -> logits of the answer tokens

    def input_after(self, first: int, window: Outputs) -> torch.Tensor:
        """Input of layer first + len(window) if the layers from `first` on have the outputs `window`: [tokens, in]."""
        block, target = self.places[first][0], self.places[first + len(window)][0]
        outputs = (*self._preceding_in_block(first), *window)
        replay = self.replays[block]
        if target == block:
            return replay.layer_input(outputs)
        inputs = self.bridges[target](replay.finish(outputs[: len(replay.layers)]))
        return replace(self.replays[target], inputs=inputs).layer_input(outputs[len(replay.layers) :])

    def answer_logits(self, first: int, window: Outputs) -> torch.Tensor:
        """Logits of the answer tokens, [tokens, vocab], if the layers from `first` on have the outputs `window`.

        The layers after the window are float.
        """
        block = self.places[first][0]
        replay, outputs, number = self.replays[block], (*self._preceding_in_block(first), *window), first + len(window)
        while True:
            while len(outputs) < len(replay.layers):
                outputs = (*outputs, {n: x(replay.layer_input(outputs)) for n, x in self.layers[number].linears.items()})
                number += 1
            hidden = replay.finish(outputs[: len(replay.layers)])
            outputs, block = outputs[len(replay.layers) :], block + 1
            if not outputs:
                break
            replay = replace(self.replays[block], inputs=self.bridges[block](hidden))
        for later in range(block, len(self.replays)):
            run = self.replays[later].run
            hidden = [run(self.float_blocks[later], x) for x in self.bridges[later](hidden)]
        return self.logits(hidden)

    def _preceding_in_block(self, first: int) -> Outputs:
        return self.preceding_outputs[first - self.places[first][1] : first]


@contextmanager
def open_chain(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    scheme: str,
    grid: Sequence[Clip],
    *,
    vision: bool = True,
    prefix: Sequence[int] = (),
) -> Iterator[Chain]:
    """The chain of a checkpoint over samples; those of equal length form a batch.

    scheme: such as W4A4. grid: the clipping ranges of activations that the layers support. vision: whether the layers of
    tower and projector are part of the chain; samples then have one image each, in place of CLIP's patch tokens. prefix:
    tokens that samples begin with, which are not quantized.
    """
    replay_blocks, float_blocks = make_blocks(checkpoint.hf_config), make_blocks(checkpoint.hf_config)
    cache = compute_prefix(replay_blocks, checkpoint.source, prefix) if prefix else None
    replay_blocks, samples = replace(replay_blocks, prefix=cache), cut_prefix(samples, prefix) if prefix else samples
    lengths = sorted({len(s.input_ids) for s in samples})
    batches = [[s for s in samples if len(s.input_ids) == length] for length in lengths]
    ordered = [s for batch in batches for s in batch]
    table, head = (
        load_finite(checkpoint.source, EMBEDDING),
        load_head(checkpoint.source, checkpoint.config.text.rms_norm_eps),
    )

    def embed(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        images = iter(features)
        return [torch.cat([embed_tokens(table, replay_blocks.image_token_id, s, next(images)) for s in b]) for b in batches]

    def logits(hidden: list[torch.Tensor]) -> torch.Tensor:
        rows = [row[None] for part in hidden for row in part]
        return torch.cat(
            [head.logits(row[0])[max(s.answer_start - 1, 0) : -1] for row, s in zip(rows, ordered, strict=True)]
        )

    with ExitStack() as stack, torch.inference_mode():
        builder = _ChainBuilder(stack, checkpoint, scheme, grid)
        if vision:
            hidden = _add_vision_layers(builder, (replay_blocks, float_blocks), ordered)
        else:
            features = run_vision_blocks(replay_blocks, checkpoint.source, ordered, float_step(checkpoint.source))
            hidden = embed(features)
        for number, pair in enumerate(zip(replay_blocks.text_layers, float_blocks.text_layers, strict=True)):
            bridge = (lambda outputs: embed(outputs[0])) if vision and not number else (lambda outputs: outputs)
            hidden = builder.add(*pair, make_decoder_run(replay_blocks, number), bridge, hidden)
        yield builder.chain(logits)


def _add_vision_layers(
    builder: _ChainBuilder, blocks: tuple[ModelBlocks, ModelBlocks], samples: Sequence[Sample]
) -> list[torch.Tensor]:
    """Adds the layers of CLIP's tower and of the projector; returns the image features of all samples, in one batch."""
    replay_blocks, float_blocks = blocks
    hidden = [torch.from_numpy(np.concatenate([s.pixel_values for s in samples]))]
    for block in replay_blocks.entries:
        hidden = [builder.load(block)(hidden[0])]
    for pair in zip(replay_blocks.vision_layers, float_blocks.vision_layers, strict=True):
        hidden = builder.add(*pair, lambda module, x: module(x, attention_mask=None), lambda outputs: outputs, hidden)
    return builder.add(
        replay_blocks.projector,
        float_blocks.projector,
        lambda module, x: module(x),
        lambda out: [x[:, 1:] for x in out],
        hidden,
    )


class _ChainBuilder:
    """Builds a Chain block by block, in the order of the forward pass."""

    def __init__(self, stack: ExitStack, checkpoint: Checkpoint, scheme: str, grid: Sequence[Clip]) -> None:
        self._stack, self._source, self._scheme, self._grid = stack, checkpoint.source, scheme, grid
        fields = ("replays", "bridges", "float_blocks", "places", "layers", "inputs", "float_outputs", "names")
        self._parts: dict[str, list[Any]] = {name: [] for name in fields}

    def load(self, block: Block) -> nn.Module:
        """The block with its weights, which stay in memory as long as the chain."""
        return self._stack.enter_context(load_block(block, self._source))

    def add(
        self, replay_block: Block, float_block: Block, run: Run, bridge: Bridge, hidden: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Runs the float block on the outputs of the preceding one and records the inputs and outputs of its layers.

        Returns the outputs of the block.
        """
        module = self.load(replay_block)
        batches, layers = bridge(hidden), [shared.linears for shared in find_shared_inputs(module)]
        rows: dict[str, list[torch.Tensor]] = {linears[0]: [] for linears in layers}

        def make_hook(name: str) -> Callable[..., None]:
            return lambda _, args: rows[name].append(args[0].flatten(0, -2))

        handles = [get_linear(module, name).register_forward_pre_hook(make_hook(name)) for name in rows]
        outputs, linear_outputs = record_linear_outputs(module, [n for linears in layers for n in linears], run, batches)
        for handle in handles:
            handle.remove()
        parts = self._parts
        for place, linears in enumerate(layers):
            parts["places"].append((len(parts["replays"]), place))
            parts["inputs"].append(torch.cat(rows[linears[0]]))
            parts["float_outputs"].append({name: linear_outputs[name] for name in linears})
            parts["layers"].append(self._make_layer({n: get_linear(module, n) for n in linears}, parts["inputs"][-1]))
            parts["names"].append(f"{replay_block.prefix}.{linears[0]}")
        parts["float_blocks"].append(self.load(float_block))
        parts["bridges"].append(bridge)
        parts["replays"].append(self._stack.enter_context(replay_module(module, layers, run, batches)))
        return outputs

    def _make_layer(self, linears: dict[str, nn.Linear], inputs: torch.Tensor) -> QuantizableLayer:
        histogram = observe_rows("inputs", inputs.reshape(-1, 1)).histogram()
        schemes = {
            name: fit_scheme(name, tuple(x.weight.shape), *parse_scheme_bits(self._scheme)) for name, x in linears.items()
        }
        weights = {(name, ABSMAX_CLIP): ABSMAX_CLIP.weight_amax(x.weight, schemes[name]) for name, x in linears.items()}
        return QuantizableLayer(linears, schemes, {clip: clip.activation_amax(histogram) for clip in self._grid}, weights)

    def chain(self, logits: Logits) -> Chain:
        """The chain of all blocks that were added, with float outputs of preceding layers."""
        fields = {name: tuple(values) for name, values in self._parts.items()}
        return Chain(**fields, preceding_outputs=fields["float_outputs"], logits=logits)


def quantize_preceding(chain: Chain, grid: Sequence[Clip]) -> Chain:
    """The same chain with quantized preceding layers, each with the clipping range that is best for its own output."""
    for k, (block, place) in enumerate(chain.places):
        if place == 0 and block:
            previous = chain.replays[block - 1]
            inputs = chain.bridges[block](previous.finish(chain.preceding_outputs[k - len(previous.layers) : k]))
            replays = (*chain.replays[:block], replace(chain.replays[block], inputs=inputs), *chain.replays[block + 1 :])
            chain = replace(chain, replays=replays)
        rows, layer, float_outputs = chain.input_after(k, ()), chain.layers[k], chain.float_outputs[k]
        best = min((layer.output(rows, Clips(c)) for c in grid), key=lambda output: relative_error(output, float_outputs))
        chain = replace(chain, preceding_outputs=(*chain.preceding_outputs[:k], best, *chain.preceding_outputs[k + 1 :]))
    return chain
