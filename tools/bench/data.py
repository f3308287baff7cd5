"""Calibration and evaluation sets of the benchmark, stored as .npz so that peers in other environments need only numpy.

    python -m tools.bench.data --model qvlm_export/tiny --out build/bench/data

A calibration set has 64 questions about scenes of the calibration split, different scenes for each seed; the set of seed 0
is the one that ships with the package. The evaluation set has 1,000 questions about scenes of the test split, which are used
in neither training nor calibration.
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
    """`count` questions about as many scenes of the calibration split, cycling through the kinds; seeds share no scene."""
    items = []
    for number in range(count):
        kind = scenes.KINDS[number % len(scenes.KINDS)]
        scene, (question,) = scenes.questions("calib", seed * count + number, kinds=(kind,))
        items.append(Item(question.kind, scenes.draw(scene), question.text, question.answer))
    return items


def encode_items(items: Sequence[Item], processor: Any) -> list[Sample]:
    """Samples of items: the model's chat template, then the answer and the end token, as calibration files are encoded.

    Raises ValueError if the tokens of prompt and answer do not begin with the tokens of the prompt.
    """
    samples = []
    for item in items:
        prompt = chat_text(processor, [{"role": "user", "text": item.prompt, "images": 1}])
        pixels, ids = encode(processor, prompt, [item.image])
        _, all_ids = encode(processor, f"{prompt} {item.answer}", [item.image])
        if not np.array_equal(ids, all_ids[: len(ids)]):
            raise ValueError(f"{item.prompt!r}: the tokenizer joins prompt and answer, so the answer has no first token")
        samples.append(Sample(np.append(all_ids, processor.tokenizer.eos_token_id), pixels, len(ids)))
    return samples


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Writes samples of at most one image each as .npz.

    The arrays are input_ids int64 [tokens of all samples], offsets int64 [n + 1], pixel_values float32 [m, 3, R, R] of the m
    samples with an image and answer_start int64 [n], which counts from the sample's own first token. If some samples have no
    image, there is also has_image bool [n]. Raises ValueError if a sample has several images.
    """
    has_image = np.array([len(s.pixel_values) for s in samples])
    if has_image.max(initial=0) > 1:
        raise ValueError("a sample has several images")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        input_ids=np.concatenate([s.input_ids for s in samples]),
        offsets=np.cumsum([0, *(len(s.input_ids) for s in samples)]),
        pixel_values=np.concatenate([s.pixel_values for s in samples if len(s.pixel_values)] or [samples[0].pixel_values]),
        answer_start=np.array([s.answer_start for s in samples]),
        **({} if has_image.all() else {"has_image": has_image.astype(bool)}),
    )


def load_samples(path: Path) -> list[Sample]:
    """Reads the samples that `save_samples` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    has_image = arrays.get("has_image", np.ones(len(arrays["answer_start"]), bool))
    spans = zip(arrays["offsets"], arrays["offsets"][1:], arrays["answer_start"], strict=False)
    ends = np.cumsum(has_image)
    return [
        Sample(arrays["input_ids"][first:last], arrays["pixel_values"][end - image : end], int(start))
        for (first, last, start), image, end in zip(spans, has_image.astype(int), ends, strict=True)
    ]


def answer_spans(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """(first, last) of each sample: the logits at positions first to last - 1 predict the answer and its end token."""
    return [(s.answer_start - 1, len(s.input_ids) - 1) for s in samples]


def calibration_file(folder: Path, seed: int, samples: int = CALIBRATION_SAMPLES) -> Path:
    """Path of the calibration set with this seed and number of samples."""
    return folder / (f"calibration-{seed}.npz" if samples == CALIBRATION_SAMPLES else f"calibration-{seed}-{samples}.npz")


def evaluation_file(folder: Path, questions: int = QUESTIONS) -> Path:
    """Path of the evaluation set with this number of questions."""
    return folder / f"evaluation-{questions}.npz"


def make_data(model: Path, folder: Path, questions: int = QUESTIONS, samples: int = CALIBRATION_SAMPLES) -> None:
    """Writes the calibration sets of all seeds and the evaluation set, unless they exist.

    Both models of the benchmark have the same processor, so they share the files. samples: size of a calibration set; a set
    smaller than the default holds the first samples of the default set.
    """
    processor, drawn = None, max(samples, CALIBRATION_SAMPLES)
    sets = {
        calibration_file(folder, seed, samples): (lambda s=seed: calibration_items(s, drawn)[:samples]) for seed in SEEDS
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
