"""Exact match of the smol LLaVA on scenes that neither training nor calibration saw, by kind of question.

    python -m tools.smol.answers --model build/smol

An answer is right if it equals the expected one to the letter. It is scored by teacher forcing, which is equivalent to
greedy decoding: that gives the expected answer exactly if each of its tokens has the largest logit after those before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from qvlm_export.inputs.samples import load_processor
from tools.bench.data import answer_spans
from tools.smol.parts import tower
from tools.smol.samples import encode_sample
from tools.smol.scores import hidden_states, load_head
from tools.tiny import scenes
from tools.tiny.accuracy import Item, rates


def unseen_items(count: int) -> list[Item]:
    """`count` questions about as many scenes of the split "val", cycling through the kinds."""
    items = []
    for index in range(count):
        scene, (question,) = scenes.questions("val", index, kinds=(scenes.KINDS[index % len(scenes.KINDS)],))
        items.append(Item(question.kind, scenes.draw(scene, tower.IMAGE_SIZE), question.text, question.answer))
    return items


def right_answers(model_folder: Path, items: list[Item]) -> list[bool]:
    """Whether transformers' model, in float32, answers each item correctly."""
    processor = load_processor(model_folder)
    samples = [encode_sample(processor, item.prompt, item.answer, item.image) for item in items]
    hidden, head = hidden_states(model_folder, samples), load_head(model_folder)
    starts = np.cumsum([0, *(len(sample.input_ids) for sample in samples)])
    right = []
    for sample, start, (first, last) in zip(samples, starts, answer_spans(samples), strict=False):
        predicted = (hidden[start + first : start + last] @ head.T).argmax(axis=-1)
        right.append(bool((predicted == sample.input_ids[first + 1 : last + 1]).all()))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1400, help="questions, an equal number of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    items = unseen_items(args.count)
    for name, rate in rates(items, right_answers(args.model, items)).items():
        print(f"{name:10} {100 * rate:.1f} %")


if __name__ == "__main__":
    main()
