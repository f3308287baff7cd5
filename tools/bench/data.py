"""Calibration and evaluation samples of the benchmark, as files that a peer in another environment reads with numpy alone.

    python -m tools.bench.data --model qvlm_export/tiny --out build/bench/data

Calibration: 64 questions of the calibration split, other scenes for each seed; those of seed 0 are the set that ships with
the package. Evaluation: 1,000 questions about test scenes, which neither training nor calibration saw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.inputs.samples import encode, load_processor
from tools.tiny import scenes
from tools.tiny.accuracy import Item, unseen_items

CALIBRATION_SAMPLES, QUESTIONS, SEEDS = 64, 1000, (0, 1, 2)


def calibration_items(seed: int, count: int = CALIBRATION_SAMPLES) -> list[Item]:
    """`count` questions on as many scenes of the calibration split, the kinds in turn; seeds share no scene."""
    items = []
    for number in range(count):
        kind = scenes.KINDS[number % len(scenes.KINDS)]
        scene, (question,) = scenes.questions("calib", seed * count + number, kinds=(kind,))
        items.append(Item(question.kind, scenes.draw(scene), question.text, question.answer))
    return items


def encode_items(items: Sequence[Item], processor: Any) -> list[Sample]:
    """As a calibration file's lines are encoded: the model's own chat template, the answer and the end token after it."""
    samples = []
    for item in items:
        prompt = chat_text(processor, [{"role": "user", "text": item.prompt, "images": 1}])
        pixels, ids = encode(processor, prompt, [item.image])
        _, whole = encode(processor, f"{prompt} {item.answer}", [item.image])
        if not np.array_equal(ids, whole[: len(ids)]):
            raise ValueError(f"{item.prompt!r}: the tokenizer joins prompt and answer, so the answer has no first token")
        samples.append(Sample(np.append(whole, processor.tokenizer.eos_token_id), pixels, len(ids)))
    return samples


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """One picture a sample. input_ids int64 [tokens in all], offsets int64 [n + 1], pixel_values float32 [n, 3, R, R],
    answer_start int64 [n], counted from the sample's own first token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        input_ids=np.concatenate([s.input_ids for s in samples]),
        offsets=np.cumsum([0, *(len(s.input_ids) for s in samples)]),
        pixel_values=np.concatenate([s.pixel_values for s in samples]),
        answer_start=np.array([s.answer_start for s in samples]),
    )


def load_samples(path: Path) -> list[Sample]:
    """What `save_samples` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    spans = zip(arrays["offsets"], arrays["offsets"][1:], arrays["answer_start"], strict=False)
    return [
        Sample(arrays["input_ids"][first:last], arrays["pixel_values"][number : number + 1], int(start))
        for number, (first, last, start) in enumerate(spans)
    ]


def answer_spans(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Positions first..last - 1 of each sample whose logits predict the answer and its end token."""
    return [(s.answer_start - 1, len(s.input_ids) - 1) for s in samples]


def calibration_file(folder: Path, seed: int, samples: int = CALIBRATION_SAMPLES) -> Path:
    return folder / (f"calibration-{seed}.npz" if samples == CALIBRATION_SAMPLES else f"calibration-{seed}-{samples}.npz")


def evaluation_file(folder: Path, questions: int = QUESTIONS) -> Path:
    return folder / f"evaluation-{questions}.npz"


def make_data(model: Path, folder: Path, questions: int = QUESTIONS, samples: int = CALIBRATION_SAMPLES) -> None:
    """Writes the files that are not there yet. Both models of the benchmark have one processor, so they share them.

    samples: that a calibration set has; fewer than usual are the first of the usual ones.
    """
    processor, usual = None, max(samples, CALIBRATION_SAMPLES)
    sets = {
        calibration_file(folder, seed, samples): (lambda s=seed: calibration_items(s, usual)[:samples]) for seed in SEEDS
    }
    for path, items in {**sets, evaluation_file(folder, questions): lambda: unseen_items(questions)}.items():
        if not path.exists():
            processor = processor or load_processor(model)
            unfinished = path.with_suffix(".part.npz")
            save_samples(unfinished, encode_items(items(), processor))
            unfinished.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    arguments = parser.parse_args()
    make_data(arguments.model, arguments.out, arguments.questions)
