"""Compatibility cases of pictures, prompts, processors and answers, on the tiny model that ships with the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors.numpy import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.image_utils import load_image

from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS, UserError
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.checkpoints.files.hub import find_checkpoint
from qvlm_export.checkpoints.files.hub_errors import first_line
from qvlm_export.evaluation.eval_model import find_eval_model, open_eval_model
from qvlm_export.evaluation.predictions import lock_predictions
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.samples import check_processor, default_calibration, encode_prompt, load_processor, read_entries
from tools.compatibility.case import Case, Outcome

NONE = "–"  # transformers has no such step
QUESTION = [{"role": "user", "text": "How many objects are there?", "images": 1}]
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]}]
FOR_TEXTS = "{% for message in messages %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}{% endfor %}"


def _attempt(run: Callable[[], object], folder: Path) -> str:
    """Returns what a function returns, or its error in one line, without the path of `folder`."""
    try:
        return str(run())
    except UserError as error:
        return f"refused: {error}".replace(f"{folder}/", "")
    except DAMAGED_FILE_ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)[:120]}".replace(f"{folder}/", "")


def _noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).convert(mode)


def _describe(image: Image.Image) -> str:
    return f"{image.width}x{image.height} {image.mode}, pixels {zlib.crc32(image.tobytes()):08x}"


def _make_picture_case(title: str, name: str, write: Callable[[Path], object]) -> Case:
    def run(folder: Path) -> Outcome:
        path = folder / name
        write(path)
        transformers = _attempt(lambda: _describe(load_image(str(path))), folder)
        return Outcome(transformers, _attempt(lambda: _describe(open_image(path, "--image")), folder))

    return Case(title, run)


def _save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _noise().save(path, exif=exif)


def _save_frames(path: Path) -> None:
    _noise().save(path, save_all=True, append_images=[_noise("L")])


def _save_deep(path: Path) -> None:
    Image.fromarray(np.linspace(1000, 60_000, 24 * 16).astype(np.uint16).reshape(16, 24)).save(path)


def _copy_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(find_checkpoint("tiny").folder, folder / "checkpoint"))


def _edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def _ask_transformers(checkpoint: Path, **settings: Any) -> str:
    """Returns the answer without the token that ends it."""
    processor, model = AutoProcessor.from_pretrained(checkpoint), LlavaForConditionalGeneration.from_pretrained(checkpoint)
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inputs = processor(images=[load_image(str(_picture()))], text=text, return_tensors="pt")
    with torch.no_grad():
        ids = model.float().generate(**inputs, max_new_tokens=16, do_sample=False, **settings)
    ends, new = np.atleast_1d(model.generation_config.eos_token_id), ids[0, inputs["input_ids"].shape[1] :].numpy()
    answer: str = processor.decode(new[~np.isin(new, ends)], skip_special_tokens=True)
    return f'"{answer.strip()}"'


def _ask_here(checkpoint: Path, **settings: Any) -> str:
    with open_eval_model(find_eval_model(str(checkpoint), "float"), device="cpu") as model:
        return f'"{model.generate(str(QUESTION[0]["text"]), _picture(), max_new_tokens=16, **settings)}"'


def _picture() -> Path:
    return default_calibration().parent / "images" / "000.png"


def _run_end_tokens(folder: Path) -> Outcome:
    checkpoint = _copy_tiny(folder)
    end = load_processor(checkpoint).tokenizer.encode("ASSISTANT: 2")[-1]
    _edit_json(checkpoint / "generation_config.json", eos_token_id=[2, end])
    return Outcome(_attempt(lambda: _ask_transformers(checkpoint), folder), _attempt(lambda: _ask_here(checkpoint), folder))


def _run_penalty(folder: Path) -> Outcome:
    checkpoint, settings = _copy_tiny(folder), {"repetition_penalty": 1e-300}
    return Outcome(
        _attempt(lambda: _ask_transformers(checkpoint, **settings), folder),
        _attempt(lambda: _ask_here(checkpoint, **settings), folder),
    )


def _run_overflow(folder: Path) -> Outcome:
    checkpoint = _copy_tiny(folder)
    tensors = {name: array.astype(np.float32) for name, array in load_file(checkpoint / "model.safetensors").items()}
    (norm,) = (name for name in tensors if name.endswith("model.norm.weight"))
    tensors[norm] = np.full_like(tensors[norm], 3e38)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return Outcome(_attempt(lambda: _ask_transformers(checkpoint), folder), _attempt(lambda: _ask_here(checkpoint), folder))


def _run_text_template(folder: Path) -> Outcome:
    checkpoint = _copy_tiny(folder)
    (checkpoint / "chat_template.jinja").unlink()
    _edit_json(checkpoint / "tokenizer_config.json", chat_template=FOR_TEXTS)
    processor = AutoProcessor.from_pretrained(checkpoint)
    transformers = _attempt(lambda: repr(processor.apply_chat_template(MESSAGES, add_generation_prompt=True)), folder)
    return Outcome(transformers, _attempt(lambda: repr(chat_text(load_processor(checkpoint), QUESTION)), folder))


def _run_no_patch_size(folder: Path) -> Outcome:
    checkpoint = _copy_tiny(folder)
    _edit_json(checkpoint / "processor_config.json", patch_size=None, num_additional_image_tokens=None)
    config = open_checkpoint(str(checkpoint)).config

    def encode_here() -> str:
        processor = load_processor(checkpoint)
        check_processor(processor, config, checkpoint)
        ids = encode_prompt(processor, config, chat_text(processor, QUESTION), [open_image(_picture(), "")]).input_ids
        return f"{int((ids == config.image_token_id).sum())} image tokens"

    return Outcome(_attempt(lambda: _ask_transformers(checkpoint), folder), _attempt(encode_here, folder))


def _run_code(folder: Path) -> Outcome:
    checkpoint, made = _copy_tiny(folder), folder / "made"
    (checkpoint / "own.py").write_text(f"open({str(made)!r}, 'w').close()\nclass Own: pass\n", encoding="utf-8")
    changes = {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}
    _edit_json(checkpoint / "processor_config.json", **changes)
    program = [sys.executable, "-c", "import sys, transformers as t; t.AutoProcessor.from_pretrained(sys.argv[1])"]
    process = subprocess.run([*program, checkpoint], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    asked = "asks on the terminal; " if "[y/N]" in process.stdout + process.stderr else ""
    ours = _attempt(lambda: load_processor(checkpoint), folder)
    return Outcome(
        f"{asked}{process.stderr.strip().splitlines()[-1][:60]}…", f"{'run! ' if made.exists() else 'not run; '}{ours}"
    )


def _run_pipe(folder: Path) -> Outcome:
    os.mkfifo(folder / "a.png")
    transformers = _attempt(lambda: load_image(str(folder / "a.png")), folder)
    return Outcome(transformers, _attempt(lambda: open_image(folder / "a.png", "--image"), folder))


def _run_long_prompt(folder: Path) -> Outcome:
    processor, config, text = load_processor(find_checkpoint("tiny").folder), open_checkpoint("tiny").config, "word " * 10**6
    ours = _attempt(lambda: encode_prompt(processor, config, text, [], max_length=512), folder)
    return Outcome(f"{len(processor(text=text)['input_ids'][0])} tokens", ours)


def _run_two_evaluations(folder: Path) -> Outcome:
    def run_second() -> str:
        with lock_predictions(folder / "p.jsonl"), lock_predictions(folder / "p.jsonl"):
            return "both write"

    return Outcome(NONE, _attempt(run_second, folder).replace(str(os.getpid()), "N"))


def _make_line_case(title: str, **line: object) -> Case:
    def run(folder: Path) -> Outcome:
        path = folder / "a.jsonl"
        path.write_text(json.dumps({"prompt": "What is it?", **line}), encoding="utf-8")
        read = _attempt(lambda: f"picture {read_entries(path, None, 1)[0].line.image}", folder)
        return Outcome(NONE, read)

    return Case(title, run)


CASES = (
    *(
        _make_picture_case(f"EXIF orientation 6, {form}", f"a.{form.lower()}", _save_turned)
        for form in ("JPG", "PNG", "WEBP", "TIF")
    ),
    _make_picture_case("MPO, as phones write it", "a.mpo", _save_frames),
    _make_picture_case("CMYK JPEG", "a.jpg", lambda path: _noise("CMYK").save(path)),
    _make_picture_case("grey PNG of 16 bits", "a.png", _save_deep),
    _make_picture_case("GIF of two frames", "a.gif", _save_frames),
    Case("a pipe as a picture", _run_pipe),
    Case("a second end token in generation_config.json, with which the answer 2 begins", _run_end_tokens),
    Case("repetition_penalty 1e-300", _run_penalty),
    Case("logits that overflow", _run_overflow),
    Case("chat template for texts in the tokenizer, none in the processor", _run_text_template),
    Case("processor without patch_size", _run_no_patch_size),
    Case("processor whose class is code of the checkpoint", _run_code),
    Case("a prompt of 5 MB", _run_long_prompt),
    Case("a second qvlm-eval on the same file of predictions", _run_two_evaluations),
    _make_line_case("calibration line with `images`", images=["a.png"]),
    _make_line_case("calibration line with `image_path`", image_path="a.png"),
    _make_line_case("calibration line with `img` and another `image`", img="a.png", image="b.png"),
    _make_line_case("calibration line with `photo_file`", photo_file="a.png"),
)
