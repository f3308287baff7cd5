"""Hateful Memes: official files, ROC-AUC against a count over all pairs, accuracy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.memes import HATEFUL_MEMES, read, roc_auc, score
from qvlm_export.evaluation.tasks.task import Answer, Request


def write(folder, lines, name="dev.jsonl"):
    """Writes a file of memes; returns the request that reads it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return Request(folder, name.removesuffix(".jsonl"))


MEMES = [{"id": n, "img": f"img/{n:05d}.png", "label": n % 2, "text": f"text {n}"} for n in range(4)]


def test_official_files_are_read(tmp_path):
    question_set = read(write(tmp_path, MEMES))
    assert [q.id for q in question_set.questions] == ["0", "1", "2", "3"]
    assert question_set.questions[1].image == tmp_path / "img" / "00001.png"
    assert question_set.questions[1].prompt == "is an image with: 'text 1' written on it. Is it hateful? Answer:"
    assert question_set.truth == {"0": 0, "1": 1, "2": 0, "3": 1}


def test_dev_is_read_from_dev_seen_if_that_is_there(tmp_path):
    write(tmp_path, MEMES, "dev_seen.jsonl")
    assert len(read(Request(tmp_path, "dev")).questions) == 4


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([*MEMES, MEMES[0]], ["question 0 stands twice"]),
        ([{**MEMES[0], "label": 2}], ["dev.jsonl:1", "label"]),
        ([{"id": 1, "img": "a.png"}], ["dev.jsonl:1", "text"]),
        ([], ["dev", "holds no question"]),
        ([{k: v for k, v in MEMES[0].items() if k != "label"}], ["meme 0 has no label", "--split dev"]),
    ],
)
def test_wrong_lines_are_refused(tmp_path, lines, words):
    with pytest.raises(UserError) as caught:
        read(write(tmp_path, lines))
    assert all(word in str(caught.value) for word in words), caught.value


def reference_auc(labels, scores):
    """The share of pairs of a positive and a negative in which the positive has the higher score."""
    pairs = [
        (p, n) for p, lp in zip(scores, labels, strict=True) if lp for n, ln in zip(scores, labels, strict=True) if not ln
    ]
    if not pairs:
        return None
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@given(st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=1, max_size=40))
def test_roc_auc_equals_the_share_of_ordered_pairs(rows):
    labels, scores = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], float)
    expected = reference_auc(labels, scores)
    auc = roc_auc(labels, scores)
    assert auc == expected if expected is None else auc == pytest.approx(expected)


def test_roc_auc_of_known_values():
    assert roc_auc(np.array([0, 0, 1, 1], bool), np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert roc_auc(np.array([1, 1], bool), np.array([0.1, 0.4])) is None


def test_auc_is_over_readable_memes_and_accuracy_over_all(tmp_path):
    question_set = read(write(tmp_path, MEMES))
    answers = {
        "0": Answer(choices=(math.log(0.2), math.log(0.4))),
        "1": Answer(choices=(math.log(0.6), math.log(0.1))),
        "2": Answer(choices=(math.log(0.5), math.log(0.1))),  # wrong
        "3": Answer(failed="unreadable"),  # wrong, and without a score
    }
    result = score(question_set, answers)
    assert result.metrics == {"ROC-AUC": 1.0, "accuracy": 0.5}
    assert result.counts == {"ROC-AUC": 3, "accuracy": 4}
    assert HATEFUL_MEMES.choices == ("yes", "no")
