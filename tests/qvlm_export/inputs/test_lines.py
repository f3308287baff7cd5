"""Lines of a calibration set: names that data sets use are taken, and a picture is never ignored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, run_export, write_calibration
from hypothesis import given
from hypothesis import strategies as st

from qvlm_export.calibrate.errors import UserError
from qvlm_export.inputs.lines import KEYS, Line, parse_line
from qvlm_export.inputs.samples import read_entries


def parse(**content: Any) -> Line:
    return parse_line(json.dumps(content), "here:1")


@pytest.mark.parametrize("image", KEYS["image"])
@pytest.mark.parametrize("prompt", KEYS["prompt"])
def test_usual_names_are_taken(image: str, prompt: str) -> None:
    assert parse(**{image: "a.png", prompt: "What?"}) == Line(image="a.png", prompt="What?")
    assert parse(**{image: ["a.png"], prompt: "What?", "response": "A ring"}).answer == "A ring"


@pytest.mark.parametrize(
    "others",
    [
        {"image": None},
        {"images": []},
        {"image": "a.png", "image_path": "a.png"},
        {"images": ["a.png"], "img": None, "thumbnail": ""},
        {"id": "7", "source": "coco", "license": {"name": "cc"}, "tags": ["a", "b"]},
        {"image": "a.png", "image_id": 7, "image_width": 640, "image_is_grey": False},
        {"image": "a.png", "source_image": "a.png"},
    ],
)
def test_what_says_nothing_else_is_ignored(others: dict[str, Any]) -> None:
    has_picture = any(value in ("a.png", ["a.png"]) for value in others.values())
    assert parse(prompt="What?", **others) == Line(image="a.png" if has_picture else None, prompt="What?")


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"image": "a.png", "img": "b.png"}, "image and img say different things; keep one of them"),
        ({"question": "Where?"}, "prompt and question say different things"),
        ({"answer": "a", "response": "b"}, "answer and response say different things"),
        ({"images": ["a.png", "b.png"]}, "images holds 2 pictures; a line takes one"),
        ({"image": ["a.png", "a.png"]}, "image holds 2 pictures"),
        ({"images": {"path": "a.png"}}, "images: Input should be a valid string"),
        ({"image_path": 5}, "image_path: Input should be a valid string"),
        ({"images": [None]}, None),
        ({"Image": "a.png"}, "Image may be a picture, but is no name for one; call it image, or take it out"),
        ({"image_url": "https://x.org/a"}, "image_url may be a picture"),
        ({"my_photo": {"bytes": "aGk="}}, "my_photo may be a picture"),
        ({"imgs": ["a"]}, "imgs may be a picture"),
        ({"image_id": 7}, "image_id may be a picture"),
        ({"path": "pictures/A.JPG "}, "path may be a picture"),
        ({"files": [{"name": "a.webp"}]}, "files may be a picture"),
        ({"image": "a.png", "second": "b.png"}, "second may be a picture"),
        ({"image": "a.png", "image2": "b"}, "image2 may be a picture"),
        ({"image": "a.png", "image_id": "000123"}, "image_id may be a picture"),
    ],
)
def test_no_picture_is_ignored(others: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert parse(prompt="What?", **others).image is None
        return
    with pytest.raises(UserError, match=f"^here:1: {re.escape(words)}"):
        parse(prompt="What?", **others)


def test_a_key_that_stands_twice_is_refused() -> None:
    """json keeps the last one silently."""
    with pytest.raises(UserError, match=r"^here:1: not JSON .'image' stands twice in one object"):
        parse_line('{"image": "a.png", "image": "b.png", "prompt": "a"}', "here:1")


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("a.png"), st.lists)
NAMES = st.sampled_from([*KEYS["image"], *KEYS["prompt"], "id", "imgs", "Photo", "path"]) | st.text()


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_a_line_is_taken_with_its_picture_or_refused(content: dict[str, Any]) -> None:
    try:
        line = parse(**content)
    except UserError:
        return
    if "a.png" in content.values():
        assert "a.png" in (line.image, line.prompt, line.answer)


@pytest.mark.parametrize("name", ["images", "image_path", "img", "picture_file"])
def test_a_set_with_pictures_under_two_names_is_complete_or_refused(llava: Any, tmp_path: Path, name: str) -> None:
    """The first line has `image`, so that the other lines would have counted as text."""
    path = write_calibration(tmp_path, count=1)
    line = json.loads(path.read_text())
    with path.open("a") as file:
        file.write(json.dumps({name: line["image"], "prompt": "What?"}))
    if name in KEYS["image"]:
        assert [str(entry.image) for entry in read_entries(path, None, 9)] == [line["image"]] * 2
        return
    refused = run_export(llava(), tmp_path / "new" / "x.plan", "--backend", "onnx", "--calib-data", path)
    assert_refused(refused, f"{path}:2: {name} may be a picture")
    assert not (tmp_path / "new").exists()
