"""Opens images as RGB, upright as their EXIF data says, and refuses those that would silently give wrong results.

Pixels are those of `load_image` of transformers, whatever the file's colour mode. Refused are files of several frames, and
modes of more than 8 bits a channel, which that conversion clips to white.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError

MIN_SIDE = 8  # pixels
MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 100  # processors scale the shorter side up, so that a thin strip would take gigabytes
_DEEP_MODES = ("I", "F")  # with their variants, such as I;16
_WITH_PREVIEWS = "MPO"  # what phones write: a JPEG followed by a preview or the second eye's view, which are no frames
# What makes an image upright, by the value of its EXIF orientation; 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ACCEPTED = "a path, a PIL image, or uint8 pixels [height, width, 3]"

# A picture as callers may give it: a path, a PIL image, or pixels as a numpy array or a torch tensor.
Picture = str | Path | Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | Sequence[Picture] | None


def open_image(path: Path, where: str) -> Image.Image:
    """Returns the image in RGB, fully decoded and upright. where: begins error messages.

    Raises UserError for an image that is missing, damaged, animated, tiny, huge, a thin strip, or of more than 8 bits a
    channel.
    """
    _check_file(path, where)
    try:
        # The size is checked before any pixel is decoded, so that Pillow's own warning would only repeat it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            _check_frames(image, f"{where}: {path}")
            return to_rgb(image, f"{where}: {path}")
    except FileNotFoundError as error:
        hint = "check the path; in JSONL it is relative to that file"
        raise UserError(f"{where}: there is no picture {path}; {hint}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: {path} is larger than {MAX_PIXELS // 10**6} megapixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: {path} is not a picture; give PNG, JPEG or WebP") from error
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(f"{where}: {path} cannot be read ({error}); save it again") from error


def open_pictures(pictures: Pictures, where: str = "picture") -> list[Image.Image]:
    """Returns one picture or several, as callers give them, as RGB images. where: begins error messages.

    Raises UserError for what is no picture, and for a picture that `open_image` would refuse.
    """
    if pictures is None:
        return []
    several = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    return [_open_picture(picture, f"{where} {number}") for number, picture in enumerate(several, 1)]


def _open_picture(picture: Any, where: str) -> Image.Image:
    if isinstance(picture, str | Path):
        return open_image(Path(picture).expanduser(), where)
    if isinstance(picture, Image.Image):
        return to_rgb(picture, where)
    if not isinstance(picture, np.ndarray | torch.Tensor):
        raise UserError(f"{where}: is of type {type(picture).__name__}; give {_ACCEPTED}, or a list of these")
    if str(picture.dtype).removeprefix("torch.") != "uint8":
        raise UserError(f"{where}: is an array of {picture.dtype}; give uint8 pixels from 0 to 255")
    pixels = np.asarray(picture if isinstance(picture, np.ndarray) else picture.detach().cpu())
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):  # channels first
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (3, 4)):
        raise UserError(f"{where}: is an array of shape {list(picture.shape)}; give {_ACCEPTED}, or a list of these")
    return to_rgb(Image.fromarray(pixels), where)


def to_rgb(image: Image.Image, where: str) -> Image.Image:
    """Returns a copy of an image in RGB, upright. where: begins error messages.

    Raises UserError for an image of more than 8 bits a channel, for sizes out of the limits, and for damaged pixels.
    """
    _check_size(image, where)
    if image.mode.startswith(_DEEP_MODES):
        raise UserError(f"{where} has more than 8 bits a channel (mode {image.mode}); save it with 8 bits")
    try:
        image.load()
        method = _UPRIGHT.get(_read_orientation(image))
        return (image if method is None else image.transpose(method)).convert("RGB")
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(f"{where} cannot be read ({error}); save it again") from error


def _read_orientation(image: Image.Image) -> Any:
    """Returns the EXIF orientation; 1, upright, when there is none, or none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED_FILE_ERRORS:
        return 1


def _check_file(path: Path, where: str) -> None:
    try:
        check_regular_file(path, "a picture")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_frames(image: Image.Image, what: str) -> None:
    frames = 1 if image.format == _WITH_PREVIEWS else getattr(image, "n_frames", 1)
    if frames > 1:
        raise UserError(f"{what} is animated ({frames} frames); save the frame you mean")


def _check_size(image: Image.Image, what: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{what} has {width}x{height} pixels; scale it below {MAX_PIXELS // 10**6} megapixels")
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{what} has {width}x{height} pixels, too small to show anything; leave it out")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UserError(f"{what} has {width}x{height} pixels, a strip of which nothing could be seen; leave it out")
