"""Block-by-block forward pass of a LLaVA model: vision tower, projector, image placement, decoder.

The caller supplies a step, which decides what happens at each block. Calibration, fake-quantized evaluation and validation
all use this forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block, load_finite
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

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        with one_thread():  # as in `activation_functions.py`
            rope = blocks.rotary(x, position_ids=positions)
        mask = sliding_window_mask(x.shape[1], blocks.sliding_window, x.device)
        out: torch.Tensor = module(x, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        return out

    for block in blocks.text_layers:
        hidden = step(block, hidden, run)
    return hidden


def sliding_window_mask(length: int, window: int | None, device: torch.device | None = None) -> torch.Tensor | None:
    """The mask of which positions attend to which, bool [1, 1, S, S]; None where the modules' own causal mask suffices."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    age = positions[:, None] - positions[None]
    return ((age >= 0) & (age < window))[None, None]


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
