"""Scenes of the tiny model: deterministic, in separate splits, with answers that an independent parser confirms."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from paths import ROOT

from tools.tiny import scenes
from tools.tiny.scenes import COLORS, KINDS, POSITIONS, SHAPES, SPLITS, Scene, Thing

COUNT = 300
SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross", "rings": "ring"}


def ask_all(split: str = "train") -> list[tuple[Scene, scenes.Question]]:
    """One question of each kind about each of the first scenes of a split."""
    return [(scene, q) for scene, qs in (scenes.questions(split, i) for i in range(COUNT)) for q in qs]


# Determinism


def test_an_index_always_gives_the_same_scene_image_and_questions() -> None:
    for index in range(20):
        one, two = scenes.questions("val", index), scenes.questions("val", index)
        assert one == two
        assert scenes.draw(one[0]).tobytes() == scenes.draw(two[0]).tobytes()


def test_a_process_with_another_hash_seed_gives_the_same_scenes() -> None:
    script = (
        "import hashlib; from tools.tiny import scenes; made = [scenes.questions('test', i) for i in range(10)]; "
        "print(hashlib.sha256(repr(made).encode() + b''.join(scenes.draw(s).tobytes() for s, _ in made)).hexdigest())"
    )
    made = [scenes.questions("test", i) for i in range(10)]
    here = hashlib.sha256(repr(made).encode() + b"".join(scenes.draw(s).tobytes() for s, _ in made)).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_index_split_and_seed_each_change_the_scene() -> None:
    base = scenes.make_scene("train", 0)
    others = [scenes.make_scene("train", 1), scenes.make_scene("val", 0), scenes.make_scene("train", 0, seed=1)]
    assert all(other != base for other in others)


# Splits


def test_splits_divide_the_hash_buckets_among_them() -> None:
    buckets = [bucket for numbers in SPLITS.values() for bucket in numbers]
    assert sorted(buckets) == list(range(100))


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_belong_to_their_split(split: str) -> None:
    assert {scenes.scene_split(scenes.make_scene(split, index).things) for index in range(COUNT)} == {split}


def test_no_scene_is_in_two_splits() -> None:
    contents = {split: {scenes.make_scene(split, index).things for index in range(COUNT)} for split in SPLITS}
    for one, two in itertools.combinations(SPLITS, 2):
        assert not contents[one] & contents[two]


def test_scenes_of_a_single_object_are_in_all_splits() -> None:
    """Of the 270 such scenes most are for training, and some are in each other split."""
    singles = [(Thing(c, color, shape),) for c in range(9) for color in COLORS for shape in SHAPES]
    counts = collections.Counter(scenes.scene_split(things) for things in singles)
    assert set(counts) == set(SPLITS)
    assert counts["train"] > 0.8 * len(singles)


def test_split_depends_on_the_objects_only() -> None:
    scene = scenes.make_scene("test", 5)
    assert scenes.scene_split(tuple(Thing(t.cell, t.color, t.shape) for t in scene.things)) == "test"


# Scenes


def test_scenes_have_one_to_four_objects_in_different_cells() -> None:
    made = [scenes.make_scene("train", index) for index in range(1200)]
    for scene in made:
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells))
        assert all(0 <= cell < 9 for cell in cells)
    sizes = collections.Counter(len(scene.things) for scene in made)
    for size, share in {1: 1 / 6, 2: 1 / 3, 3: 1 / 3, 4: 1 / 6}.items():
        assert sizes[size] / len(made) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("attribute", "values"), [("color", tuple(COLORS)), ("shape", SHAPES), ("position", POSITIONS)])
def test_colors_shapes_and_positions_are_uniform(attribute: str, values: tuple[str, ...]) -> None:
    things = [thing for index in range(1200) for thing in scenes.make_scene("train", index).things]
    counts = collections.Counter(getattr(thing, attribute) for thing in things)
    assert set(counts) == set(values)
    for value in values:
        assert counts[value] / len(things) == pytest.approx(1 / len(values), abs=0.04)


@pytest.mark.parametrize("size", [48, 192])
def test_image_shows_the_objects_of_the_scene(size: int) -> None:
    """Each cell has the color of its object and no other; empty cells have none."""
    for index in range(60):
        scene = scenes.make_scene("train", index)
        pixels = np.asarray(scenes.draw(scene, size), np.int32)
        assert pixels.shape == (size, size, 3)
        by_cell = {thing.cell: thing for thing in scene.things}
        for cell in range(9):
            row, column = divmod(cell, 3)
            patch = pixels[row * size // 3 : (row + 1) * size // 3, column * size // 3 : (column + 1) * size // 3]
            shares = {name: float((patch == color).all(-1).mean()) for name, color in COLORS.items()}
            shown = {name for name, share in shares.items() if share > 0}
            assert shown == ({by_cell[cell].color} if cell in by_cell else set())
            if cell in by_cell:
                assert shares[by_cell[cell].color] > 0.1


def test_shapes_differ_in_how_they_fill_their_cell() -> None:
    """A square fills its bounding box, a circle less of it, cross and triangle still less; only a ring is open inside."""
    share, middle = {}, {}
    for shape in SHAPES:
        pixels = np.asarray(scenes.draw(Scene((Thing(4, "red", shape),), seed=3), 300))
        red = (pixels == COLORS["red"]).all(-1)
        rows, columns = np.nonzero(red)
        share[shape] = red.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
        middle[shape] = bool(red[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2])
    assert share["square"] == 1.0
    assert share["circle"] == pytest.approx(np.pi / 4, abs=0.02)
    assert share["triangle"] == pytest.approx(0.5, abs=0.03)
    assert share["cross"] == pytest.approx(0.6 + 0.6 - 0.36 - 0.33, abs=0.06)
    assert middle == {shape: shape != "ring" for shape in SHAPES}


# Answers, by an independent parser of the questions


def things_meant(scene: Scene, subject: str) -> list[Thing]:
    """The objects that a phrase such as "red object", "circle", "red circle" or "object at the top" can refer to."""
    position = re.fullmatch(r"object at the (.+)", subject)
    if position:
        return [t for t in scene.things if POSITIONS[t.cell] == position.group(1)]
    words = subject.removesuffix(" object").split()
    return [t for t in scene.things if all(word in (t.color, t.shape) for word in words)]


def related(one: Thing, relation: str, two: Thing) -> bool:
    """Whether a relation such as "above" or "left of" holds between two objects."""
    (row_1, column_1), (row_2, column_2) = divmod(one.cell, 3), divmod(two.cell, 3)
    holds = {"above": row_1 < row_2, "below": row_1 > row_2, "left of": column_1 < column_2, "right of": column_1 > column_2}
    return holds[relation]


def attributes(scene: Scene, attribute: str, subject: str) -> set[str]:
    """Values of an attribute of the objects that the phrase `subject` can refer to."""
    return {getattr(thing, attribute) for thing in things_meant(scene, subject)}


def relations(scene: Scene, one: str, relation: str, two: str) -> set[str]:
    """Answers to whether the relation holds, for all objects that the two phrases can refer to."""
    pairs = itertools.product(things_meant(scene, one), things_meant(scene, two))
    return {"yes" if related(first, relation, second) else "no" for first, second in pairs}


# pattern of a question -> all answers that are right for some interpretation of it
PARSERS: tuple[tuple[str, Callable[..., set[str]]], ...] = (
    (r"Describe the picture\.|What does the picture show\?", lambda scene: {scenes.describe(scene)}),
    (r"How many objects are there\?", lambda scene: {str(len(scene.things))}),
    (r"Where is the first object\?", lambda scene: {POSITIONS[min(t.cell for t in scene.things)]}),
    (r"What (color|shape) is the (.+)\?", attributes),
    (r"Name the (color|shape) of the (.+)\.", attributes),
    (r"Where is the (.+)\?", lambda scene, subject: {POSITIONS[t.cell] for t in things_meant(scene, subject)}),
    (r"In which place is the (.+)\?", lambda scene, subject: {POSITIONS[t.cell] for t in things_meant(scene, subject)}),
    (r"How many (\w+) objects are there\?", lambda scene, color: {str(len(things_meant(scene, color)))}),
    (r"How many (\w+) are there\?", lambda scene, shapes: {str(len(things_meant(scene, SINGULAR[shapes])))}),
    (r"Is there a (.+)\?", lambda scene, subject: {"yes" if things_meant(scene, subject) else "no"}),
    (r"Is the (\w+ \w+) (above|below|left of|right of) the (\w+ \w+)\?", relations),
    (r"Which object is at the (.+)\?", lambda scene, at: attributes(scene, "name", f"object at the {at}")),
)


def answers(scene: Scene, text: str) -> set[str]:
    """Every answer that is right for the first pattern that fits the question."""
    matches = ((parse, re.fullmatch(pattern, text)) for pattern, parse in PARSERS)
    parse, match = next((parse, match) for parse, match in matches if match)
    return parse(scene, *match.groups())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "choice"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_question_has_exactly_its_one_right_answer(kind: str, split: str) -> None:
    of_kind = [(scene, q) for scene, q in ask_all(split) if q.kind == kind]
    assert len(of_kind) == COUNT
    for scene, question in of_kind:
        assert answers(scene, question.text) == {question.answer}, (scene, question)


def test_options_contain_the_right_answer_exactly_once() -> None:
    letters: collections.Counter[str] = collections.Counter()
    for scene, question in (pair for pair in ask_all() if pair[1].kind == "choice"):
        inner, context, options = question.text.split("\n")
        assert context.removeprefix("Context: ") in scenes.HINTS
        offered = dict(re.findall(r"\(([A-D])\) ([a-z ]+?)(?= \(|$)", options.removeprefix("Options: ")))
        assert 2 <= len(offered) <= 4
        assert len(set(offered.values())) == len(offered)
        (right,) = answers(scene, inner)
        letter = question.answer.removeprefix("The answer is ").removesuffix(".")
        assert [name for name, option in offered.items() if option == right] == [letter]
        letters[letter] += 1
    # With two, three or four options in random order the right one is A or B in 13 of 36 cases each, C in 7, D in 3.
    for letter, share in {"A": 13 / 36, "B": 13 / 36, "C": 7 / 36, "D": 3 / 36}.items():
        assert letters[letter] / COUNT == pytest.approx(share, abs=0.08)


def test_descriptions_name_all_objects_row_by_row() -> None:
    for index in range(COUNT):
        scene = scenes.make_scene("train", index)
        text = scenes.describe(scene)
        parts = re.findall(r"a (\w+) (\w+) at the ([a-z ]+?)(?=,| and |\.)", text)
        assert parts == [(t.color, t.shape, POSITIONS[t.cell]) for t in scene.things]
        assert text.startswith("The picture shows ")
        assert text.endswith(".")
        assert text.count(" and ") == (len(scene.things) > 1)


def test_descriptions_are_at_least_ten_tokens_long() -> None:
    """Tokens are words and punctuation here; the shortest descriptions are those of a single object."""
    lengths = [len(re.findall(r"\w+|[^\w\s]", scenes.describe(scenes.make_scene("train", i)))) for i in range(COUNT)]
    assert min(lengths) >= 10
    assert max(lengths) >= 25


# Questions


def test_questions_follow_the_order_of_kinds() -> None:
    assert [q.kind for q in scenes.questions("train", 0)[1]] == list(KINDS)
    chosen = ("count", "yesno", "count")
    assert [q.kind for q in scenes.questions("train", 0, kinds=chosen)[1]] == list(chosen)


def test_yes_and_no_are_balanced_and_relations_are_among_them() -> None:
    """Always answering yes must not pay off, neither over all questions nor over relations."""
    pairs = [q for _, q in ask_all() if q.kind == "yesno"]
    relations = [q for q in pairs if re.search("above|below|left of|right of", q.text)]
    assert sum(q.answer == "yes" for q in pairs) / len(pairs) == pytest.approx(0.5, abs=0.08)
    assert sum(q.answer == "yes" for q in relations) / len(relations) == pytest.approx(0.5, abs=0.12)
    assert len(relations) / len(pairs) == pytest.approx(0.3, abs=0.1)


def test_half_of_the_wrong_names_combine_attributes_of_the_scene() -> None:
    """A model that knows colors and shapes, but not which belong together, answers yes to such names."""
    wrong = [(s, q) for s, q in ask_all() if q.kind == "yesno" and q.text.startswith("Is there") and q.answer == "no"]
    several = [(s, q) for s, q in wrong if len({t.color for t in s.things}) > 1 and len({t.shape for t in s.things}) > 1]
    mixed = 0
    for scene, question in several:
        color, shape = question.text.removeprefix("Is there a ").removesuffix("?").split()
        mixed += color in {t.color for t in scene.things} and shape in {t.shape for t in scene.things}
    assert mixed / len(several) > 0.4


def test_counts_reach_zero_and_more_than_one() -> None:
    counts = collections.Counter(q.answer for _, q in ask_all() if q.kind == "count")
    assert set(counts) == {"0", "1", "2", "3", "4"}
    assert max(counts.values()) < 0.75 * COUNT


def test_attributes_are_asked_by_position_and_by_the_other_attribute() -> None:
    texts = [q.text for _, q in ask_all() if q.kind in ("color", "shape")]
    by_position = sum("object at the" in text for text in texts) / len(texts)
    assert 0.4 < by_position < 0.7


def test_a_question_does_not_change_the_scene() -> None:
    scene = scenes.make_scene("train", 3)
    for kind in KINDS:
        scenes.ask(scene, kind, random.Random(0))
    assert scene == scenes.make_scene("train", 3)
