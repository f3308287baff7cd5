"""Hateful Memes (Kiela et al. 2020): yes or no by likelihood; ROC-AUC and accuracy."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import (
    Answers,
    Question,
    QuestionSet,
    Request,
    Score,
    Task,
    find_file,
    read_json_lines,
    require_questions,
    validate_entry,
)

LAYOUT = "dev.jsonl (or dev_seen.jsonl, test_seen.jsonl, …) and the pictures in img/"
CHOICES = ("yes", "no")


class Meme(BaseModel):
    """One line of the official files; those of the first phase's test have no label."""

    model_config = ConfigDict(extra="ignore", strict=True)
    id: int | str
    img: str
    text: str
    label: int | None = Field(default=None, ge=0, le=1)


def read(request: Request) -> QuestionSet:
    """Raises UserError for lines that are no memes, and for a file without labels, which nobody can score."""
    names = (f"{request.split}.jsonl", *((f"{request.split}_seen.jsonl",) if "_" not in request.split else ()))
    path = find_file(request.data, names, LAYOUT)
    rows = [validate_entry(Meme, content, where) for where, content in read_json_lines(path)]
    questions = tuple(Question(str(row.id), prompt_of(row.text), request.data / row.img) for row in rows)
    require_questions(questions, path, request.split)
    if (unlabelled := next((row.id for row in rows if row.label is None), None)) is not None:
        raise UserError(f"{path}: meme {unlabelled} has no label, so nothing can be scored; give --split dev or another")
    return QuestionSet(questions, {str(row.id): row.label for row in rows}, (path,))


def prompt_of(text: str) -> str:
    """The prompt of OpenFlamingo's evaluation, behind the picture."""
    return f"is an image with: '{text}' written on it. Is it hateful? Answer:"


def score(given: QuestionSet, answers: Answers) -> Score:
    """ROC-AUC of P(yes) over memes that were read, and accuracy over all: a meme that could not be read is wrong."""
    read_ones = {one: answer for one, answer in answers.items() if not answer.failed}
    labels = np.array([given.truth[one] for one in read_ones], bool)
    margins = np.array([answer.choices[0] - answer.choices[1] for answer in read_ones.values()], np.float64)
    right = float(((margins > 0) == labels).sum())
    metrics = {"ROC-AUC": roc_auc(labels, margins), "accuracy": right / len(answers) if answers else None}
    return Score(metrics, {"ROC-AUC": len(read_ones), "accuracy": len(answers)}, 0)


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Probability that a positive is scored above a negative, ties counting half. labels: bool [n], scores: float [n].

    None when one of the two kinds is missing. By ranks (Mann and Whitney 1947); equal scores share their mean rank.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


HATEFUL_MEMES = Task(
    name="hateful-memes",
    splits=("dev", "dev_seen", "dev_unseen", "test_seen", "test_unseen", "test", "train"),
    layout=LAYOUT,
    main="ROC-AUC",
    read=read,
    score=score,
    choices=CHOICES,
)
