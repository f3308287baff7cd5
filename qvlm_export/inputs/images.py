"""Opens image files as RGB, and refuses those that would silently give wrong results, such as CMYK or animations."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError

MIN_SIDE = 8  # pixels
MAX_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 100  # processors scale the shorter side up, so that a thin strip would take gigabytes
_SUPPORTED_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}


def open_image(path: Path, where: str) -> Image.Image:
    """Returns the image in RGB, fully decoded. where: begins error messages.

    Raises UserError for an image that is missing, damaged, animated, tiny, huge, a thin strip, or of an unusual colour mode
    such as CMYK.
    """
    try:
        # The size is checked below, before any pixel is decoded, so that Pillow's own warning would only repeat it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            _check_size_and_mode(image, f"{where}: {path}")
            image.load()
            return image.convert("RGB")
    except FileNotFoundError as error:
        hint = "check the path; in JSONL it is relative to that file"
        raise UserError(f"{where}: there is no picture {path}; {hint}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: {path} is larger than {MAX_PIXELS // 10**6} megapixels; scale it down") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: {path} is not a picture; give PNG, JPEG or WebP") from error
    except DAMAGED_FILE_ERRORS as error:
        raise UserError(f"{where}: {path} cannot be read ({error}); save it again") from error


def _check_size_and_mode(image: Image.Image, what: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{what} has {width}x{height} pixels; scale it below {MAX_PIXELS // 10**6} megapixels")
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{what} has {width}x{height} pixels, too small to show anything; leave it out")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UserError(f"{what} has {width}x{height} pixels, a strip of which nothing could be seen; leave it out")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise UserError(f"{what} is animated ({frames} frames); save the frame you mean")
    if image.mode not in _SUPPORTED_MODES:
        raise UserError(f"{what} has colour mode {image.mode}; convert it to RGB")
