"""VQA soft accuracy with the official normalization of answers (Antol et al. 2015; Goyal et al. 2017).

Follows the VQA toolkit, and that of VizWiz, which is derived from it. The answers of a model are fully normalized. In the
answers of people, punctuation is processed where the ten differ (VQAv2), or nothing is (VizWiz); both data sets hold nearly
normalized answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERS = {
    word: str(value)
    for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_ANY_PUNCTUATION = re.compile(f"[.{re.escape(PUNCTUATION)}]")
_PERIOD = re.compile(r"\.(?!\d)")

# Contractions; an answer that lacks one of their apostrophes is corrected.
_CONTRACTION_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTION_WORDS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed, as in the toolkit


def normalize_answer(answer: str) -> str:
    """Returns the answer of a model, normalized for comparison: punctuation, case, numbers, articles and contractions."""
    words = strip_punctuation(re.sub(r"[\n\t]", " ", answer).strip()).lower().split()
    digits = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in digits if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Removes punctuation as the VQA toolkit does.

    A mark is removed if it stands beside a space anywhere in the text, or if the text holds a number with a comma; otherwise
    it is replaced by a space. Periods that are not followed by a digit are removed.
    """
    if not _ANY_PUNCTUATION.search(text):
        return text
    has_number_with_comma = _DIGITS_AROUND_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        removed = has_number_with_comma or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if removed else " ")
    return _PERIOD.sub("", result)


def soft_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Returns min(1, matches / 3), averaged over all sets that leave out one person's answer; 0 to 1.

    answer: normalized. human_answers: processed for comparison. If n of N people gave the answer, n of the sets hold n - 1
    matches, and the others n.
    """
    matches, count = sum(human == answer for human in human_answers), len(human_answers)
    return (matches * min(1.0, (matches - 1) / 3) + (count - matches) * min(1.0, matches / 3)) / count
