"""VQA normalization and soft accuracy, against published values and independent slow implementations."""

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


def reference_normalization(text):
    """Normalizes character by character, as the toolkit's page describes it."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number_with_comma = any(
        text[i] == "," and text[i - 1].isdecimal() and text[i + 1].isdecimal() for i in range(1, len(text) - 1)
    )
    without_marks = []
    for letter in text:
        if letter not in MARKS:
            without_marks.append(letter)
            continue
        beside_a_space = any({letter, " "} == {left, right} for left, right in itertools.pairwise(text))
        if not (number_with_comma or beside_a_space):
            without_marks.append(" ")
    without_periods = []
    for i, letter in enumerate(without_marks):
        following = without_marks[i + 1] if i + 1 < len(without_marks) else ""
        if letter != "." or following.isdecimal():
            without_periods.append(letter)
    words = []
    for raw in "".join(without_periods).lower().split():
        word = DIGITS.get(raw, raw)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("a red, round ball", "red round ball"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("whats it", "what's it"),
        ("well", "well"),  # not every word is a contraction without its apostrophe
        ("hell", "hell"),
        ("ten o'clock", "10 o'clock"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # with a comma in a number, all marks are removed
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("3.5 miles.", "3.5 miles"),
        ("yes!\n", "yes"),
        ("man's", "man's"),
        ("", ""),
        ("the", ""),
        ("somebody'd", "somebodyd"),  # as in the toolkit
    ],
)
def test_normalization_of_examples(answer, expected):
    assert normalize_answer(answer) == expected


TEXT = st.text(alphabet=st.sampled_from([*"abdenotwhiv 13.'\n\tTA", *MARKS]), max_size=24)
WORDS = st.lists(st.sampled_from([*DIGITS, *CONTRACTIONS, "a", "the", "An", "dog", "1,000", ",", "?", "-", "."]), max_size=6)


@settings(max_examples=400, deadline=None)
@given(TEXT | WORDS.map(" ".join))
@example("a,b")
@example("1,0 a-b")
def test_normalization_equals_the_reference(text):
    assert normalize_answer(text) == reference_normalization(text)


def test_contractions_are_restored_from_words_without_one_apostrophe():
    assert len(CONTRACTIONS) > 100
    assert CONTRACTIONS["dont"] == "don't"
    assert CONTRACTIONS["'ows'at"] == "'ow's'at"
    for broken, whole in CONTRACTIONS.items():
        if broken != "somebody'd":
            assert len(broken) == len(whole) - 1
            assert broken.replace("'", "") == whole.replace("'", "")


def test_strip_punctuation_keeps_case_and_articles():
    assert strip_punctuation("The dog, a cat.") == "The dog a cat"


def reference_soft_accuracy(answer, human_answers):
    """The mean over all sets that leave one person's answer out."""
    accuracies = []
    for left_out in range(len(human_answers)):
        others = [human for i, human in enumerate(human_answers) if i != left_out]
        accuracies.append(min(1, others.count(answer) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_soft_accuracy_of_published_values(matches, expected):
    assert soft_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(expected)


@given(st.sampled_from("abc"), st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_soft_accuracy_equals_the_reference(answer, human_answers):
    assert soft_accuracy(answer, human_answers) == pytest.approx(reference_soft_accuracy(answer, human_answers))
