"""Writes small evaluation sets of the tiny model's scenes, in the official file layout of each task of qvlm-eval.

    python -m tools.tiny.make_eval_sets --out build/tiny-eval
    qvlm-eval tiny --task scienceqa --data build/tiny-eval/scienceqa --form v1.3

All scenes are of the test split, which is used in neither training nor calibration. ScienceQA also gets a train split of
calibration scenes, for tools/study/reproduce_paper.py. The questions are of the kinds that the model was trained on, in the
same words: lettered options for ScienceQA, short questions for VQAv2. Unlike in the official sets, only one ScienceQA
question in 50 has no image, because the model knows nothing but scenes, and the label of a meme says whether the object that
its text names is in the image.
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
WITHOUT_IMAGE = 50  # one question in so many has no image
UNREADABLE_SCENE = 10  # one VizWiz image in so many is blurred beyond recognition
VQA_KINDS = ("color", "shape", "position", "count", "yesno")
ANSWER_TYPES = {"count": "number", "yesno": "yes/no"}
CHOICE = re.compile(r"(?P<question>.*)\nContext: (?P<hint>.*)\nOptions: (?P<options>.*)")
SUBJECTS = ("natural science", "social science", "language science")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save(image: Image.Image, path: Path) -> None:
    """Saves the image as PNG, or as JPEG of quality 95; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def make_scienceqa(folder: Path, count: int) -> None:
    """Writes problems.json, pid_splits.json and images/<split>/<id>/image.png; `count` questions in the test split."""
    problems: dict[str, Any] = {}
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for split, source, number in (("train", "calib", TRAIN), ("test", "test", count)):
        for index in range(number):
            problem_id = str(len(problems) + 1)
            scene, (question,) = scenes.questions(source, index, kinds=("choice",))
            problems[problem_id] = problem_of(question, index, split)
            splits[split].append(problem_id)
            if problems[problem_id]["image"]:
                save(scenes.draw(scene), folder / "images" / split / problem_id / "image.png")
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits)


def problem_of(question: scenes.Question, index: int, split: str) -> dict[str, Any]:
    """A multiple-choice question with the fields of a ScienceQA problem.

    Subjects and grades take turns, so that every column of the results has questions.
    """
    match = CHOICE.fullmatch(question.text)
    assert match is not None
    choices = re.split(r" ?\([A-D]\) ", match["options"])[1:]
    has_image = split == "train" or index % WITHOUT_IMAGE != WITHOUT_IMAGE - 1
    return {
        "question": match["question"],
        "choices": choices,
        "answer": "ABCD".index(question.answer[-2]),
        "hint": match["hint"] if has_image and match["hint"] != "N/A" else "",
        "image": "image.png" if has_image else None,
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


def human_answers(right: str, wrong: list[str], random_: random.Random) -> list[dict[str, Any]]:
    """Ten human answers in VQA's format, of which one to three are wrong."""
    answers = [right] * 10
    for place in random_.sample(range(10), random_.randrange(1, 4)):
        answers[place] = random_.choice(wrong)
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": place + 1} for place, answer in enumerate(answers)]


def make_vqav2(folder: Path, count: int) -> None:
    """Writes questions and annotations of val, and questions without annotations of test-dev and test, with images."""
    random_ = random.Random(2)
    questions, annotations = [], []
    for index in range(count):
        kind = VQA_KINDS[index % len(VQA_KINDS)]
        scene, (question,) = scenes.questions("test", index, seed=1, kinds=(kind,))
        ids = {"image_id": index + 1, "question_id": 1000 * (index + 1) + 1}
        save(scenes.draw(scene), folder / "val2014" / f"COCO_val2014_{index + 1:012d}.jpg")
        questions.append({**ids, "question": question.text})
        annotations.append(
            {
                **ids,
                "question_type": kind,
                "answer_type": ANSWER_TYPES.get(kind, "other"),
                "multiple_choice_answer": question.answer,
                "answers": human_answers(question.answer, ["something", "not sure", f"{question.answer} thing"], random_),
            }
        )
        if index < count // 10:
            save(scenes.draw(scene), folder / "test2015" / f"COCO_test2015_{index + 1:012d}.jpg")
    test_questions = questions[: count // 10]
    for name, subset in (
        ("val2014", questions),
        ("test2015", test_questions),
        ("test-dev2015", test_questions[: len(test_questions) // 2]),
    ):
        write_json(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {"data_type": "mscoco", "questions": subset})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"data_type": "mscoco", "annotations": annotations})


def make_vizwiz(folder: Path, count: int) -> None:
    """Writes val.json with answers and test.json without, with images.

    One image in UNREADABLE_SCENE is blurred so much that its question cannot be answered.
    """
    random_ = random.Random(3)
    entries = []
    for index in range(count):
        kind = VQA_KINDS[index % len(VQA_KINDS)]
        scene, (question,) = scenes.questions("test", index, seed=2, kinds=(kind,))
        blurred = index % UNREADABLE_SCENE == UNREADABLE_SCENE - 1
        image = scenes.draw(scene).filter(ImageFilter.GaussianBlur(200)) if blurred else scenes.draw(scene)
        name = f"VizWiz_val_{index:08d}.jpg"
        save(image, folder / "val" / name)
        right = "unanswerable" if blurred else question.answer
        entries.append(
            {
                "image": name,
                "question": question.text,
                "answers": human_answers(right, ["something", "unsuitable"], random_),
                "answer_type": "unanswerable" if blurred else ANSWER_TYPES.get(kind, "other"),
                "answerable": int(not blurred),
            }
        )
        if index < count // 10:
            save(image, folder / "test" / name.replace("val", "test"))
    write_json(folder / "val.json", entries)
    test_entries = [{"image": e["image"].replace("val", "test"), "question": e["question"]} for e in entries[: count // 10]]
    write_json(folder / "test.json", test_entries)


def make_memes(folder: Path, count: int) -> None:
    """Writes dev.jsonl with images; a meme is labelled 1 if the object that its text names is in the image."""
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
    """Names of all objects, such as "red circle", that are not in `names`."""
    return {f"{color} {shape}" for color in scenes.COLORS for shape in scenes.SHAPES} - names


MAKERS = {"scienceqa": make_scienceqa, "vqav2": make_vqav2, "vizwiz": make_vizwiz, "hateful-memes": make_memes}


def make_all(out: Path, count: int) -> None:
    """Writes the sets of all tasks, each into a folder with the name of the task."""
    for name, make in MAKERS.items():
        make(out / name, count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tiny-eval"))
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="in each set")
    arguments = parser.parse_args()
    make_all(arguments.out, arguments.questions)
