"""Opening images: every usual format gives the same RGB pixels, others are refused with the file's name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from commands import PICTURE, assert_refused, run_export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qvlm_export.calibrate.errors import UserError
from qvlm_export.inputs.images import open_image

Llava = Callable[..., Path]
RED, BLUE = (220, 40, 40), (40, 80, 220)


def two_colors(width: int = 24, height: int = 16) -> Image.Image:
    """Left half red, right half blue."""
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (width // 2, 0, width, height))
    return picture


def with_alpha() -> Image.Image:
    picture = two_colors().convert("RGBA")
    picture.putalpha(255)
    return picture


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.png", two_colors),
        ("a.bmp", two_colors),
        ("a.webp", two_colors),
        ("alpha.png", with_alpha),
        ("palette.png", lambda: two_colors().quantize(4)),
        ("still.gif", lambda: two_colors().quantize(4)),
        ("picture.without.suffix", two_colors),
    ],
)
def test_usual_formats_give_the_same_pixels(tmp_path: Path, name: str, make: Callable[[], Image.Image]) -> None:
    form = {"webp": "WEBP", "bmp": "BMP", "gif": "GIF"}.get(name.rpartition(".")[2], "PNG")
    make().save(tmp_path / name, form, lossless=True)
    opened = open_image(tmp_path / name, "here")
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(two_colors()))


def test_jpeg_gives_nearly_the_same_pixels(tmp_path: Path) -> None:
    two_colors().save(tmp_path / "a.jpg", quality=95)
    opened = np.asarray(open_image(tmp_path / "a.jpg", "here"), np.int32)
    assert np.abs(opened[:, :8] - RED).max() < 12
    assert np.abs(opened[:, 16:] - BLUE).max() < 12


@pytest.mark.parametrize(("mode", "white"), [("1", 1), ("L", 255), ("LA", (255, 255))])
def test_grey_becomes_rgb(tmp_path: Path, mode: str, white: int | tuple[int, int]) -> None:
    Image.new(mode, (10, 9), white).save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png", "here")
    assert (opened.mode, opened.size) == ("RGB", (10, 9))
    assert np.asarray(opened).min() == 255


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((7, 100), "too small"),
        ((100, 7), "too small"),
        ((8, 801), "strip"),
        ((801, 8), "strip"),
        ((8001, 8000), "megapixels"),
    ],
)
def test_sizes_beyond_the_limits_are_refused(tmp_path: Path, size: tuple[int, int], words: str) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"^here: .*a.png has {size[0]}x{size[1]} pixels.*{words}"):
        open_image(tmp_path / "a.png", "here")


@pytest.mark.parametrize("size", [(8, 8), (8, 800), (800, 8)])
def test_sizes_at_the_limits_are_opened(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", "here").size == size


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "CMYK", "YCbCr", "LAB"])
def test_unusual_color_modes_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (16, 16)).save(tmp_path / "a.tif", "TIFF")
    with pytest.raises(UserError, match=r"colour mode .*; convert it to RGB"):
        open_image(tmp_path / "a.tif", "here")


def test_a_large_image_is_refused_before_its_pixels_are_decoded(tmp_path: Path) -> None:
    """100 megapixels of RGB would take 300 MB; Pillow's own warning must not add a line."""
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(path)
    path.write_bytes(path.read_bytes()[:1000])  # damaged behind the header, which would show if pixels were decoded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="10000x10000 pixels; scale it below 64 megapixels"):
            open_image(path, "here")


def save_noise(form: str, tmp_path: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good", form)
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "ICO", "TGA"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4))
def test_damaged_files_are_opened_or_refused(tmp_path: Path, form: str, cut: int, flips: list[tuple[int, int]]) -> None:
    """Whatever a decoder raises becomes a UserError; what opens is RGB."""
    data = bytearray(save_noise(form, tmp_path))
    for place, value in flips:
        data[place % len(data)] = value
    (tmp_path / "bad").write_bytes(bytes(data[: len(data) - cut] if cut % 2 else data))
    with warnings.catch_warnings(), suppress(UserError):
        warnings.simplefilter("ignore")
        assert open_image(tmp_path / "bad", "here").mode == "RGB"


def write_truncated(path: Path) -> None:
    path.write_bytes(PICTURE.read_bytes()[:-200])


def write_animation(path: Path) -> None:
    frames = [Image.new("L", (32, 32), grey) for grey in (0, 128, 255)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda _: None, ["there is no picture", "relative to that file"]),
        (lambda path: path.mkdir(), ["cannot be read", "Is a directory"]),
        (write_truncated, ["cannot be read", "truncated", "save it again"]),
        (lambda path: path.write_bytes(b""), ["is not a picture", "PNG, JPEG or WebP"]),
        (lambda path: path.write_text("<svg/>"), ["is not a picture", "PNG, JPEG or WebP"]),
        (lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"), ["1x1 pixels", "too small"]),
        (lambda path: Image.new("RGB", (4000, 8)).save(path, "PNG"), ["4000x8 pixels", "strip"]),
        (lambda path: Image.new("1", (10_000, 10_000)).save(path, "PNG"), ["10000x10000", "below 64 megapixels"]),
        (lambda path: Image.new("1", (20_000, 20_000)).save(path, "PNG"), ["larger than 64 megapixels", "scale it down"]),
        (lambda path: Image.new("CMYK", (32, 32)).save(path, "JPEG"), ["colour mode CMYK", "convert it to RGB"]),
        (write_animation, ["animated (3 frames)", "save the frame"]),
    ],
    ids=["missing", "folder", "truncated", "empty", "text", "1 pixel", "strip", "100 MP", "400 MP", "CMYK", "GIF"],
)
def test_a_bad_image_in_calibration_data_is_refused_with_its_line(
    llava: Llava, absent: Path, tmp_path: Path, write: Callable[[Path], object], words: list[str]
) -> None:
    write(tmp_path / "picture.png")
    data = tmp_path / "pictures.jsonl"
    data.write_text(f'{{"prompt": "a"}}\n{json.dumps({"image": "picture.png", "prompt": "What is it?"})}\n')
    refused = run_export(llava(), absent, "--backend", "onnx", "--calib-data", data)
    assert_refused(refused, f"{data}:2: ", str(tmp_path / "picture.png"), *words)
