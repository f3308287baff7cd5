"""Opening images: every usual format gives the same RGB pixels, others are refused with the file's name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import PICTURE, assert_refused, run_export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from qvlm_export.calibrate.errors import UserError
from qvlm_export.inputs.images import Pictures, open_image, open_pictures, to_rgb

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


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_more_than_8_bits_a_channel_are_refused(tmp_path: Path, mode: str) -> None:
    """Pillow's conversion to RGB, which transformers uses, clips such pixels to white."""
    Image.new(mode, (16, 16)).save(tmp_path / "a.tif", "TIFF")
    with pytest.raises(
        UserError, match=rf"^here: .*a.tif has more than 8 bits a channel \(mode {mode}\); save it with 8 bits"
    ):
        open_image(tmp_path / "a.tif", "here")


# As transformers opens images


def same_as_transformers(path: Path) -> bool:
    opened, expected = open_image(path, "here"), load_image(str(path))
    return (opened.mode, opened.size, opened.tobytes()) == (expected.mode, expected.size, expected.tobytes())


def random_pixels(mode: str = "RGB", width: int = 24, height: int = 16) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("a.png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("a.tif", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
        *(("a.jpg", mode) for mode in ("L", "RGB", "CMYK")),
        *(("a.webp", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_colour_modes_become_rgb_as_in_transformers(tmp_path: Path, name: str, mode: str) -> None:
    make_mode(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode == mode
    assert same_as_transformers(tmp_path / name)


def make_mode(mode: str) -> Image.Image:
    """Random pixels, half of them transparent where the mode has transparency."""
    if mode == "LAB":
        return Image.frombytes("LAB", (24, 16), random_pixels().tobytes())
    picture = random_pixels(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(random_pixels("L").point(lambda value: 255 * (value > 127)))
    return picture


def save_with_orientation(path: Path, orientation: int, **arguments: Any) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    random_pixels().save(path, exif=exif, **arguments)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are none, and are ignored
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("a.jpg", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {}), ("a.mpo", {"save_all": True})],
)
def test_images_are_turned_upright(tmp_path: Path, name: str, arguments: dict[str, Any], orientation: int) -> None:
    if name == "a.mpo":
        arguments = arguments | {"append_images": [two_colors()]}
    save_with_orientation(tmp_path / name, orientation, **arguments)
    turned = orientation in (5, 6, 7, 8)
    assert open_image(tmp_path / name, "here").size == ((16, 24) if turned else (24, 16))
    assert same_as_transformers(tmp_path / name)
    if name == "a.mpo":
        with Image.open(tmp_path / name) as stored:
            assert (stored.format, getattr(stored, "n_frames", 1)) == ("MPO", 2)


def test_the_orientation_in_xmp_data_counts_too(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    random_pixels().save(tmp_path / "a.webp", xmp=xmp, lossless=True)
    assert same_as_transformers(tmp_path / "a.webp")


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00",
        b"Exif\x00\x00nonsense",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff",
        b"Exif\x00\x00MM\x00*\xff\xff\xff\xff",
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_data_leaves_the_image_as_stored(tmp_path: Path, name: str, exif: bytes) -> None:
    random_pixels().save(tmp_path / name, exif=exif)
    plain = tmp_path / f"plain{name}"
    random_pixels().save(plain)
    assert open_image(tmp_path / name, "here").tobytes() == open_image(plain, "here").tobytes()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.integers(0, 40))
@pytest.mark.filterwarnings("ignore")
def test_any_exif_data_is_survived(tail: bytes, cut: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = exif.tobytes()
    file = BytesIO()
    random_pixels().save(file, "JPEG", exif=data[: min(cut, len(data))] + tail)
    with Image.open(file) as opened:
        assert to_rgb(opened, "here").size in ((24, 16), (16, 24))


# Pictures as Python callers give them


@pytest.mark.parametrize(
    "give",
    [
        lambda path: path,
        Path,
        Image.open,
        lambda path: Image.open(path).convert("RGB"),
        lambda path: [path],
        lambda path: (Path(path),),
        lambda path: np.asarray(load_image(path)),
        lambda path: np.asarray(load_image(path)).transpose(2, 0, 1),
        lambda path: [torch.from_numpy(np.array(load_image(path)))],
        lambda path: np.asarray(load_image(path))[::-1][::-1],
        lambda path: np.asarray(load_image(path).convert("RGBA")),
    ],
)
def test_pictures_may_be_paths_images_and_arrays(tmp_path: Path, give: Callable[[str], Pictures]) -> None:
    path = tmp_path / "a.png"
    save_with_orientation(path, 6)
    (opened,) = open_pictures(give(str(path)))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(load_image(str(path))))


def test_grey_arrays_are_grey_pictures() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)
    expected = np.stack([grey] * 3, -1)
    for pixels in (grey, grey[..., None], grey[None]):
        np.testing.assert_array_equal(np.asarray(open_pictures([pixels])[0]), expected)


def test_no_picture_is_an_empty_list() -> None:
    assert open_pictures(None) == open_pictures([]) == open_pictures(()) == []


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (5, "^picture 1: is of type int; give a path, a PIL image, or uint8 pixels"),
        ([two_colors(), b"png"], "^picture 2: is of type bytes"),
        ([[two_colors()]], "^picture 1: is of type list"),
        ([None], "^picture 1: is of type NoneType"),
        ("none.png", "^picture 1: there is no picture none.png"),
        (np.zeros((16, 16, 3)), "^picture 1: is an array of float64; give uint8 pixels from 0 to 255"),
        (np.zeros((16, 16, 3), np.int64), "array of int64"),
        (np.zeros((16, 16), bool), "array of bool"),
        (np.array([[None] * 9] * 9), "array of object"),
        (torch.zeros(3, 16, 16, dtype=torch.bfloat16), "array of torch.bfloat16"),
        (np.zeros((2, 16, 16, 3), np.uint8), r"array of shape \[2, 16, 16, 3\]; give"),
        (np.zeros((16, 16, 5), np.uint8), r"array of shape \[16, 16, 5\]"),
        (np.zeros(16, np.uint8), r"array of shape \[16\]"),
        (np.zeros((0, 0, 3), np.uint8), "0x0 pixels"),
        (np.zeros((4, 4, 3), np.uint8), "4x4 pixels, too small"),
        (Image.new("I;16", (20, 20)), "^picture 1 has more than 8 bits"),
        (Image.new("L", (20_000, 9)), "^picture 1 has 20000x9 pixels, a strip"),
    ],
)
def test_what_is_no_picture_is_refused(pictures: Pictures, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_pictures(pictures)


def test_a_closed_image_is_refused(tmp_path: Path) -> None:
    two_colors().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(UserError, match=r"^picture 1 cannot be read"):
        open_pictures(image)


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder")])
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    make(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    for name in ("a.png", "link.png"):
        with pytest.raises(UserError, match=f"^here: .*{name}: is {kind}, not a picture; give a regular file"):
            open_image(tmp_path / name, "here")
    with pytest.raises(UserError, match="/dev/null: is a device"):
        open_image(Path("/dev/null"), "here")


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
        (lambda path: path.mkdir(), ["is a folder, not a picture"]),
        (write_truncated, ["cannot be read", "truncated", "save it again"]),
        (lambda path: path.write_bytes(b""), ["is not a picture", "PNG, JPEG or WebP"]),
        (lambda path: path.write_text("<svg/>"), ["is not a picture", "PNG, JPEG or WebP"]),
        (lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"), ["1x1 pixels", "too small"]),
        (lambda path: Image.new("RGB", (4000, 8)).save(path, "PNG"), ["4000x8 pixels", "strip"]),
        (lambda path: Image.new("1", (10_000, 10_000)).save(path, "PNG"), ["10000x10000", "below 64 megapixels"]),
        (lambda path: Image.new("1", (20_000, 20_000)).save(path, "PNG"), ["larger than 64 megapixels", "scale it down"]),
        (lambda path: Image.new("I;16", (32, 32)).save(path, "PNG"), ["more than 8 bits", "mode I;16"]),
        (write_animation, ["animated (3 frames)", "save the frame"]),
    ],
    ids=["missing", "folder", "truncated", "empty", "text", "1 pixel", "strip", "100 MP", "400 MP", "16 bits", "GIF"],
)
def test_a_bad_image_in_calibration_data_is_refused_with_its_line(
    llava: Llava, absent: Path, tmp_path: Path, write: Callable[[Path], object], words: list[str]
) -> None:
    write(tmp_path / "picture.png")
    data = tmp_path / "pictures.jsonl"
    data.write_text(f'{{"prompt": "a"}}\n{json.dumps({"image": "picture.png", "prompt": "What is it?"})}\n')
    refused = run_export(llava(), absent, "--backend", "onnx", "--calib-data", data)
    assert_refused(refused, f"{data}:2: ", str(tmp_path / "picture.png"), *words)
