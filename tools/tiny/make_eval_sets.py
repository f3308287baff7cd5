"""Writes a small set in the official layout of every task of qvlm-eval, with the tiny model's scenes.

    python -m tools.tiny.make_eval_sets --out build/tiny-eval
    qvlm-eval tiny --task scienceqa --data build/tiny-eval/scienceqa --form v1.3

All scenes are of the test split, which neither training nor calibration saw; ScienceQA has a train split too, of calibration
scenes, for tools/study/reproduce_paper.py. What is asked is what the model was trained on, in the words of its training:
lettered
options as ScienceQA's, short questions as VQAv2's. Unlike the official sets: of ScienceQA only one question in 50 has no
picture, as the model knows nothing but scenes, and a meme's label says whether the object that its text names is there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from tools.tiny import scenes

QUESTIONS = 400
TRAIN = 64
WITHOUT_PICTURE = 50  # one question in so many
UNREADABLE_SCENE = 10  # one VizWiz picture in so many shows nothing
VQA_KINDS = ("color", "shape", "position", "count", "yesno")
ANSWER_TYPES = {"count": "number", "yesno": "yes/no"}
CHOICE = re.compile(r"(?P<question>.*)\nContext: (?P<hint>.*)\nOptions: (?P<options>.*)")
SUBJECTS = ("natural science", "social science", "language science")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def make_scienceqa(folder: Path, count: int) -> None:
    """problems.json, pid_splits.json, images/<split>/<id>/image.png."""
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for split, source, number in (("train", "calib", TRAIN), ("test", "test", count)):
        for index in range(number):
            one = str(len(problems) + 1)
            scene, (asked,) = scenes.questions(source, index, kinds=("choice",))
            problems[one] = problem_of(asked, index, split)
            splits[split].append(one)
            if problems[one]["image"]:
                save(scenes.draw(scene), folder / "images" / split / one / "image.png")
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)


def problem_of(asked: scenes.Question, index: int, split: str) -> dict[str, Any]:
    """ScienceQA's fields; subjects and grades go in turn, so that every column of the table has questions."""
    found = CHOICE.fullmatch(asked.text)
    assert found is not None
    choices = re.split(r" ?\([A-D]\) ", found["options"])[1:]
    pictured = split == "train" or index % WITHOUT_PICTURE != WITHOUT_PICTURE - 1
    return {
        "question": found["question"],
        "choices": choices,
        "answer": "ABCD".index(asked.answer[-2]),
        "hint": found["hint"] if pictured and found["hint"] != "N/A" else "",
        "image": "image.png" if pictured else None,
        "task": "closed choice",
        "grade": f"grade{index % 12 + 1}",
        "subject": SUBJECTS[index % 3],
        "topic": "scenes",
        "category": "scenes",
        "skill": "see",
        "lecture": "",
        "solution": "",
        "split": split,
    }


def humans(right: str, wrong: list[str], random_: random.Random) -> list[dict[str, Any]]:
    """Ten answers, of which one to three differ from the right one."""
    said = [right] * 10
    for place in random_.sample(range(10), random_.randrange(1, 4)):
        said[place] = random_.choice(wrong)
    return [{"answer": one, "answer_confidence": "yes", "answer_id": place + 1} for place, one in enumerate(said)]


def make_vqav2(folder: Path, count: int) -> None:
    """Questions and annotations of val, and questions of test-dev and test, all about the same kind of pictures."""
    random_ = random.Random(2)
    asked, annotated = [], []
    for index in range(count):
        kind = VQA_KINDS[index % len(VQA_KINDS)]
        scene, (question,) = scenes.questions("test", index, seed=1, kinds=(kind,))
        ids = {"image_id": index + 1, "question_id": 1000 * (index + 1) + 1}
        save(scenes.draw(scene), folder / "val2014" / f"COCO_val2014_{index + 1:012d}.jpg")
        asked.append({**ids, "question": question.text})
        annotated.append(
            {
                **ids,
                "question_type": kind,
                "answer_type": ANSWER_TYPES.get(kind, "other"),
                "multiple_choice_answer": question.answer,
                "answers": humans(question.answer, ["something", "not sure", f"{question.answer} thing"], random_),
            }
        )
        if index < count // 10:
            save(scenes.draw(scene), folder / "test2015" / f"COCO_test2015_{index + 1:012d}.jpg")
    few = asked[: count // 10]
    for name, questions in (("val2014", asked), ("test2015", few), ("test-dev2015", few[: len(few) // 2])):
        write_json(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {"data_type": "mscoco", "questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"data_type": "mscoco", "annotations": annotated})


def make_vizwiz(folder: Path, count: int) -> None:
    """val.json with answers, test.json without; one picture in UNREADABLE_SCENE is a blur that nobody can answer about."""
    random_ = random.Random(3)
    entries = []
    for index in range(count):
        kind = VQA_KINDS[index % len(VQA_KINDS)]
        scene, (question,) = scenes.questions("test", index, seed=2, kinds=(kind,))
        blurred = index % UNREADABLE_SCENE == UNREADABLE_SCENE - 1
        picture = scenes.draw(scene).filter(ImageFilter.GaussianBlur(200)) if blurred else scenes.draw(scene)
        name = f"VizWiz_val_{index:08d}.jpg"
        save(picture, folder / "val" / name)
        right = "unanswerable" if blurred else question.answer
        entries.append(
            {
                "image": name,
                "question": question.text,
                "answers": humans(right, ["something", "unsuitable"], random_),
                "answer_type": "unanswerable" if blurred else ANSWER_TYPES.get(kind, "other"),
                "answerable": int(not blurred),
            }
        )
        if index < count // 10:
            save(picture, folder / "test" / name.replace("val", "test"))
    write_json(folder / "val.json", entries)
    few = [{"image": e["image"].replace("val", "test"), "question": e["question"]} for e in entries[: count // 10]]
    write_json(folder / "test.json", few)


def make_memes(folder: Path, count: int) -> None:
    """dev.jsonl: a meme is labelled 1 when the object that its text names is in the picture."""
    lines = []
    for index in range(count):
        scene = scenes.make_scene("test", index, seed=3)
        number = f"{index + 10000:05d}"
        names = {thing.name for thing in scene.things}
        text = random.Random(index).choice(sorted(names if index % 2 else absent(names)))
        save(scenes.draw(scene), folder / "img" / f"{number}.png")
        lines.append({"id": int(number), "img": f"img/{number}.png", "label": index % 2, "text": text})
    (folder / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def absent(names: set[str]) -> set[str]:
    return {f"{color} {shape}" for color in scenes.COLORS for shape in scenes.SHAPES} - names


MAKERS = {"scienceqa": make_scienceqa, "vqav2": make_vqav2, "vizwiz": make_vizwiz, "hateful-memes": make_memes}


def make_all(out: Path, count: int) -> None:
    """All four sets, each in a folder of its task's name."""
    for name, make in MAKERS.items():
        make(out / name, count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tiny-eval"))
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of every set")
    arguments = parser.parse_args()
    make_all(arguments.out, arguments.questions)
