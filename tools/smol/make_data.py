"""Calibration sets and the test set of the smol LLaVA: JSONL with pictures, as a user has them, and the same as .npz.

    python -m tools.smol.make_data --model build/smol --out build/smol-data

Writes calibration-0, -1, -2 (64 samples each) and test (208), each as .jsonl, .npz and a folder of pictures. A fifth to two
fifths of each set are of one kind: questions about drawn scenes; photographs; English, to continue or to answer, with and
without a picture; and long ones, of 400 to 700 tokens of text. Calibration and test share no scene, photograph, tale or
question, the calibration sets among them no scene or passage. Captions of photographs, answers about scenes and passages of
tales are given; all other answers are what the float model itself says, by greedy decoding in float32, on one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.inputs.samples import load_processor
from tools.bench.data import save_samples
from tools.smol import sources
from tools.smol.parts import tower, wheels
from tools.smol.samples import encode_sample
from tools.tiny import scenes

SEEDS = (0, 1, 2)
ANSWER_TOKENS, BATCH = 40, 8


@dataclass(frozen=True)
class Counts:
    """Samples of each kind in a set. questions, passages: of English, to answer and to continue."""

    scenes: int
    photos: int
    questions: int
    passages: int
    long: int


CALIBRATION, TEST = Counts(24, 14, 10, 10, 6), Counts(84, 48, 30, 28, 18)


@dataclass(frozen=True)
class Item:
    """A sample before it is encoded. kind: one of scores.KINDS. answer: None until the model has given it."""

    kind: str
    prompt: str
    answer: str | None
    image: Image.Image | None


def scene_items(split: str, count: int, seed: int) -> Iterator[Item]:
    """Questions about as many scenes, cycling through the kinds of questions; seeds share no scene."""
    for number in range(count):
        kind = scenes.KINDS[number % len(scenes.KINDS)]
        scene, (question,) = scenes.questions(split, seed * count + number, kinds=(kind,))
        yield Item("scenes", question.text, question.answer, scenes.draw(scene, tower.IMAGE_SIZE))


def photo_items(split: str, count: int, seed: int, folder: Path) -> Iterator[Item]:
    """A prompt for each crop of a photograph; half of the prompts ask for a caption, which is given."""
    prompts, photos = sources.PHOTO_PROMPTS, list(sources.PHOTOS[split])
    for number, crop in enumerate(sources.photo_crops(split, count, seed, folder)):
        turn = number // len(photos)  # each photograph gets another prompt in each turn
        place = (number + turn) % len(prompts)
        captions = sources.PHOTOS[split][photos[number % len(photos)]]
        given = captions[(turn + seed) % len(captions)] if place < sources.CAPTION_PROMPTS else None
        yield Item("photos", prompts[place], given, crop)


def question_items(split: str, count: int, seed: int) -> Iterator[Item]:
    """Questions in English, different ones for each seed."""
    asked = sources.QUESTIONS[split][seed * count : (seed + 1) * count]
    return (Item("english", text, None, None) for text in asked)


def passage_sizes(counts: Counts, sets: int, split: str) -> list[tuple[int, int]]:
    """Words of beginning and rest of the passages of all sets: of each set first the long ones, then the short ones."""
    rng = random.Random(f"passages/{split}")
    sizes = []
    for _ in range(sets):
        sizes += [(rng.randint(290, 420), rng.randint(30, 60)) for _ in range(counts.long)]
        sizes += [(rng.randint(30, 60), rng.randint(30, 60)) for _ in range(counts.passages)]
    return sizes


def passage_items(passages: Sequence[sources.Passage], counts: Counts) -> Iterator[Item]:
    """Passages to continue; to every third long one a question, which the model answers."""
    for number, passage in enumerate(passages):
        if number >= counts.long:
            yield Item("english", f"Continue this story.\n{passage.beginning}", passage.rest, None)
        elif number % 3 == 2:
            yield Item("long", f"{passage.beginning}\nWhat happens in this part of the story?", None, None)
        else:
            prompt = f'This is a part of the story "{passage.title}". Continue it.\n{passage.beginning}'
            yield Item("long", prompt, passage.rest, None)


def add_pictures(items: Sequence[Item], split: str, seed: int, folder: Path) -> list[Item]:
    """Gives three of four texts a picture, a scene or a photograph, that has nothing to do with the text."""
    crops = iter(sources.photo_crops(split, len(items), 100 + seed, folder))
    pictured: list[Item] = []
    for number, item in enumerate(items):
        if item.image is None and number % 4:
            scene = scenes.make_scene(split, 10**5 + seed * 1000 + number)
            image = scenes.draw(scene, tower.IMAGE_SIZE) if number % 4 == 1 else next(crops)
            pictured.append(replace(item, image=image))
        else:
            pictured.append(item)
    return pictured


def make_items(split: str, counts: Counts, folder: Path, seeds: Sequence[int] = (0,)) -> list[list[Item]]:
    """The items of one set for each seed, without the answers that the model gives."""
    passages = sources.cut_passages(sources.read_tales(split, folder), passage_sizes(counts, len(seeds), split))
    sets, size = [], counts.long + counts.passages
    for place, seed in enumerate(seeds):
        own = passages[place * size : (place + 1) * size]
        items = [*scene_items(split, counts.scenes, seed), *photo_items(split, counts.photos, seed, folder)]
        texts = [*question_items(split, counts.questions, seed), *passage_items(own, counts)]
        sets.append([*items, *add_pictures(texts, split, seed, folder)])
    return sets


@torch.inference_mode()
def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, items: Sequence[Item]) -> list[Item]:
    """The items; where one has no answer, with what the model says, up to its last full sentence if there is one."""
    answered = list(items)
    open_numbers = sorted(
        (number for number, item in enumerate(items) if item.answer is None),
        key=lambda number: (items[number].image is None, len(items[number].prompt)),
    )
    for pictured in (True, False):
        numbers = [number for number in open_numbers if (items[number].image is not None) == pictured]
        for start in range(0, len(numbers), BATCH):
            part = numbers[start : start + BATCH]
            texts = [
                chat_text(processor, [{"role": "user", "text": items[n].prompt, "images": int(pictured)}]) for n in part
            ]
            images = [items[n].image for n in part] if pictured else None
            inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            for number, row in zip(part, out[:, inputs["input_ids"].shape[1] :], strict=True):
                text = processor.tokenizer.decode(row, skip_special_tokens=True)
                answered[number] = replace(items[number], answer=whole_sentences(text))
    return answered


def whole_sentences(text: str) -> str:
    """The text up to its last full sentence, or up to where it repeats one; the whole text if it has no full sentence."""
    text, end, seen = text.strip(), 0, set()
    for match in re.finditer(r"\S.*?[.!?](?=\s|$)", text, re.DOTALL):
        if match[0] in seen:
            break
        seen.add(match[0])
        end = match.end()
    return text[:end] if end else text


def write_set(out: Path, name: str, items: Sequence[Item]) -> None:
    """Writes OUT/NAME.jsonl with its pictures in OUT/NAME."""
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir(parents=True)
    lines = []
    for number, item in enumerate(items):
        line = {"kind": item.kind, "prompt": item.prompt, "answer": item.answer}
        if item.image is not None:
            line["image"] = f"{name}/{number:03d}.png"
            item.image.save(out / line["image"], optimize=True)
        lines.append(json.dumps(line) + "\n")
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_data(model_folder: Path, out: Path, wheels_folder: Path) -> None:
    """Writes all sets into `out`."""
    model = LlavaForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = load_processor(model_folder)
    sets = {
        f"calibration-{s}": i for s, i in zip(SEEDS, make_items("calib", CALIBRATION, wheels_folder, SEEDS), strict=True)
    }
    sets["test"] = make_items("test", TEST, wheels_folder)[0]
    (out / "float.npy").unlink(missing_ok=True)  # tools/smol/scores.py makes it for the samples that were here before
    for name, items in sets.items():
        answered = answer(model, processor, items)
        write_set(out, name, answered)
        samples = [encode_sample(processor, item.prompt, str(item.answer), item.image) for item in answered]
        save_samples(out / f"{name}.npz", samples)
        print(f"{name}: {len(samples)} samples, {sum(len(s.input_ids) for s in samples)} tokens with pictures", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make_data(arguments.model, arguments.out, arguments.wheels)
