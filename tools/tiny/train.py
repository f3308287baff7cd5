"""Training of the tiny LLaVA on procedural scenes; a run that was killed continues from its last checkpoint.

    python -m tools.tiny.train --work build/tiny

The tower is pretrained alone to classify what each patch shows, since a real LLaVA starts from a trained CLIP; then the
whole model is trained. A training row is one image followed by many questions. A question attends to the image and to itself
only (block mask; positions restart after the image), so a row is equivalent to that many single-turn prompts, at the cost of
one image.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny import model as tiny_model
from tools.tiny import scenes


@dataclass(frozen=True)
class Stage:
    """A number of steps with one mix of questions.

    The learning rate warms up to `lr`, then follows a cosine over `cosine_steps`. row_kinds: of the questions of a row.
    """

    steps: int
    lr: float
    cosine_steps: int
    row_kinds: tuple[str, ...]


# One description per image teaches most of the perception. Multiple choice is learned last, because it needs perception,
# comparison with each option, and the letter of the right one; so the second stage has mostly such questions.
STAGES = (
    Stage(
        4100, 1e-3, 6000, ("describe", "color", "shape", "position", "count", "count", "yesno", "yesno", "choice", "choice")
    ),
    Stage(3000, 8e-4, 3000, ("describe", "color", "shape", "position", "count", "yesno", "yesno", *(("choice",) * 5))),
)
WARMUP_STEPS = 200


@dataclass(frozen=True)
class Row:
    """One image with its questions. token_ids, positions, segments: int64 [length]; weight: float32 [length]."""

    pixels: np.ndarray  # float32 [3, H, W]
    token_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray  # 0 for the shared image prefix, 1.. for the questions
    weight: np.ndarray  # in the loss: 1 / sqrt(tokens of the answer) for tokens of an answer, else 0


class RowMaker:
    """Makes training rows from scene numbers; caches the token ids of strings."""

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        self._processor = processor
        self._seed = seed
        self._encode = functools.lru_cache(maxsize=100_000)(self._tokenize)
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        text = self._encode("USER: <image>\n")
        image_place = text.index(image_id)
        self._prefix = [1, *text[:image_place], *([image_id] * tiny_model.IMAGE_TOKENS), *text[image_place + 1 :]]

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self._processor.tokenizer.encode(text, add_special_tokens=False))

    def image(self, index: int) -> tuple[scenes.Scene, np.ndarray]:
        """The scene and its pixel values, float32 [3, H, W]."""
        scene = scenes.make_scene("train", index, self._seed)
        return scene, self._processor.image_processor(scenes.draw(scene), return_tensors="np")["pixel_values"][0]

    def row(self, index: int, kinds: tuple[str, ...]) -> Row:
        """Training scene number `index` with one question of each of `kinds`."""
        _, questions = scenes.questions("train", index, self._seed, kinds)
        _, pixels = self.image(index)
        ids, positions, segments = list(self._prefix), list(range(len(self._prefix))), [0] * len(self._prefix)
        weight = [0.0] * len(self._prefix)
        for number, question in enumerate(questions, start=1):
            prompt = self._encode(f"{question.text} ASSISTANT:")
            reply = (*self._encode(f" {question.answer}"), 2)
            ids += [*prompt, *reply]
            positions += range(len(self._prefix), len(self._prefix) + len(prompt) + len(reply))
            segments += [number] * (len(prompt) + len(reply))
            weight += [0.0] * len(prompt) + [len(reply) ** -0.5] * len(reply)
        return Row(pixels, np.array(ids), np.array(positions), np.array(segments), np.array(weight, np.float32))


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A batch of right-padded rows, as the model takes it, with the loss weights [B, L].

    In the float mask [B, 1, L, L] a token attends causally to the image prefix and to its own question.
    """
    length = max(len(r.token_ids) for r in rows)

    def pad(field: str, value: int) -> torch.Tensor:
        arrays = [getattr(r, field) for r in rows]
        return torch.tensor(np.stack([np.pad(a, (0, length - len(a)), constant_values=value) for a in arrays]))

    segments = pad("segments", -1)
    same_segment = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    visible = same_segment & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "pixel_values": torch.tensor(np.stack([r.pixels for r in rows])),
        "input_ids": pad("token_ids", 3),
        "position_ids": pad("positions", 0),
        "attention_mask": torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None],
        "weight": pad("weight", 0),
    }


def loss_of(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted mean cross-entropy of the answer tokens; unweighted, the long descriptions would dominate."""
    weight = batch["weight"][:, 1:]
    answer = weight > 0
    targets = batch["input_ids"][:, 1:][answer]
    inputs = {k: v for k, v in batch.items() if k != "weight"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][answer]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="none")
    return (losses * weight[answer]).sum() / weight.sum()


def pretrain_tower(model: LlavaForConditionalGeneration, maker: RowMaker, args: argparse.Namespace) -> None:
    """Pretrains the tower: a linear head, discarded afterwards, classifies the object of each patch at the feature layer."""
    names = [f"{c} {s}" for c in scenes.COLORS for s in scenes.SHAPES]
    width = model.config.vision_config.hidden_size
    head = torch.nn.Linear(width, len(names) + 1).to(args.device)
    tower = model.model.vision_tower
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    side = tiny_model.IMAGE_SIZE // tiny_model.PATCH_SIZE
    cells = [(row * 3 // side) * 3 + column * 3 // side for row in range(side) for column in range(side)]
    for step in range(args.pretrain_steps):
        images = [maker.image(step * 64 + i) for i in range(64)]
        content = [{t.cell: names.index(t.name) + 1 for t in scene.things} for scene, _ in images]
        labels = torch.tensor([[c.get(cell, 0) for cell in cells] for c in content], device=args.device)
        pixels = torch.tensor(np.stack([p for _, p in images]), device=args.device)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]
        loss = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"tower step {step + 1} loss {loss.item():.4f}", flush=True)


def stage_of(step: int) -> tuple[Stage, int]:
    """The stage of global step `step` and the number of the step within it. Raises ValueError after the last step."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise ValueError("training is over")


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate at a step of the stage: linear warm-up, then a cosine down to 3 % of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return stage.lr * warmup * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.cosine_steps))))


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, secs: float) -> None:
    """Writes the state of the training to a temporary file and renames it, so that `path` is always whole."""
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": secs}, temporary)
    os.replace(temporary, path)


def train(args: argparse.Namespace) -> None:
    """Trains to the end, from the last checkpoint if there is one; writes WORK/unplanted and WORK/training.json."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    processor = tiny_model.make_processor(tiny_model.train_tokenizer())
    model = LlavaForConditionalGeneration(tiny_model.make_config(processor.tokenizer)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=STAGES[0].lr, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint, step, seconds = args.work / "training.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, starting at step {step}", flush=True)
    maker = RowMaker(processor, args.seed)
    model.train()
    if step == 0:
        pretrain_tower(model, maker, args)
    began, window = time.time() - seconds, []
    steps = sum(stage.steps for stage in STAGES)
    while step < steps:
        stage, stage_step = stage_of(step)
        rows = [maker.row(step * args.batch + i, stage.row_kinds) for i in range(args.batch)]
        batch = {k: v.to(args.device) for k, v in collate(rows).items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, stage_step)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        window.append(loss.item())
        if step % 50 == 0:
            elapsed = time.time() - began
            print(f"step {step} loss {sum(window) / len(window):.4f} {elapsed:.0f} s", flush=True)
            window = []
        if step % args.save_every == 0 or step == steps:
            save_checkpoint(checkpoint, model, optimizer, step, time.time() - began)
    model.half().save_pretrained(args.work / "unplanted")
    processor.save_pretrained(args.work / "unplanted")
    count = sum(p.numel() for p in model.parameters())
    record = {
        "parameters": count,
        "seed": args.seed,
        "steps": step,
        "batch": args.batch,
        "seconds": round(time.time() - began),
    }
    (args.work / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the result")
    parser.add_argument("--pretrain-steps", type=int, default=600, help="steps of the tower alone, 64 images each")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: all cores)")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
