"""VQAv2 (Goyal et al. 2017) and VizWiz (Gurari et al. 2018): open-ended answers, scored by VQA soft accuracy.

Reads the official files, compares generated answers with those of ten people (`vqa_score.py`), and makes the submissions to
the official servers.
"""

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
    average_columns,
    find_file,
    find_folder,
    find_list,
    read_json,
    require_questions,
    validate_entry,
)
from qvlm_export.evaluation.tasks.vqa_score import normalize_answer, soft_accuracy, strip_punctuation

HUMAN_ANSWERS = 10
ASK_FOR_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
ALLOW_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
VQA_LAYOUT = (
    "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/COCO_val2014_<id>.jpg "
    "(test-dev: test2015)"
)
VIZWIZ_LAYOUT = "val.json (or test.json) and the pictures in val/ (or test/)"
# By split: file of questions, file of annotations (None if they are not public), folder of images.
VQA_FILES: dict[str, tuple[str, str | None, str]] = {
    "val": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
    "train": ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json", "train2014"),
    "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", None, "test2015"),
    "test": ("v2_OpenEnded_mscoco_test2015_questions.json", None, "test2015"),
}


@dataclass(frozen=True)
class Truth:
    """What people answered. answers: ten texts, processed for comparison. answer_type: the column of the table."""

    answers: tuple[str, ...]
    answer_type: str


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class VqaQuestion(_Entry):
    """An entry of a VQAv2 file of questions."""

    question_id: int
    image_id: int = Field(ge=0)
    question: str


class VqaAnnotation(_Entry):
    """An entry of a VQAv2 file of annotations."""

    question_id: int
    image_id: int
    answer_type: str
    answers: list[dict[str, Any]]


class VizWizEntry(_Entry):
    """An entry of a VizWiz file; the test split has no answers."""

    image: str
    question: str
    answers: list[dict[str, Any]] | None = None
    answer_type: str | None = None


def read_vqav2(request: Request) -> QuestionSet:
    """Reads a split of VQAv2 from the official files, beside each other or in the folders Questions, Annotations and Images.

    Raises UserError when files are missing or wrong, or when questions and annotations do not match.
    """
    questions_name, annotations_name, images = VQA_FILES[request.split]
    questions_file = find_file(request.data, (questions_name, f"Questions/{questions_name}"), VQA_LAYOUT)
    folder = find_folder(request.data, (images, f"Images/mscoco/{images}", f"Images/{images}"), VQA_LAYOUT)
    rows = _read_questions(questions_file)
    questions = tuple(
        Question(
            str(row.question_id),
            row.question + (ASK_FOR_SHORT_ANSWER if request.form == "v1.5" else ""),
            folder / f"COCO_{images}_{row.image_id:012d}.jpg",
        )
        for row in rows
    )
    require_questions(questions, questions_file, request.split)
    if annotations_name is None:
        return QuestionSet(questions, {}, (questions_file,), _find_unasked_ids(request, questions))
    annotations_file = find_file(request.data, (annotations_name, f"Annotations/{annotations_name}"), VQA_LAYOUT)
    truth = _read_annotations(annotations_file, {row.question_id: row.image_id for row in rows}, questions_file.name)
    return QuestionSet(questions, truth, (questions_file, annotations_file))


def _read_questions(path: Path) -> list[VqaQuestion]:
    rows = find_list(read_json(path), "questions", path)
    return [validate_entry(VqaQuestion, row, f"{path}: question {number}") for number, row in enumerate(rows)]


def _read_annotations(path: Path, image_ids: dict[int, int], questions_name: str) -> dict[str, Truth]:
    """Reads people's answers, by question id.

    image_ids: the image id of every question; the annotations must be of exactly these questions and images.
    questions_name: the file of questions, for error messages. Raises UserError when the two files differ.
    """
    rows = find_list(read_json(path), "annotations", path)
    truth: dict[str, Truth] = {}
    for number, content in enumerate(rows):
        row = validate_entry(VqaAnnotation, content, f"{path}: annotation {number}")
        where = f"{path}: question {row.question_id}"
        if str(row.question_id) in truth:
            raise UserError(f"{where} is annotated twice; download the file again")
        if row.image_id != image_ids.get(row.question_id, row.image_id):
            raise UserError(
                f"{where} is about picture {row.image_id}, in {questions_name} it is not; download both files again"
            )
        truth[str(row.question_id)] = _make_truth(row, where)
    if differing := set(truth) ^ set(map(str, image_ids)):
        raise UserError(f"{path}: and {questions_name} differ in {len(differing)} questions, such as {min(differing)}")
    return truth


def _make_truth(row: VqaAnnotation, where: str) -> Truth:
    """Processes the punctuation of people's answers where they differ, as the official VQA toolkit does."""
    answers = _extract_answers(row.answers, where)
    if len(set(answers)) > 1:
        answers = tuple(sys.intern(strip_punctuation(answer)) for answer in answers)
    return Truth(answers, sys.intern(row.answer_type))


def _extract_answers(answers: list[dict[str, Any]], where: str) -> tuple[str, ...]:
    """Returns the texts of ten answers, interned: the validation set has two million of them, of which few differ."""
    if len(answers) != HUMAN_ANSWERS:
        raise UserError(f"{where}: has {len(answers)} answers, the official files have {HUMAN_ANSWERS}; download it again")
    texts = [answer.get("answer") for answer in answers]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: an answer has no text; download the file again")
    return tuple(sys.intern(str(text)) for text in texts)


def _find_unasked_ids(request: Request, questions: tuple[Question, ...]) -> tuple[str, ...]:
    """Returns the ids of the test questions that are not in test-dev, if the file of test questions is there.

    The server takes the answers to test-dev in a file with all test questions.
    """
    path = request.data / VQA_FILES["test"][0]
    if request.split == "test" or not path.exists():
        return ()
    asked_ids = {question.id for question in questions}
    return tuple(str(row.question_id) for row in _read_questions(path) if str(row.question_id) not in asked_ids)


def read_vizwiz(request: Request) -> QuestionSet:
    """Reads a split of VizWiz: a list of questions with their answers, which the test split lacks.

    The id of a question is the name of its image. Raises UserError when files are missing or wrong.
    """
    path = find_file(request.data, (f"{request.split}.json", f"Annotations/{request.split}.json"), VIZWIZ_LAYOUT)
    entries = find_list(read_json(path), None, path)
    rows = [validate_entry(VizWizEntry, row, f"{path}: entry {number}") for number, row in enumerate(entries)]
    folder = find_folder(request.data, (request.split, f"Images/{request.split}"), VIZWIZ_LAYOUT)
    suffix = ALLOW_UNANSWERABLE + ASK_FOR_SHORT_ANSWER if request.form == "v1.5" else ""
    questions = tuple(Question(row.image, row.question + suffix, folder / row.image) for row in rows)
    require_questions(questions, path, request.split)
    answered = [row for row in rows if row.answers is not None]
    if answered and len(answered) < len(rows):
        unanswered = next(row.image for row in rows if row.answers is None)
        raise UserError(f"{path}: {unanswered} has no answers, others have; download the file again")
    truth = {
        row.image: Truth(_extract_answers(row.answers or [], f"{path}: {row.image}"), row.answer_type or "other")
        for row in answered
    }
    return QuestionSet(questions, truth, (path,))


def score(question_set: QuestionSet, answers: Answers) -> Score:
    """Scores answers by soft accuracy, overall and by type of answer; an empty answer is unparsed and counts as wrong."""
    truths = sorted(question_set.truth.values(), key=_answer_type)
    values: dict[str, list[float]] = {"overall": []} | {truth.answer_type: [] for truth in truths}
    unparsed = 0
    for question_id, answer in answers.items():
        truth = question_set.truth[question_id]
        normalized = normalize_answer(answer.text)
        unparsed += not normalized and not answer.failed
        value = soft_accuracy(normalized, truth.answers) if normalized else 0.0
        for column in ("overall", truth.answer_type):
            values[column].append(value)
    return average_columns(values, unparsed)


def _answer_type(truth: Truth) -> str:
    return truth.answer_type


def vqav2_submission(question_set: QuestionSet, answers: Answers) -> list[dict[str, Any]]:
    """Returns [{question_id, answer}], with empty answers for the questions of test that are not in test-dev."""
    rows = [{"question_id": int(q.id), "answer": normalize_answer(answers[q.id].text)} for q in question_set.questions]
    return [*rows, *({"question_id": int(question_id), "answer": ""} for question_id in question_set.unasked_ids)]


def vizwiz_submission(question_set: QuestionSet, answers: Answers) -> list[dict[str, Any]]:
    """Returns [{image, answer}], where image is the file name."""
    return [{"image": q.id, "answer": normalize_answer(answers[q.id].text)} for q in question_set.questions]


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
