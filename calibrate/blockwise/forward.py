"""Block-by-block forward pass of a LLaVA model: vision tower, projector, image placement, decoder.

The caller supplies a step, which decides what happens at each block. Calibration, fake-quantized evaluation and validation
all use this forward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block, load_finite
from qvlm_export.calibrate.checkpoint.prefix import PrefixCache
from qvlm_export.calibrate.checkpoint.samples import Placement, Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import one_thread

NEWLINE = "image_newline"
EMBEDDING, FINAL_NORM, HEAD = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
)

# Runs a loaded module on one input: (module, hidden states [1 or images, tokens, width]) -> hidden states.
Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]
# What to do at a block: loads it, runs all inputs through it, returns their outputs.
Step = Callable[[Block, Sequence[torch.Tensor], Run], Sequence[torch.Tensor]]


def float_step(source: TensorSource) -> Step:
    """A step that runs the float block on one input at a time."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
        with load_block(block, source) as module, torch.inference_mode():
            return [run(module, x) for x in inputs]

    return step


def run_vision_blocks(
    blocks: ModelBlocks, source: TensorSource, samples: Sequence[Sample], step: Step
) -> list[torch.Tensor]:
    """Runs tower and projector on all images; returns image features [image tokens, hidden] of each sample.

    A sample without images has features [0, 1].
    """
    pixels = [torch.from_numpy(s.pixel_values) for s in samples]
    batches: Sequence[torch.Tensor] = [p for p in pixels if len(p)]
    for entry in blocks.entries:
        batches = float_step(source)(entry, batches, lambda module, x: module(x))
    layer_outputs = {0: batches}
    for number, block in enumerate(blocks.vision_layers, start=1):
        batches = step(block, batches, lambda module, x: module(x, attention_mask=None))
        if number in blocks.features:
            layer_outputs[number] = batches
    batches = [torch.cat(parts, -1) for parts in zip(*(layer_outputs[n] for n in blocks.features), strict=True)]
    if blocks.drop_first:
        batches = [batch[:, 1:] for batch in batches]
    batches = step(blocks.projector, batches, lambda module, x: module(x))
    newline = load_finite(source, NEWLINE)[None] if NEWLINE in source else torch.zeros(0, 1)
    features = iter(batches)
    return [
        place_image_features(next(features).flatten(0, 1), newline, s.placement)
        if len(s.pixel_values)
        else torch.zeros(0, 1)
        for s in samples
    ]


def place_image_features(features: torch.Tensor, newline: torch.Tensor, placement: Placement | None) -> torch.Tensor:
    """Arranges features [n * tokens, hidden] of n images or tiles into one row for each image token, [image tokens, hidden].

    newline: the `image_newline` vector, [1, hidden]. placement: None where features are in place already.
    """
    if placement is None:
        return features
    table, weights = torch.cat([features, newline]), torch.from_numpy(placement.weights)
    rows = table[torch.from_numpy(placement.rows)]  # [image tokens, k, hidden]; index -1 is the newline
    return (rows * weights[..., None]).sum(1) if rows.shape[1] > 1 else rows[:, 0]


def run_decoder_blocks(
    blocks: ModelBlocks, source: TensorSource, samples: Sequence[Sample], features: Sequence[torch.Tensor], step: Step
) -> Sequence[torch.Tensor]:
    """Runs the decoder layers on all samples; returns hidden states [1, S, hidden] of each before the final norm.

    features: image features [image tokens, hidden] of each sample. Raises UserError when their number is not that of the
    sample's image tokens.
    """
    table = load_finite(source, EMBEDDING)
    hidden: Sequence[torch.Tensor] = [
        embed_tokens(table, blocks.image_token_id, s, image) for s, image in zip(samples, features, strict=True)
    ]
    del table

    for number, block in enumerate(blocks.text_layers):
        hidden = step(block, hidden, make_decoder_run(blocks, number))
    return hidden


@dataclass(frozen=True)
class DecoderRun:
    """Runs one decoder layer on whole sequences, or on what follows a prefix whose keys and values are known.

    rotary: computes cos and sin. window: as `sliding_window` of `ModelBlocks`. keys, values: of the p prefix tokens in this
    layer, float32 [1, kv_heads, p, head_dim]; None without a prefix.
    """

    rotary: nn.Module
    window: int | None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __call__(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, width] after the layer. x: before it, of the tokens behind the prefix."""
        start = 0 if self.keys is None else self.keys.shape[2]
        positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        with one_thread():  # as in `activation_functions.py`
            rope = self.rotary(x, position_ids=positions)
        mask, cache = sliding_window_mask(x.shape[1], self.window, x.device, start), {}
        if self.keys is not None and self.values is not None:
            cache = {name_of_cache(module): _Prepend(self.keys.to(x.device), self.values.to(x.device))}
        out: torch.Tensor = module(x, attention_mask=mask, position_ids=positions, position_embeddings=rope, **cache)
        return out

    def divide_values(self, factors: torch.Tensor) -> DecoderRun:
        """The run for a layer whose v_proj was equalized. factors: divisors of its outputs, [kv_heads * head_dim]."""
        if self.values is None:
            return self
        _, heads, _, width = self.values.shape
        return replace(self, values=self.values / factors.reshape(1, heads, 1, width).to(self.values.device))


def name_of_cache(layer: nn.Module) -> str:
    """The argument by which a decoder layer takes its cache; transformers 5.24 began to rename it."""
    return "cache" if "cache" in inspect.signature(type(layer).forward).parameters else "past_key_values"


class _Prepend:
    """Stands in for transformers' cache: puts the prefix's keys and values before those of the batch, and stores nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = keys, values

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = (len(keys), -1, -1, -1)
        return torch.cat([self._keys.expand(batch), keys], 2), torch.cat([self._values.expand(batch), values], 2)


class _Record:
    """Stands in for transformers' cache: keeps the keys and values of the last call, float32 [B, kv_heads, S, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def make_decoder_run(blocks: ModelBlocks, layer: int) -> DecoderRun:
    """How the decoder layer with this number is run on what follows `blocks.prefix`."""
    if blocks.prefix is None:
        return DecoderRun(blocks.rotary, blocks.sliding_window)
    keys, values = (torch.from_numpy(part[layer])[None] for part in (blocks.prefix.keys, blocks.prefix.values))
    return DecoderRun(blocks.rotary, blocks.sliding_window, keys, values)


def compute_prefix(
    blocks: ModelBlocks,
    source: TensorSource,
    token_ids: Sequence[int],
    observe: Callable[[str, torch.Tensor], object] = lambda *_: None,
) -> PrefixCache:
    """Keys and values of these tokens in every decoder layer of the float model. Loads every layer once.

    token_ids: without image tokens. observe: called with the name and the output [1, p, width] of every layer. Raises
    UserError naming the tensor that holds NaN or infinity.
    """
    sample = Sample(np.asarray(token_ids, np.int64), np.zeros((0, 3, 1, 1), np.float32), len(token_ids))
    keys: list[np.ndarray] = []
    values: list[np.ndarray] = []

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
        record, (x,) = _Record(), inputs
        with load_block(block, source) as module, torch.inference_mode():
            outputs = [run(functools.partial(module, **{name_of_cache(module): record}), x)]  # type: ignore[arg-type]
        observe(block.prefix, outputs[0])
        for parts, tensor in ((keys, record.keys), (values, record.values)):
            parts.append(tensor[0].clone().numpy())
        return outputs

    run_decoder_blocks(replace(blocks, prefix=None), source, [sample], [torch.zeros(0, 1)], step)
    return PrefixCache(tuple(map(int, token_ids)), tuple(keys), tuple(values))


def sliding_window_mask(
    length: int, window: int | None, device: torch.device | None = None, start: int = 0
) -> torch.Tensor | None:
    """The mask of which positions attend to which, bool [1, 1, S, start + S]; None where the modules' own suffices.

    length: S, of the queries. start: how many keys stand before those of the queries.
    """
    if not start and (window is None or length <= window):
        return None
    mask = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
    return (mask if window is None else mask.triu(start + 1 - window))[None, None]


def embed_tokens(table: torch.Tensor, image_token_id: int, sample: Sample, image: torch.Tensor) -> torch.Tensor:
    """Token embeddings [1, S, hidden], with the image features in place of the image tokens' embeddings.

    table: [vocab, hidden]. image: [image tokens, hidden]. Raises UserError when their number is not that of image tokens.
    """
    ids = torch.from_numpy(sample.input_ids)
    embeds = table[ids]
    is_image = ids == image_token_id
    if int(is_image.sum()) != len(image):
        raise UserError(
            f"a sample has {int(is_image.sum())} image tokens for {len(image)} image features; "
            "does the processor belong to this model?"
        )
    embeds[is_image] = image
    return embeds[None]


@dataclass(frozen=True)
class LanguageHead:
    """Final RMSNorm and lm_head. gain: of the norm, [hidden]. weight: [vocab, hidden]. epsilon: of the norm."""

    gain: torch.Tensor
    weight: torch.Tensor
    epsilon: float

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocab] of decoder outputs [..., hidden], in their dtype and differentiable."""
        return matmul(nn.functional.rms_norm(hidden, self.gain.shape, self.gain, self.epsilon), self.weight.T)


def load_head(source: TensorSource, epsilon: float) -> LanguageHead:
    """The model's head in float32; where embeddings are tied, the embedding table is its weight.

    Raises UserError naming the tensor that holds NaN or infinity.
    """
    return LanguageHead(load_finite(source, FINAL_NORM), load_finite(source, HEAD if HEAD in source else EMBEDDING), epsilon)
