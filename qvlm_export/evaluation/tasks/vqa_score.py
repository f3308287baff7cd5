"""VQA soft accuracy with the official answer normalisation (Antol et al. 2015; Goyal et al. 2017).

Facts of the VQA toolkit and of VizWiz's, which is made from it: what a model says is normalised wholly. What people said
has its punctuation processed where the ten differ (VQAv2), or stays as it is (VizWiz); both sets come nearly normalised.
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
_ANY = re.compile(f"[.{re.escape(PUNCTUATION)}]")
_PERIOD = re.compile(r"\.(?!\d)")

# Each is restored where one of its apostrophes is missing.
_WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    whole[:at] + whole[at + 1 :]: whole for whole in _WHOLE.split() for at, letter in enumerate(whole) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the toolkit has this one the wrong way round


def normalize_answer(answer: str) -> str:
    """What a model said, as it is compared."""
    words = strip_punctuation(re.sub(r"[\n\t]", " ", answer).strip()).lower().split()
    digits = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in digits if word not in ARTICLES)


def strip_punctuation(text: str) -> str:
    """Marks go where they touch a space anywhere or a number has a comma, and become spaces otherwise; periods that no
    digit follows go."""
    if not _ANY.search(text):
        return text
    joins = _DIGITS_AROUND_COMMA.search(text) is not None
    changed = text
    for mark in PUNCTUATION:
        loose = joins or f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if loose else " ")
    return _PERIOD.sub("", changed)


def soft_accuracy(said: str, humans: Sequence[str]) -> float:
    """Mean over the leave-one-out sets of min(1, matches / 3), 0..1. said: normalised; humans: as they are compared.

    With n matches of N humans, n of the sets hold n - 1 and the others n.
    """
    matches, count = sum(human == said for human in humans), len(humans)
    return (matches * min(1.0, (matches - 1) / 3) + (count - matches) * min(1.0, matches / 3)) / count
