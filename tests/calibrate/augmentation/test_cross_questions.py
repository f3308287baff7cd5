"""Prompts of other samples' questions."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts
from qvlm_export.calibrate.checkpoint.samples import Placement, Sample

IMAGE = 7


def sample(text: int, *, tokens: int = 3, pictures: int = 1, placed: bool = False) -> Sample:
    """Text and pixels that say which sample they are of."""
    ids = np.array([1, *[IMAGE] * (tokens * pictures), 100 + text, 2], np.int64)
    placement = Placement(np.full((tokens, 1), text), np.ones((tokens, 1), np.float32)) if placed else None
    return Sample(ids, np.full((pictures, 3, 1, 1), text, np.float32), len(ids) - 1, placement)


def text_of(prompt: Sample) -> int:
    return int(prompt.input_ids[-2]) - 100


@given(count=st.integers(1, 12), questions=st.integers(1, 15), seed=st.integers(0, 3))
def test_every_picture_gets_its_own_question_first_and_every_text_is_asked_as_often(count: int, questions: int, seed: int):
    samples = [sample(number) for number in range(count)]
    prompts = cross_pair_prompts(samples, questions, IMAGE, seed)
    asked = Counter()
    for number, about in enumerate(prompts):
        assert about[0] is samples[number]
        assert len(about) == min(questions, count)
        assert len({text_of(prompt) for prompt in about}) == len(about)
        assert all((prompt.pixel_values == number).all() for prompt in about)
        asked.update(text_of(prompt) for prompt in about)
    assert set(asked.values()) == {min(questions, count)}


def test_pictures_change_places_only_where_the_prompt_keeps_its_length():
    samples = [
        sample(0), sample(1, tokens=4), sample(2, pictures=0), sample(3, pictures=2), sample(4), sample(5, pictures=0),
    ]  # fmt: skip
    prompts = cross_pair_prompts(samples, 8, IMAGE)
    assert [[text_of(prompt) for prompt in about] for about in prompts] == [[0, 4], [1], [2], [3], [4, 0], [5]]


def test_the_features_are_placed_as_the_picture_needs_it():
    first, second = cross_pair_prompts([sample(0, placed=True), sample(1, placed=True)], 2, IMAGE)
    assert text_of(first[1]) == 1
    assert first[1].placement is first[0].placement
    assert second[1].placement is second[0].placement


def test_a_text_is_asked_once_though_many_samples_have_it():
    samples = [sample(0), sample(0), sample(1)]
    assert [[text_of(prompt) for prompt in about] for about in cross_pair_prompts(samples, 3, IMAGE)] == [
        [0, 1],
        [0, 1],
        [1, 0],
    ]


def test_the_seed_decides():
    samples = [sample(number) for number in range(20)]
    drawn = [[[text_of(p) for p in about] for about in cross_pair_prompts(samples, 3, IMAGE, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_flat_says_whose_pictures():
    prompts = cross_pair_prompts([sample(0), sample(1, pictures=0), sample(2)], 2, IMAGE)
    texts, pictures_of = flatten_prompts(prompts)
    assert [text_of(t) for t in texts] == [0, 2, 1, 2, 0]
    assert pictures_of == [0, 0, 1, 2, 2]
