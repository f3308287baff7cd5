"""VQA's normalisation and soft accuracy: published examples, and slow implementations written from the rules alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qvlm_export.evaluation.tasks.vqa_score import CONTRACTIONS, normalize_answer, soft_accuracy, strip_punctuation

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def slow_normalised(text):
    """Character by character, as the toolkit's page describes it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number_with_comma = any(
        text[place] == "," and text[place - 1].isdecimal() and text[place + 1].isdecimal()
        for place in range(1, len(text) - 1)
    )
    kept = []
    for letter in text:
        if letter not in MARKS:
            kept.append(letter)
            continue
        beside_a_space = any({letter, " "} == {one, two} for one, two in itertools.pairwise(text))
        if not (number_with_comma or beside_a_space):
            kept.append(" ")
    without = []
    for place, letter in enumerate(kept):
        behind = kept[place + 1] if place + 1 < len(kept) else ""
        if letter != "." or behind.isdecimal():
            without.append(letter)
    words = []
    for raw in "".join(without).lower().split():
        word = DIGITS.get(raw, raw)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("a red, round ball", "red round ball"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("whats it", "what's it"),
        ("well", "well"),  # not every word is a contraction with a mark left out
        ("hell", "hell"),
        ("ten o'clock", "10 o'clock"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a number with a comma makes all marks go
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("3.5 miles.", "3.5 miles"),
        ("yes!\n", "yes"),
        ("man's", "man's"),
        ("", ""),
        ("the", ""),
        ("somebody'd", "somebodyd"),  # as the toolkit has it
    ],
)
def test_examples(answer, wanted):
    assert normalize_answer(answer) == wanted


TEXT = st.text(alphabet=st.sampled_from([*"abdenotwhiv 13.'\n\tTA", *MARKS]), max_size=24)
WORDS = st.lists(st.sampled_from([*DIGITS, *CONTRACTIONS, "a", "the", "An", "dog", "1,000", ",", "?", "-", "."]), max_size=6)


@settings(max_examples=400, deadline=None)
@given(TEXT | WORDS.map(" ".join))
@example("a,b")
@example("1,0 a-b")
def test_normalisation_is_the_slow_one(text):
    assert normalize_answer(text) == slow_normalised(text)


def test_contractions_lack_one_mark_each():
    assert len(CONTRACTIONS) > 100
    assert CONTRACTIONS["dont"] == "don't"
    assert CONTRACTIONS["'ows'at"] == "'ow's'at"
    for broken, whole in CONTRACTIONS.items():
        if broken != "somebody'd":
            assert len(broken) == len(whole) - 1
            assert broken.replace("'", "") == whole.replace("'", "")


def test_punctuation_alone_keeps_case_and_articles():
    assert strip_punctuation("The dog, a cat.") == "The dog a cat"


def slow_soft_accuracy(said, humans):
    """The mean over all sets that leave one person out."""
    shares = []
    for left_out in range(len(humans)):
        others = [human for place, human in enumerate(humans) if place != left_out]
        shares.append(min(1, others.count(said) / 3))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("matches", "wanted"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_published_values(matches, wanted):
    assert soft_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(wanted)


@given(st.sampled_from("abc"), st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_soft_accuracy_is_the_slow_one(said, humans):
    assert soft_accuracy(said, humans) == pytest.approx(slow_soft_accuracy(said, humans))
