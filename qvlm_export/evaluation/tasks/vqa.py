"""VQAv2 (Goyal et al. 2017) and VizWiz (Gurari et al. 2018): open answers, judged against those of ten people."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import (
    Answers,
    Question,
    QuestionSet,
    Request,
    Score,
    Task,
    by_group,
    find_file,
    find_folder,
    find_list,
    read_json,
    require_questions,
    validate_entry,
)
from qvlm_export.evaluation.tasks.vqa_score import normalize_answer, soft_accuracy, strip_punctuation

HUMANS = 10
SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
VQA_LAYOUT = (
    "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/COCO_val2014_<id>.jpg "
    "(test-dev: test2015)"
)
VIZWIZ_LAYOUT = "val.json (or test.json) and the pictures in val/ (or test/)"
# Questions, annotations (None where they are not public), folder of pictures.
VQA_FILES: dict[str, tuple[str, str | None, str]] = {
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
    "train": ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json", "train2014"),
    "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", None, "test2015"),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", None, "test2015"),
}


@dataclass(frozen=True)
class Truth:
    """humans: ten answers as they are compared. kind: the column of the answer's type."""

    humans: tuple[str, ...]
    kind: str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class VqaQuestion(_Strict):
    question_id: int
    image_id: int = Field(ge=0)
    question: str


class VqaAnnotation(_Strict):
    question_id: int
    image_id: int
    answer_type: str
    answers: list[dict[str, Any]]


class VizWizEntry(_Strict):
    image: str
    question: str
    answers: list[dict[str, Any]] | None = None
    answer_type: str | None = None


def read_vqav2(request: Request) -> QuestionSet:
    """The official files, beside each other or in Questions/ and Annotations/. Raises UserError where they do not match."""
    asked_name, annotated_name, pictures = VQA_FILES[request.split]
    asked_file = find_file(request.data, (asked_name, f"Questions/{asked_name}"), VQA_LAYOUT)
    folder = find_folder(request.data, (pictures, f"Images/mscoco/{pictures}", f"Images/{pictures}"), VQA_LAYOUT)
    rows = _vqa_questions(asked_file)
    questions = tuple(
        Question(
            str(row.question_id),
            row.question + (SHORT if request.form == "v1.5" else ""),
            folder / f"COCO_{pictures}_{row.image_id:012d}.jpg",
        )
        for row in rows
    )
    require_questions(questions, asked_file, request.split)
    if annotated_name is None:
        return QuestionSet(questions, {}, (asked_file,), _whole_test(request, questions))
    annotated_file = find_file(request.data, (annotated_name, f"Annotations/{annotated_name}"), VQA_LAYOUT)
    truth = _annotations(annotated_file, {row.question_id: row.image_id for row in rows}, asked_file.name)
    return QuestionSet(questions, truth, (asked_file, annotated_file))


def _vqa_questions(path: Path) -> list[VqaQuestion]:
    rows = find_list(read_json(path), "questions", path)
    return [validate_entry(VqaQuestion, row, f"{path}: question {number}") for number, row in enumerate(rows)]


def _annotations(path: Path, images: dict[int, int], asked: str) -> dict[str, Truth]:
    """Truths of exactly the questions in `images` (question -> picture). Raises UserError where the two sets differ."""
    rows = find_list(read_json(path), "annotations", path)
    truth: dict[str, Truth] = {}
    for number, content in enumerate(rows):
        row = validate_entry(VqaAnnotation, content, f"{path}: annotation {number}")
        where = f"{path}: question {row.question_id}"
        if str(row.question_id) in truth:
            raise UserError(f"{where} is annotated twice; download the file again")
        if row.image_id != images.get(row.question_id, row.image_id):
            raise UserError(f"{where} is about picture {row.image_id}, in {asked} it is not; download both files again")
        truth[str(row.question_id)] = _truth(row, where)
    if differing := set(truth) ^ set(map(str, images)):
        raise UserError(f"{path}: and {asked} differ in {len(differing)} questions, such as {min(differing)}")
    return truth


def _truth(row: VqaAnnotation, where: str) -> Truth:
    humans = _humans(row.answers, where)
    if len(set(humans)) > 1:
        humans = tuple(sys.intern(strip_punctuation(human)) for human in humans)
    return Truth(humans, sys.intern(row.answer_type))


def _humans(answers: list[dict[str, Any]], where: str) -> tuple[str, ...]:
    if len(answers) != HUMANS:
        raise UserError(f"{where}: has {len(answers)} answers, the official files have {HUMANS}; download it again")
    said = [answer.get("answer") for answer in answers]
    if not all(isinstance(one, str) for one in said):
        raise UserError(f"{where}: an answer has no text; download the file again")
    return tuple(sys.intern(str(one)) for one in said)  # interned, as the validation set has two million of few kinds


def _whole_test(request: Request, asked: tuple[Question, ...]) -> tuple[str, ...]:
    """The server takes test-dev answers in a file of all test questions; those are known where their file is there."""
    path = request.data / VQA_FILES["test"][0]
    if request.split == "test" or not path.exists():
        return ()
    known = {question.id for question in asked}
    return tuple(str(row.question_id) for row in _vqa_questions(path) if str(row.question_id) not in known)


def read_vizwiz(request: Request) -> QuestionSet:
    """One list with questions and, but for test, answers. A question's id is the name of its picture."""
    path = find_file(request.data, (f"{request.split}.json", f"Annotations/{request.split}.json"), VIZWIZ_LAYOUT)
    entries = find_list(read_json(path), None, path)
    rows = [validate_entry(VizWizEntry, row, f"{path}: entry {number}") for number, row in enumerate(entries)]
    folder = find_folder(request.data, (request.split, f"Images/{request.split}"), VIZWIZ_LAYOUT)
    suffix = UNANSWERABLE + SHORT if request.form == "v1.5" else ""
    questions = tuple(Question(row.image, row.question + suffix, folder / row.image) for row in rows)
    require_questions(questions, path, request.split)
    answered = [row for row in rows if row.answers is not None]
    if answered and len(answered) < len(rows):
        without = next(row.image for row in rows if row.answers is None)
        raise UserError(f"{path}: {without} has no answers, others have; download the file again")
    truth = {r.image: Truth(_humans(r.answers or [], f"{path}: {r.image}"), r.answer_type or "other") for r in answered}
    return QuestionSet(questions, truth, (path,))


def score(given: QuestionSet, answers: Answers) -> Score:
    """Soft accuracy, overall and by type of answer. An empty answer is unparsed, and wrong as any other."""
    values: dict[str, list[float]] = {"overall": []} | {t.kind: [] for t in sorted(given.truth.values(), key=_kind)}
    unparsed = 0
    for one, answer in answers.items():
        said = normalize_answer(answer.text)
        unparsed += not said and not answer.failed
        value = soft_accuracy(said, given.truth[one].humans) if said else 0.0
        for column in ("overall", given.truth[one].kind):
            values[column].append(value)
    return by_group(values, unparsed)


def _kind(truth: Truth) -> str:
    return truth.kind


def vqav2_submission(given: QuestionSet, answers: Answers) -> list[dict[str, Any]]:
    """[{question_id, answer}], with empty answers for the questions of test that are not in test-dev."""
    said = [{"question_id": int(q.id), "answer": normalize_answer(answers[q.id].text)} for q in given.questions]
    return [*said, *({"question_id": int(one), "answer": ""} for one in given.others)]


def vizwiz_submission(given: QuestionSet, answers: Answers) -> list[dict[str, Any]]:
    """[{image, answer}]."""
    return [{"image": q.id, "answer": normalize_answer(answers[q.id].text)} for q in given.questions]


VQAV2 = Task(
    name="vqav2",
    splits=tuple(VQA_FILES),
    layout=VQA_LAYOUT,
    main="overall",
    read=read_vqav2,
    score=score,
    max_new_tokens={"v1.5": 16, "v1.3": 64},
    submission=vqav2_submission,
)
VIZWIZ = Task(
    name="vizwiz",
    splits=("val", "train", "test"),
    layout=VIZWIZ_LAYOUT,
    main="overall",
    read=read_vizwiz,
    score=score,
    max_new_tokens={"v1.5": 16, "v1.3": 64},
    submission=vizwiz_submission,
)
