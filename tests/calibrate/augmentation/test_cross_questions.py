"""Cross-pairing of images and questions: which prompts are made, and what they keep of each sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts
from qvlm_export.calibrate.checkpoint.samples import Placement, Sample

IMAGE = 7


def sample(text: int, *, tokens: int = 3, images: int = 1, placed: bool = False) -> Sample:
    """A sample whose text and pixels both hold the number `text`, which identifies it."""
    ids = np.array([1, *[IMAGE] * (tokens * images), 100 + text, 2], np.int64)
    placement = Placement(np.full((tokens, 1), text), np.ones((tokens, 1), np.float32)) if placed else None
    return Sample(ids, np.full((images, 3, 1, 1), text, np.float32), len(ids) - 1, placement)


def text_number(prompt: Sample) -> int:
    return int(prompt.input_ids[-2]) - 100


@given(count=st.integers(1, 12), questions=st.integers(1, 15), seed=st.integers(0, 3))
def test_own_question_comes_first_and_every_text_is_used_equally_often(count: int, questions: int, seed: int):
    samples = [sample(number) for number in range(count)]
    prompts = cross_pair_prompts(samples, questions, IMAGE, seed)
    uses = Counter()
    for number, about in enumerate(prompts):
        assert about[0] is samples[number]
        assert len(about) == min(questions, count)
        assert len({text_number(prompt) for prompt in about}) == len(about)
        assert all((prompt.pixel_values == number).all() for prompt in about)
        uses.update(text_number(prompt) for prompt in about)
    assert set(uses.values()) == {min(questions, count)}


def test_images_are_exchanged_only_where_the_prompt_keeps_its_length():
    samples = [
        sample(0), sample(1, tokens=4), sample(2, images=0), sample(3, images=2), sample(4), sample(5, images=0),
    ]  # fmt: skip
    prompts = cross_pair_prompts(samples, 8, IMAGE)
    assert [[text_number(prompt) for prompt in about] for about in prompts] == [[0, 4], [1], [2], [3], [4, 0], [5]]


def test_a_prompt_has_the_placement_of_its_image():
    first, second = cross_pair_prompts([sample(0, placed=True), sample(1, placed=True)], 2, IMAGE)
    assert text_number(first[1]) == 1
    assert first[1].placement is first[0].placement
    assert second[1].placement is second[0].placement


def test_a_text_that_several_samples_share_is_used_once_per_image():
    samples = [sample(0), sample(0), sample(1)]
    assert [[text_number(prompt) for prompt in about] for about in cross_pair_prompts(samples, 3, IMAGE)] == [
        [0, 1],
        [0, 1],
        [1, 0],
    ]


def test_the_seed_decides_which_texts_are_drawn():
    samples = [sample(number) for number in range(20)]
    drawn = [
        [[text_number(p) for p in about] for about in cross_pair_prompts(samples, 3, IMAGE, seed)] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_flattened_prompts_name_the_sample_of_their_images():
    prompts = cross_pair_prompts([sample(0), sample(1, images=0), sample(2)], 2, IMAGE)
    texts, sample_indices = flatten_prompts(prompts)
    assert [text_number(t) for t in texts] == [0, 2, 1, 2, 0]
    assert sample_indices == [0, 0, 1, 2, 2]
