"""Calibration samples: JSONL of pictures, prompts and answers, through the model's own processor and chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from qvlm_export.calibrate.checkpoint.samples import Placement, Sample
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.families import find_layout
from qvlm_export.checkpoints.hub import read_config
from qvlm_export.engines.config import ModelConfig
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.processors import processor_class
from qvlm_export.inputs.tiles import place_tiles, select_tiles, tile_counts


class Line(BaseModel):
    """One line of the JSONL."""

    model_config = ConfigDict(extra="ignore", strict=True)
    image: str | None = None
    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Entry:
    """A checked line. `where` names it in errors."""

    where: str
    line: Line
    image: Path | None


def default_calibration() -> Path:
    """The small set that ships with the package: drawn scenes, 64 questions."""
    return Path(str(files("qvlm_export") / "inputs" / "calibration_set" / "scenes.jsonl"))


def load_processor(folder: Path) -> Any:
    """The processor in a folder (transformers' own), or made of what its layout has instead.

    Raises UserError when the folder has none, or a damaged one.
    """
    if (folder / "config.json").exists():
        make = find_layout(read_config(folder)).make_processor
        if make is not None:
            return make(folder)
    try:
        processor = processor_class(folder).from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged tokenizer.json
        raise UserError(
            f"{folder}: its processor cannot be loaded ({_first_line(error)}); add the tokenizer and processor files"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{folder}: holds no processor of pictures and text; add processor_config.json of the model")
    return processor


def check_processor(processor: Any, config: ModelConfig, folder: Path) -> None:
    """Runs a grey picture through the processor. Raises UserError when it fails or does not fit the model."""
    where = f"{folder}: its processor"
    if processor.tokenizer.eos_token_id is None:
        raise UserError(f"{where} names no end-of-sequence token; add tokenizer_config.json of the model")
    grey = Image.new("RGB", (96, 64), (127, 127, 127))
    try:
        text = chat_text(processor, [{"role": "user", "text": "?", "images": 1}])
        encoded = None if text.count(processor.image_token) != 1 else encode_pictures(processor, config, text, [grey])
    except (*DAMAGED_FILE_ERRORS, TemplateError, UserError) as error:
        raise UserError(f"{where} fails ({_first_line(error)}); download the processor files again") from error
    if encoded is None:
        raise UserError(f"{where} has a chat template that does not place {processor.image_token}; download it again")
    _check_encoded(encoded, config, where)


def _check_encoded(encoded: Encoded, config: ModelConfig, where: str) -> None:
    """Raises UserError where it is not what this model takes."""
    pixels, ids = encoded.pixel_values, encoded.input_ids
    side, together = config.vision.image_size, "do processor and config.json belong together?"
    if len(pixels) and pixels.shape[1:] != (3, side, side):
        raise UserError(
            f"{where}: a picture becomes {list(pixels.shape[1:])}, the model takes {[3, side, side]}; {together}"
        )
    if not np.isfinite(pixels).all():
        raise UserError(f"{where}: a picture becomes NaN or infinite; check image_mean and image_std of the processor")
    found, wanted = int((ids == config.image_token_id).sum()), len(pixels) * config.vision.tokens_per_image
    wanted, what = (wanted, "pictures") if encoded.placement is None else (len(encoded.placement), "tiles")
    if found != wanted:
        raise UserError(f"{where}: {found} image tokens for {len(pixels)} {what}, the model takes {wanted}; {together}")
    if int(ids.max()) >= config.text.vocab_size:
        raise UserError(f"{where}: token {ids.max()} is beyond vocab_size {config.text.vocab_size}; {together}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def read_entries(path: Path, wanted: int | None, at_most: int) -> list[Entry]:
    """The first `wanted` lines, or up to `at_most` when that is None. Raises UserError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows programs begin UTF-8 files with a byte order mark
    except OSError as error:
        raise UserError(f"--calib-data {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--calib-data {path}: is not UTF-8 text; save it as UTF-8") from error
    entries: list[Entry] = []
    for number, raw in enumerate(text.split("\n"), start=1):  # splitlines would also break at U+2028 inside a prompt
        if raw.strip() and len(entries) < (wanted or at_most):
            entries.append(_entry(path, number, raw))
    if not entries:
        raise UserError(f"--calib-data {path}: holds no samples; give one JSON object a line with image and prompt")
    if wanted is not None and len(entries) < wanted:
        raise UserError(f"--samples {wanted}: {path} holds only {len(entries)}; ask for fewer or add lines")
    return entries


def _entry(path: Path, number: int, raw: str) -> Entry:
    where = f"{path}:{number}"
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({_first_line(error)}); write one JSON object a line") from error
    try:
        line = Line.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the line"
        raise UserError(f'{where}: {field}: {first["msg"]}; write {{"image": path, "prompt": text}}') from error
    return Entry(where, line, None if line.image is None else path.parent / line.image)


def encode_entries(entries: list[Entry], processor: Any, config: ModelConfig, max_length: int) -> list[Sample]:
    """Samples ready for the model. Raises UserError for a bad picture or a prompt beyond `max_length` tokens."""
    return [encode_entry(entry, processor, config, max_length) for entry in entries]


def encode_entry(entry: Entry, processor: Any, config: ModelConfig, max_length: int) -> Sample:
    images = [] if entry.image is None else [open_image(entry.image, entry.where)]
    prompt = chat_text(processor, [{"role": "user", "text": entry.line.prompt, "images": len(images)}])
    sample = encode_answered(processor, config, prompt, entry.line.answer, images, where=entry.where)
    if len(sample.input_ids) > max_length:
        raise UserError(
            f"{entry.where}: is {len(sample.input_ids)} tokens long, --max-length is {max_length}; shorten it or raise the "
            "limit"
        )
    return sample


def encode_answered(
    processor: Any, config: ModelConfig, prompt: str, answer: str | None, images: list[Image.Image], *, where: str
) -> Sample:
    """A whole prompt with the answer behind it, and the end token behind that. Raises UserError, begun with `where`."""
    encoded = encode_pictures(processor, config, prompt, images, where=where)
    ids, start = encoded.input_ids, len(encoded.input_ids)
    if answer is not None:
        # Encoded as one text: tokenizers with a dummy prefix, as Llama's, give a text of its own other tokens.
        whole = encode_pictures(processor, config, f"{prompt} {answer}", images, where=where).input_ids
        start = int((ids == whole[:start]).cumprod().sum()) if len(whole) >= start else 0
        ids = np.append(whole, processor.tokenizer.eos_token_id)
    _check_encoded(replace(encoded, input_ids=ids), config, where)
    return Sample(ids, encoded.pixel_values, start, encoded.placement)


@dataclass(frozen=True)
class Encoded:
    """One text with its pictures. pixel_values: float32 [n, 3, R, R] of n pictures or tiles; input_ids: int64 [S] with every
    image token; placement: of tiles, None without them.
    """

    pixel_values: np.ndarray
    input_ids: np.ndarray
    placement: Placement | None = None


def encode(
    processor: Any, text: str, images: list[Image.Image], where: str = "the prompt", continues: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_pictures` for a model without tiles: pixel_values and input_ids."""
    _check_text(processor, text, len(images), where)
    encoded = _processed(processor, text, images, continues)
    ids = np.asarray(encoded["input_ids"], np.int64)[0]
    if not images:
        return np.zeros((0, 3, 1, 1), np.float32), ids
    return np.asarray(encoded["pixel_values"], np.float32), ids


def encode_pictures(
    processor: Any,
    config: ModelConfig,
    text: str,
    images: list[Image.Image],
    *,
    where: str = "the prompt",
    continues: bool = False,
) -> Encoded:
    """A turn, or several, as the model takes it: one image token a patch, pictures cut into tiles where it wants them.

    The template may already begin with the tokenizer's BOS text, which must then not be added twice; nor is it when the
    text `continues` a conversation. Raises UserError, begun with `where`, when the text does not hold one image token for
    each picture.
    """
    if config.tiles is None or not images:
        return Encoded(*encode(processor, text, images, where, continues))
    _check_text(processor, text, len(images), where)
    encoded = _processed(processor, text, images, continues)
    sizes = [(image.height, image.width) for image in images]
    pixels = select_tiles(np.asarray(encoded["pixel_values"], np.float32), tile_counts(config, sizes))
    return Encoded(pixels, np.asarray(encoded["input_ids"], np.int64)[0], place_tiles(config, sizes))


def _processed(processor: Any, text: str, images: list[Image.Image], continues: bool) -> Any:
    tokenizer = processor.tokenizer
    add_special = not continues and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    # Nested, as pictures of one text: LLaVA-OneVision treats several in a text otherwise than one in each of several.
    given = [images] if images else None
    return processor(images=given, text=[text], return_tensors="np", add_special_tokens=add_special)


def _check_text(processor: Any, text: str, images: int, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: holds half a surrogate pair, which is no text; write it as UTF-8")
    found, token = text.count(processor.image_token), processor.image_token
    if found != images:
        raise UserError(
            f"{where}: has {found} times {token} for {images} pictures; the chat template places them, so leave {token} out"
        )
