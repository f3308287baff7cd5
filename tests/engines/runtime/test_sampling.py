"""Sampling of the next token, against slow and independent formulations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.runtime.sampling import Sampling, pick_token

NUMBERS = ("temperature", "top_p", "repetition_penalty")
logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


def measure_frequencies(logits: np.ndarray, sampling: Sampling, sequence: list[int], draws: int = 4000) -> np.ndarray:
    """How often each token is picked, as fractions [vocab]."""
    random = np.random.default_rng(0)
    picked = [pick_token(logits, sequence, sampling, random) for _ in range(draws)]
    return np.bincount(picked, minlength=len(logits)) / draws


def test_greedy_takes_the_largest_logit():
    logits = np.array([0.1, 3.0, 2.9], np.float32)
    assert pick_token(logits, [], Sampling(), np.random.default_rng(0)) == 1


def test_temperature_gives_the_softmax():
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    expected = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    assert np.abs(measure_frequencies(logits, Sampling(temperature=0.5), []) - expected).max() < 0.02


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    observed = measure_frequencies(logits, Sampling(temperature=1.0, top_p=0.6), [])
    assert np.abs(observed - np.array([0.625, 0.375, 0, 0])).max() < 0.02


@settings(deadline=None, max_examples=60)
@given(logit_lists, st.floats(0.05, 1.0))
def test_top_p_never_picks_outside_the_nucleus(values, top_p):
    logits = np.array(values, np.float32)
    probability = np.exp(logits.astype(np.float64) - logits.max())
    probability /= probability.sum()
    nucleus, total = set(), 0.0
    for token in sorted(range(len(values)), key=lambda t: (-probability[t], t)):
        if total >= top_p:
            break
        nucleus.add(token)
        total += probability[token]
    random = np.random.default_rng(1)
    picked = {pick_token(logits, [], Sampling(temperature=1.0, top_p=top_p), random) for _ in range(30)}
    assert picked <= nucleus


def test_repetition_penalty_works_on_both_signs():
    logits = np.array([2.0, 1.5, -1.0, -1.2], np.float32)
    penalised = Sampling(repetition_penalty=2.0)
    assert pick_token(logits, [0], penalised, np.random.default_rng(0)) == 1
    negative = np.array([-1.0, -1.5], np.float32)
    assert pick_token(negative, [0], penalised, np.random.default_rng(0)) == 1
    assert logits[0] == np.float32(2.0)  # the caller's array is left alone


@settings(deadline=None, max_examples=30)
@given(logit_lists, st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_tokens(values, seed):
    logits, sampling = np.array(values, np.float32), Sampling(temperature=1.0, top_p=0.9)
    runs = [[pick_token(logits, [0], sampling, np.random.default_rng(seed)) for _ in range(5)] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": -(10**5000)},  # which Python does not print
        {"seed": True},
        {"seed": 1.0},
        {"seed": "1"},
        *({name: value} for name in NUMBERS for value in (None, True, "1", [1.0], 10**5000, -math.inf, 1j)),
    ],
)
def test_a_setting_of_another_type_or_out_of_range_is_refused_by_name(changes):
    with pytest.raises(UserError, match=f"^{next(iter(changes))} .*: must be "):
        Sampling(**changes)


@pytest.mark.parametrize("temperature", [1e-320, 1e-30])
@pytest.mark.filterwarnings("error")
def test_tiny_temperatures_are_greedy(temperature):
    logits = np.array([1.0, 5.0, -3.0], np.float32)
    assert pick_token(logits, [], Sampling(temperature=temperature), np.random.default_rng(0)) == 1


EXTREMES = st.sampled_from([5e-324, 1e-300, 1e-30, 1.0, 1e30, 1e300, 10**300, Fraction(1, 3), np.float32(0.5)])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=9), EXTREMES, EXTREMES, st.floats(1e-300, 1.0))
@pytest.mark.filterwarnings("error")
def test_extreme_settings_pick_some_token(values, temperature, penalty, top_p):
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty, top_p=top_p, seed=10**5000)
    random = np.random.default_rng([sampling.seed, 0])
    assert 0 <= pick_token(np.array(values, np.float32), [0, 1], sampling, random) < len(values)
    greedy = Sampling(repetition_penalty=penalty)
    assert 0 <= pick_token(np.array(values, np.float32), [0, 1], greedy, random) < len(values)


@pytest.mark.parametrize(("penalty", "expected"), [(1e-300, 0), (5e-324, 0), (1e300, 2)])
def test_an_extreme_penalty_prefers_or_avoids_repetition(penalty, expected):
    logits = np.array([2.0, -1.0, 1.0], np.float32)
    assert pick_token(logits, [0, 1], Sampling(repetition_penalty=penalty), np.random.default_rng(0)) == expected
