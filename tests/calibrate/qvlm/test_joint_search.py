"""The joint search on toy chains, against trying all combinations, and how many layer forwards it takes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, Clip, SearchLayer, search_tree


class Chain:
    """Layers y = tanh(a x + c) with candidates c; a layer's input x is 0.3 plus the sum of all outputs before it.

    Counts how often each layer computes each value, and how often an input is prepared.
    """

    def __init__(self, seed: int, sizes: list[int]) -> None:
        rng = np.random.default_rng(seed)
        self.gains = rng.uniform(-2, 2, len(sizes))
        self.candidates = [rng.uniform(-2, 2, size).tolist() for size in sizes]
        self.float_output = float(rng.uniform(-1, 1))
        self.applied: Counter = Counter()
        self.prepared = 0
        self.layers = [
            SearchLayer(self.prepare, lambda x, c, k=k: self.apply(k, x, c), self.candidates[k]) for k in range(len(sizes))
        ]

    def prepare(self, outputs):
        self.prepared += 1
        return 0.3 + sum(outputs)

    def apply(self, k, x, c):
        self.applied[k, round(x, 12), c] += 1
        return math.tanh(self.gains[k] * x + c)

    def error(self, output):
        return (output - self.float_output) ** 2

    def output(self, choice, before=()):
        outputs = before
        for k, index in enumerate(choice):
            outputs = (*outputs, math.tanh(self.gains[k] * (0.3 + sum(outputs)) + self.candidates[k][index]))
        return outputs


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), SIZES, st.booleans())
def test_the_search_finds_the_best_combination_and_computes_nothing_twice(seed, sizes, has_layer_before):
    chain = Chain(seed, sizes)
    before = (0.7,) if has_layer_before else ()
    result = search_tree(chain.layers, chain.error, before)
    choices = itertools.product(*(range(n) for n in sizes))
    errors = {choice: chain.error(chain.output(choice, before)[-1]) for choice in choices}
    assert result.choice == min(errors, key=errors.__getitem__)
    assert result.error == errors[result.choice]
    assert result.first_error == errors[(0,) * len(sizes)]
    assert result.outputs == chain.output(result.choice, before)
    assert result.layer_forwards == chain.applied.total() == sum(math.prod(sizes[: d + 1]) for d in range(len(sizes)))
    assert set(chain.applied.values()) == {1}
    assert chain.prepared == 1 + sum(math.prod(sizes[:d]) for d in range(1, len(sizes)))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_five_candidates_take_the_papers_number_of_forwards(depth):
    chain = Chain(0, [5] * depth)
    search_tree(chain.layers, chain.error)
    assert chain.applied.total() == [5, 30, 155][depth - 1]


def test_the_first_of_equally_good_combinations_wins():
    layers = [SearchLayer(lambda _: None, lambda _, c: c, [3, 1, 1]), SearchLayer(lambda o: o[0], lambda x, _: x, [0, 0])]
    assert search_tree(layers, float).choice == (1, 0)


def test_joint_search_beats_layer_by_layer_search_where_errors_cancel():
    # Searched one by one, each layer is best with its first candidate; only the errors of both second ones cancel.
    layers = [
        SearchLayer(lambda _: 0.0, lambda x, c: x + c, [0.1, -1.0]),
        SearchLayer(lambda o: o[-1], lambda x, c: x + c, [0.1, 1.0]),
    ]
    alone = search_tree(layers[:1], abs)
    one_by_one = search_tree(layers[1:], abs, alone.outputs)
    together = search_tree(layers, abs)
    assert (alone.choice, one_by_one.choice, one_by_one.error) == ((0,), (0,), 0.2)
    assert (together.choice, together.error) == ((1, 1), 0.0)


@settings(deadline=None, max_examples=40)
@example(22559, 0.995, 1.0)  # the value lies at the lower edge of its bin
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.995, 0.98, 0.9, 0.5, 1.0]), st.sampled_from([1.0, 0.7]))
def test_clipping_ranges_are_percentiles_of_the_values_that_share_them(seed, percentile, fraction):
    weight = np.random.default_rng(seed).standard_normal((4, 128)).astype(np.float32)
    clip = Clip(percentile, fraction)
    for scheme, shape in ((W8A8, (4, 128)), (LinearScheme(4, None, 64), (4, 2, 64))):
        exact = np.quantile(np.abs(weight).reshape(shape), percentile, axis=-1, method="inverted_cdf")
        amax = clip.weight_amax(torch.from_numpy(weight), scheme)
        np.testing.assert_allclose(amax, exact * np.float32(fraction), rtol=1e-6)
    exact = np.quantile(np.abs(weight), percentile, method="inverted_cdf") * fraction
    histogram = observe_rows("weight", torch.as_tensor(weight).reshape(-1, 1)).histogram()
    slack = 1e-6 * exact  # of float32
    assert exact - slack <= clip.activation_amax(histogram) <= exact + histogram.width + slack


def test_the_papers_clips_begin_with_the_absmax_range():
    assert [c.percentile for c in PAPER_CLIPS] == [1.0, 0.995, 0.99, 0.985, 0.98]
    assert PAPER_CLIPS[0] == Clip()
