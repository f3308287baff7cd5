"""Scores of hidden states: positions, KL divergence, agreement, perplexity and standard error, against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qvlm_export.calibrate.checkpoint.samples import Sample
from tools.smol import scores

IMAGE = 9
NONE = np.zeros((0, 3, 1, 1), np.float32)


def test_places_begin_behind_the_picture_or_at_the_text_of_the_user():
    with_picture = Sample(np.array([1, IMAGE, IMAGE, 3, 4, 5]), np.zeros((1, 3, 2, 2), np.float32), 5)
    without = Sample(np.array([1, 2, 3, 4]), NONE, 3)
    places = scores.find_places([with_picture, without], IMAGE, text_start=2)
    assert places.rows.tolist() == [2, 3, 4, 8]
    assert places.targets.tolist() == [3, 4, 5, 4]
    assert places.samples.tolist() == [0, 0, 0, 1]
    assert places.answers.tolist() == [False, False, True, True]


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def test_scores_equal_those_of_a_slow_loop(monkeypatch):
    monkeypatch.setattr(scores, "ROWS_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    head = rng.standard_normal((11, 4)).astype(np.float32)
    samples = [Sample(rng.integers(0, 8, length), NONE, 3) for length in (6, 4, 8)]
    reference = rng.standard_normal((18, 4)).astype(np.float32)
    hidden = (reference + 0.5 * rng.standard_normal((18, 4))).astype(np.float32)
    places = scores.find_places(samples, IMAGE, text_start=2)
    table = scores.score(head, reference, hidden, places, ["long", "scenes", "long"])

    start, rows = 0, []
    for number, sample in enumerate(samples):
        for place in range(2, len(sample.input_ids) - 1):
            p, q = softmax(head @ reference[start + place]), softmax(head @ hidden[start + place])
            kl, target = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), sample.input_ids[place + 1]
            agreed = int(np.argmax(p) == np.argmax(q))
            rows.append((number, place + 1 >= 3, kl, agreed, -math.log(p[target]), -math.log(q[target])))
        start += len(sample.input_ids)
    for kind, numbers in (("all", (0, 1, 2)), ("long", (0, 2)), ("scenes", (1,))):
        for of in ("text", "answer"):
            chosen = [row for row in rows if row[0] in numbers and (of == "text" or row[1])]
            found, count = table[kind][of], len(chosen)
            mean = [sum(row[column] for row in chosen) / count for column in range(2, 6)]
            assert found.tokens == count
            assert found.kl == pytest.approx(mean[0], rel=1e-5)
            assert found.top1 == pytest.approx(100 * mean[1])
            assert found.float_perplexity == pytest.approx(math.exp(mean[2]), rel=1e-5)
            assert found.perplexity == pytest.approx(math.exp(mean[3]), rel=1e-5)
            deviations = [sum(row[2] - mean[0] for row in chosen if row[0] == number) for number in numbers]
            units = len(numbers)
            error = math.sqrt(sum(d * d for d in deviations) * units / max(units - 1, 1)) / count
            assert found.kl_error == pytest.approx(error, rel=1e-4, abs=1e-7)


def test_equal_hidden_states_have_no_divergence():
    rng = np.random.default_rng(1)
    head, hidden = rng.standard_normal((7, 3)).astype(np.float32), rng.standard_normal((5, 3)).astype(np.float32)
    found = scores.token_scores(head, hidden, hidden, np.arange(5))
    assert found.kl.max() == 0
    assert found.agreed.all()
