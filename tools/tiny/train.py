"""Trains the tiny LLaVA on procedurally drawn scenes; survives kill -9 and goes on from its last checkpoint.

    python -m tools.tiny.train --work build/tiny

First the tower alone learns to name what each patch shows (as a real LLaVA starts from a trained CLIP), then everything
is trained together. A training row is one picture followed by many questions. Every question sees the picture and
itself only (block mask, positions restart after the picture), so a row equals that many single-turn prompts at the
cost of one picture.
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
    """Steps with one mix of questions. The learning rate warms up to `lr`, then follows a cosine over `cosine_steps`."""

    steps: int
    lr: float
    cosine_steps: int
    row_kinds: tuple[str, ...]


# One description a picture teaches most of the seeing. Multiple choice is learned last (perceive, compare with each option,
# name its letter), so the second stage asks mostly for that.
STAGES = (
    Stage(
        4100, 1e-3, 6000, ("describe", "color", "shape", "position", "count", "count", "yesno", "yesno", "choice", "choice")
    ),
    Stage(3000, 8e-4, 3000, ("describe", "color", "shape", "position", "count", "yesno", "yesno", *(("choice",) * 5))),
)
WARMUP_STEPS = 200


@dataclass(frozen=True)
class Row:
    """One picture with its questions. token_ids, positions, segments: int64 [length]; weight: float32 [length]."""

    pixels: np.ndarray  # float32 [3, H, W]
    token_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray  # 0 for the shared picture prefix, 1.. for the questions
    weight: np.ndarray  # of the token in the loss: 0 outside answers, there 1/sqrt(tokens of the answer)


class RowMaker:
    """Turns scene numbers into rows; keeps the token ids of strings it has seen."""

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        self._processor = processor
        self._seed = seed
        self._encode = functools.lru_cache(maxsize=100_000)(self._encode_once)
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        text = self._encode("USER: <image>\n")
        at = text.index(image_id)
        self._prefix = [1, *text[:at], *([image_id] * tiny_model.IMAGE_TOKENS), *text[at + 1 :]]

    def _encode_once(self, text: str) -> tuple[int, ...]:
        return tuple(self._processor.tokenizer.encode(text, add_special_tokens=False))

    def picture(self, index: int) -> tuple[scenes.Scene, np.ndarray]:
        """The scene and its pixel values, float32 [3, H, W]."""
        scene = scenes.make_scene("train", index, self._seed)
        return scene, self._processor.image_processor(scenes.draw(scene), return_tensors="np")["pixel_values"][0]

    def row(self, index: int, kinds: tuple[str, ...]) -> Row:
        _, asked = scenes.questions("train", index, self._seed, kinds)
        _, pixels = self.picture(index)
        ids, positions, segments = list(self._prefix), list(range(len(self._prefix))), [0] * len(self._prefix)
        weight = [0.0] * len(self._prefix)
        for number, question in enumerate(asked, start=1):
            prompt = self._encode(f"{question.text} ASSISTANT:")
            reply = (*self._encode(f" {question.answer}"), 2)
            ids += [*prompt, *reply]
            positions += range(len(self._prefix), len(self._prefix) + len(prompt) + len(reply))
            segments += [number] * (len(prompt) + len(reply))
            weight += [0.0] * len(prompt) + [len(reply) ** -0.5] * len(reply)
        return Row(pixels, np.array(ids), np.array(positions), np.array(segments), np.array(weight, np.float32))


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Right-pads rows; the float mask [B, 1, L, L] lets a token see the prefix and its own question, causally."""
    length = max(len(r.token_ids) for r in rows)

    def pad(field: str, value: int) -> torch.Tensor:
        arrays = [getattr(r, field) for r in rows]
        return torch.tensor(np.stack([np.pad(a, (0, length - len(a)), constant_values=value) for a in arrays]))

    segments = pad("segments", -1)
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    seen = same & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "pixel_values": torch.tensor(np.stack([r.pixels for r in rows])),
        "input_ids": pad("token_ids", 3),
        "position_ids": pad("positions", 0),
        "attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None],
        "weight": pad("weight", 0),
    }


def loss_of(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted mean cross-entropy of the answer tokens; without weights the long descriptions drown the rest."""
    weight = batch["weight"][:, 1:]
    answer = weight > 0
    targets = batch["input_ids"][:, 1:][answer]
    inputs = {k: v for k, v in batch.items() if k != "weight"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][answer]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="none")
    return (losses * weight[answer]).sum() / weight.sum()


def pretrain_tower(model: LlavaForConditionalGeneration, maker: RowMaker, args: argparse.Namespace) -> None:
    """Teaches the tower's feature layer what object each patch belongs to; the linear head is thrown away."""
    names = [f"{c} {s}" for c in scenes.COLORS for s in scenes.SHAPES]
    width = model.config.vision_config.hidden_size
    head = torch.nn.Linear(width, len(names) + 1).to(args.device)
    tower = model.model.vision_tower
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    side = tiny_model.IMAGE_SIZE // tiny_model.PATCH_SIZE
    cells = [(row * 3 // side) * 3 + column * 3 // side for row in range(side) for column in range(side)]
    for step in range(args.pretrain_steps):
        drawn = [maker.picture(step * 64 + i) for i in range(64)]
        content = [{t.cell: names.index(t.name) + 1 for t in scene.things} for scene, _ in drawn]
        labels = torch.tensor([[c.get(cell, 0) for cell in cells] for c in content], device=args.device)
        pixels = torch.tensor(np.stack([p for _, p in drawn]), device=args.device)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer][:, 1:]
        loss = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"tower step {step + 1} loss {loss.item():.4f}", flush=True)


def stage_of(step: int) -> tuple[Stage, int]:
    """The stage that global step `step` belongs to, and the step's number inside it."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise ValueError("training is over")


def learning_rate(stage: Stage, step: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return stage.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.cosine_steps))))


def save_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, secs: float) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": secs}, temporary)
    os.replace(temporary, path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    processor = tiny_model.make_processor(tiny_model.train_tokenizer())
    model = LlavaForConditionalGeneration(tiny_model.make_config(processor.tokenizer)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=STAGES[0].lr, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint, step, seconds = args.work / "training.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds = saved["step"], saved["seconds"]
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
            taken = time.time() - began
            print(f"step {step} loss {sum(window) / len(window):.4f} {taken:.0f} s", flush=True)
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
    parser.add_argument("--pretrain-steps", type=int, default=600, help="steps of the tower alone, 64 pictures each")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: all cores)")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
