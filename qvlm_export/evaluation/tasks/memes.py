"""Hateful Memes (Kiela et al. 2020): yes or no by log-likelihood, scored by ROC-AUC and accuracy.

Reads the official files, words the prompts as in OpenFlamingo's evaluation, and scores log-likelihoods of "yes" and "no".
"""

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
    """A line of the official files; the test split of the first phase has no labels."""

    model_config = ConfigDict(extra="ignore", strict=True)
    id: int | str
    img: str
    text: str
    label: int | None = Field(default=None, ge=0, le=1)


def read(request: Request) -> QuestionSet:
    """Reads the memes of a split; their truth is the label, 1 for hateful and 0 for not.

    Raises UserError for lines that are no memes, and for memes without labels, which cannot be scored.
    """
    names = (f"{request.split}.jsonl", *((f"{request.split}_seen.jsonl",) if "_" not in request.split else ()))
    path = find_file(request.data, names, LAYOUT)
    rows = [validate_entry(Meme, content, where) for where, content in read_json_lines(path)]
    questions = tuple(Question(str(row.id), make_prompt(row.text), request.data / row.img) for row in rows)
    require_questions(questions, path, request.split)
    if (unlabelled := next((row.id for row in rows if row.label is None), None)) is not None:
        raise UserError(f"{path}: meme {unlabelled} has no label, so nothing can be scored; give --split dev or another")
    return QuestionSet(questions, {str(row.id): row.label for row in rows}, (path,))


def make_prompt(text: str) -> str:
    """Returns the prompt of OpenFlamingo's evaluation, which stands behind the image. text: the text on the image."""
    return f"is an image with: '{text}' written on it. Is it hateful? Answer:"


def score(question_set: QuestionSet, answers: Answers) -> Score:
    """Scores answers by ROC-AUC and accuracy.

    Memes are ranked by log P(yes) - log P(no). ROC-AUC is over the memes that could be read; accuracy is over all of them,
    and a meme that could not be read counts as wrong.
    """
    readable = {question_id: answer for question_id, answer in answers.items() if not answer.failed}
    labels = np.array([question_set.truth[question_id] for question_id in readable], bool)
    margins = np.array([answer.choices[0] - answer.choices[1] for answer in readable.values()], np.float64)
    correct = float(((margins > 0) == labels).sum())
    metrics = {"ROC-AUC": roc_auc(labels, margins), "accuracy": correct / len(answers) if answers else None}
    return Score(metrics, {"ROC-AUC": len(readable), "accuracy": len(answers)}, 0)


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Returns the probability that a positive has a higher score than a negative, where ties count half.

    labels: bool [n]. scores: float [n]. None when there are no positives or no negatives. Computed from ranks (Mann and
    Whitney 1947); equal scores share their mean rank.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    ranks = (last_ranks - (counts - 1) / 2)[inverse]
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
