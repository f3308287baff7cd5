"""Reads calibration sets (JSONL of images, prompts and answers) and encodes prompts with the model's processor.

The chat template and the processor are the checkpoint's own, so that samples have the tokens and pixels that the model sees
in use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.checkpoint.samples import Placement, Sample
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.families import find_layout
from qvlm_export.checkpoints.files.hub import read_config
from qvlm_export.checkpoints.files.hub_errors import first_line
from qvlm_export.engines.config import ModelConfig
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.lines import Line, parse_line
from qvlm_export.inputs.processors import choose_chat_template, complete_processor, load_with_transformers
from qvlm_export.inputs.tiles import place_tiles, select_tiles, tile_counts

_SURROGATE = re.compile("[\ud800-\udfff]")
# What is compared before and after saving a processor.
_TURNS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "text": "What is it?", "images": 1},),
    ({"role": "user", "text": "  Two spaces,\nan é, 你好 \U0001f600 and </s>."},),
    (
        {"role": "user", "text": "What is it?", "images": 1},
        {"role": "assistant", "text": "A ring."},
        {"role": "user", "text": "Sure?"},
    ),
)
_FIRST_CHARACTERS = 16  # a token, of the beginning of a text that is measured; texts have about four


@dataclass(frozen=True)
class Entry:
    """A validated line. where: file and line number, for errors. image: the path to open, None without an image."""

    where: str
    line: Line
    image: Path | None


def default_calibration() -> Path:
    """Returns the path of the calibration set in the package: 64 questions about drawn scenes."""
    return Path(str(files("qvlm_export") / "inputs" / "calibration_set" / "scenes.jsonl"))


def load_processor(folder: Path) -> Any:
    """Returns the processor in `folder`, loaded by transformers or, for the authors' layout, built from the tokenizer.

    Raises UserError when there is no processor, a damaged one, or one that needs code of the checkpoint.
    """
    if (folder / "config.json").exists():
        make_processor = find_layout(read_config(folder)).make_processor
        if make_processor is not None:
            return make_processor(folder)
    processor = load_with_transformers(folder)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{folder}: holds no processor of pictures and text; add processor_config.json of the model")
    choose_chat_template(processor)
    return processor


def check_processor(processor: Any, config: ModelConfig, folder: Path) -> None:
    """Completes the processor by `config` where its files leave something out, and encodes a grey image with it.

    folder: begins error messages. Raises UserError when that fails or the result does not fit the model.
    """
    where = f"{folder}: its processor"
    if processor.tokenizer.eos_token_id is None:
        raise UserError(f"{where} names no end-of-sequence token; add tokenizer_config.json of the model")
    complete_processor(processor, config)
    grey = Image.new("RGB", (96, 64), (127, 127, 127))
    try:
        text = chat_text(processor, [{"role": "user", "text": "?", "images": 1}])
        encoded = None if text.count(processor.image_token) != 1 else encode_prompt(processor, config, text, [grey])
    except (*DAMAGED_FILE_ERRORS, TemplateError, UserError) as error:
        raise UserError(f"{where} fails ({first_line(error)}); download the processor files again") from error
    if encoded is None:
        raise UserError(
            f"{where} has a chat template that does not place {processor.image_token}; add chat_template.jinja of the model"
        )
    _check_encoded(encoded, config, where)


def check_saved_processor(processor: Any, config: ModelConfig, folder: Path) -> None:
    """Saves the processor as an export does and loads it again. Raises UserError when that changes prompts or pictures.

    folder: begins error messages.
    """
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    with TemporaryDirectory() as name:
        processor.save_pretrained(name)
        saved = load_processor(Path(name))
    for turns in _TURNS:
        text, saved_text = (_try_chat_text(one, list(turns)) for one in (processor, saved))
        images = [noise] * text.count(processor.image_token)
        before, after = (encode_prompt(one, config, text, images) for one in (processor, saved))
        same_pixels = np.array_equal(before.pixel_values, after.pixel_values)
        if text != saved_text or not np.array_equal(before.input_ids, after.input_ids) or not same_pixels:
            raise UserError(
                f"{folder}: its processor gives other prompts once transformers has saved and loaded it; save it with "
                "save_pretrained of the transformers release that is installed here, and check it"
            )


def _try_chat_text(processor: Any, turns: list[dict[str, Any]]) -> str:
    """Returns the text of a conversation, or why the chat template refuses it: not every template takes every one."""
    try:
        return chat_text(processor, turns)
    except (*DAMAGED_FILE_ERRORS, TemplateError) as error:
        return first_line(error)


def _check_encoded(encoded: Encoded, config: ModelConfig, where: str) -> None:
    """Raises UserError when pixels or tokens are not what a model with this configuration takes."""
    pixels, ids = encoded.pixel_values, encoded.input_ids
    side, hint = config.vision.image_size, "do processor and config.json belong together?"
    if len(pixels) and pixels.shape[1:] != (3, side, side):
        raise UserError(f"{where}: a picture becomes {list(pixels.shape[1:])}, the model takes {[3, side, side]}; {hint}")
    if not np.isfinite(pixels).all():
        raise UserError(f"{where}: a picture becomes NaN or infinite; check image_mean and image_std of the processor")
    count, expected = int((ids == config.image_token_id).sum()), len(pixels) * config.vision.tokens_per_image
    expected, what = (expected, "pictures") if encoded.placement is None else (len(encoded.placement), "tiles")
    if count != expected:
        raise UserError(f"{where}: {count} image tokens for {len(pixels)} {what}, the model takes {expected}; {hint}")
    if int(ids.max()) >= config.text.vocab_size:
        raise UserError(f"{where}: token {ids.max()} is beyond vocab_size {config.text.vocab_size}; {hint}")


def read_entries(path: Path, count: int | None, max_count: int) -> list[Entry]:
    """Returns the first `count` lines of a JSONL file, or up to `max_count` when `count` is None; blank lines are skipped.

    Raises UserError, naming file and line, when a line is not valid or there are fewer than `count`.
    """
    try:
        check_regular_file(path, "a JSONL file")
    except UserError as error:
        raise UserError(f"--calib-data {error}") from error
    try:
        text = path.read_text(encoding="utf-8-sig")  # programs on Windows write a byte order mark first
    except OSError as error:
        raise UserError(f"--calib-data {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--calib-data {path}: is not UTF-8 text; save it as UTF-8") from error
    entries: list[Entry] = []
    for number, raw_line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 in a prompt
        if raw_line.strip() and len(entries) < (count or max_count):
            where = f"{path}:{number}"
            line = parse_line(raw_line, where)
            entries.append(Entry(where, line, None if line.image is None else path.parent / line.image))
    if not entries:
        raise UserError(f"--calib-data {path}: holds no samples; give one JSON object a line with image and prompt")
    if count is not None and len(entries) < count:
        raise UserError(f"--samples {count}: {path} holds only {len(entries)}; ask for fewer or add lines")
    return entries


def encode_entries(entries: list[Entry], processor: Any, config: ModelConfig, max_length: int) -> list[Sample]:
    """Returns one sample for each entry, in order; see `encode_entry`."""
    return [encode_entry(entry, processor, config, max_length) for entry in entries]


def encode_entry(entry: Entry, processor: Any, config: ModelConfig, max_length: int) -> Sample:
    """Returns the entry as a sample that is ready for the model.

    Raises UserError for a bad image, and for more than `max_length` tokens of prompt and answer.
    """
    images = [] if entry.image is None else [open_image(entry.image, entry.where)]
    prompt = chat_text(processor, [{"role": "user", "text": entry.line.prompt, "images": len(images)}])
    sample = encode_answered(processor, config, prompt, entry.line.answer, images, where=entry.where, max_length=max_length)
    if len(sample.input_ids) > max_length:
        raise UserError(
            f"{entry.where}: is {len(sample.input_ids)} tokens long, --max-length is {max_length}; shorten it or raise the "
            "limit"
        )
    return sample


def encode_answered(
    processor: Any,
    config: ModelConfig,
    prompt: str,
    answer: str | None,
    images: list[Image.Image],
    *,
    where: str,
    max_length: int | None = None,
) -> Sample:
    """Returns the prompt, followed by the answer and the end-of-sequence token where there is an answer, as a sample.

    prompt: the whole text, as from `chat_text`. images: RGB. where: begins error messages. max_length: as for
    `encode_prompt`. Raises UserError when the text or its images do not fit the model.
    """
    encoded = encode_prompt(processor, config, prompt, images, where=where, max_length=max_length)
    ids, answer_start = encoded.input_ids, len(encoded.input_ids)
    if answer is not None:
        # Prompt and answer are encoded as one text, because tokenizers with a dummy prefix, such as Llama's, give the answer
        # other tokens when it is encoded alone. The answer starts behind the tokens that both texts begin with.
        text = f"{prompt} {answer}"
        whole = encode_prompt(processor, config, text, images, where=where, max_length=max_length).input_ids
        answer_start = int((ids == whole[:answer_start]).cumprod().sum()) if len(whole) >= answer_start else 0
        ids = np.append(whole, processor.tokenizer.eos_token_id)
    _check_encoded(replace(encoded, input_ids=ids), config, where)
    return Sample(ids, encoded.pixel_values, answer_start, encoded.placement)


@dataclass(frozen=True)
class Encoded:
    """A text with its images as model inputs.

    pixel_values: float32 [n, 3, R, R], n images or tiles of R x R pixels. input_ids: int64 [S], the image token repeated for
    each feature. placement: which features the image tokens get when images are cut into tiles; None without tiles.
    """

    pixel_values: np.ndarray
    input_ids: np.ndarray
    placement: Placement | None = None


def encode(
    processor: Any, text: str, images: list[Image.Image], where: str = "the prompt", continues: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel_values float32 [n, 3, R, R] and input_ids int64 [S]: `encode_prompt` for a model without tiles."""
    _check_text(processor, text, len(images), where)
    encoded = _run_processor(processor, text, images, continues)
    ids = np.asarray(encoded["input_ids"], np.int64)[0]
    if not images:
        return np.zeros((0, 3, 1, 1), np.float32), ids
    return np.asarray(encoded["pixel_values"], np.float32), ids


def encode_prompt(
    processor: Any,
    config: ModelConfig,
    text: str,
    images: list[Image.Image],
    *,
    where: str = "the prompt",
    continues: bool = False,
    max_length: int | None = None,
) -> Encoded:
    """Returns the text of one or more turns and its images as model inputs; for some models images are cut into tiles.

    text: holds the processor's image token once for each image. images: RGB. where: begins error messages. continues: the
    text continues a conversation, so that no BOS token is added. max_length: what the model takes, in tokens; a text that is
    far longer is refused without tokenizing all of it. Raises UserError for that, and when images and image tokens do not
    match.
    """
    if max_length is not None:
        _check_length(processor, text, max_length, where)
    if config.tiles is None or not images:
        return Encoded(*encode(processor, text, images, where, continues))
    _check_text(processor, text, len(images), where)
    encoded = _run_processor(processor, text, images, continues)
    sizes = [(image.height, image.width) for image in images]
    pixels = select_tiles(np.asarray(encoded["pixel_values"], np.float32), tile_counts(config, sizes))
    return Encoded(pixels, np.asarray(encoded["input_ids"], np.int64)[0], place_tiles(config, sizes))


def _run_processor(processor: Any, text: str, images: list[Image.Image], continues: bool) -> Any:
    tokenizer = processor.tokenizer
    # A chat template may write the BOS text itself; the tokenizer must not add it a second time.
    add_special_tokens = not continues and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    # Nested, as the images of one text: LLaVA-OneVision treats several images in one text differently from one in each text.
    nested = [images] if images else None
    return processor(images=nested, text=[text], return_tensors="np", add_special_tokens=add_special_tokens)


def _check_text(processor: Any, text: str, num_images: int, where: str) -> None:
    if _SURROGATE.search(text):
        raise UserError(f"{where}: holds half a surrogate pair, which is no text; write it as UTF-8")
    count, token = text.count(processor.image_token), processor.image_token
    if count != num_images:
        raise UserError(
            f"{where}: has {count} times {token} for {num_images} pictures; the chat template places them, "
            f"so leave {token} out"
        )


def _check_length(processor: Any, text: str, max_length: int, where: str) -> None:
    """Raises UserError when the beginning of a long text alone has more than twice the tokens that the model takes.

    The beginning is lengthened until that is so, or it is the whole text: no number of characters is too many by itself, as
    some tokenizers join any run of spaces, or of characters that they do not know, into one token. Twice, as a beginning
    that ends within a word may have some tokens more.
    """
    count = _FIRST_CHARACTERS * max_length
    while count < len(text):
        if len(processor.tokenizer(text[:count], add_special_tokens=False, verbose=False)["input_ids"]) > 2 * max_length:
            raise UserError(
                f"{where}: has {len(text)} characters, the first {count} of which are more than {2 * max_length} tokens; "
                f"the model takes {max_length}, so shorten it"
            )
        count *= 4
