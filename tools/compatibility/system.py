"""Compatibility cases of names, values and interruptions on the tiny model, and of the Python API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

import qvlm_export
from qvlm_export.inference.answer import AnswerText
from qvlm_export.inputs.samples import default_calibration
from tools.compatibility.case import COMMANDS, Case, Outcome, run_command
from tools.compatibility.damage import NONE, TINY

FP16 = ("--backend", "onnx", "--scheme", "fp16")
PICTURE = default_calibration().parent / "images" / "000.png"


def _copy_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(TINY, folder / "model"))


def _set_weights(model: Path, end: str, value: float) -> None:
    """Sets all values of the tensors whose names end so."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(end):
            tensors[name][:] = value
    save_file(tensors, path, {"format": "pt"})


def _name(name: str) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        return Outcome(NONE, run_command("export", "--model", "tiny", *FP16, "--out", folder / name).in_words(folder)[:160])

    return run


def _half_surrogate(folder: Path) -> Outcome:
    model = _copy_tiny(folder)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "note": "\ud800"}), encoding="utf-8")
    return Outcome(NONE, run_command("export", "--model", model, *FP16, "--out", folder / "x.plan").in_words(folder))


def _pipe(folder: Path) -> Outcome:
    model = _copy_tiny(folder)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    return Outcome("not tried", run_command("export", "--model", model, *FP16, "--out", folder / "x.plan").in_words(folder))


def _large_norm(folder: Path) -> Outcome:
    model = _copy_tiny(folder)
    _set_weights(model, "layers.1.input_layernorm.weight", 65504)
    arguments = ("--backend", "onnx", "--scheme", "int8", "--samples", 2, "--out", folder / "x.plan")
    return Outcome(NONE, run_command("export", "--model", model, *arguments).in_words(folder))


def _late_nan(folder: Path) -> Outcome:
    model = _copy_tiny(folder)
    _set_weights(model, "layers.3.mlp.down_proj.weight", float("nan"))
    arguments = ("--backend", "onnx", "--samples", 2, "--out", folder / "x.plan", "--work-dir", folder / "work")
    words = run_command("export", "--model", model, *arguments).in_words(folder)
    left = sorted(path.name for path in folder.rglob("*") if not path.is_relative_to(model) and path != model)
    return Outcome(NONE, f"{words}; left over: {', '.join(left) or 'nothing'}")


def _two_names(folder: Path) -> Outcome:
    """Kills an export of `model`, and resumes it with the absolute path."""
    model = _copy_tiny(folder)
    arguments = ("--backend", "onnx", "--samples", "2", "--out", str(folder / "x.plan"))
    program = [sys.executable, "-c", COMMANDS.format(name="export"), "--model", "model", *arguments]
    with subprocess.Popen(program, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(folder.rglob("model-*.safetensors")):
            time.sleep(0.001)
        process.kill()
    resumed = run_command("export", "--model", model, *arguments, "--resume")
    return Outcome(NONE, f"resumed: {resumed.in_words(folder)}")


def _modes(folder: Path) -> Outcome:
    run_command("export", "--model", "tiny", "--backend", "onnx", "--samples", 2, "--out", folder / "x.plan")
    plain = folder / "plain"
    plain.touch()
    expected = plain.stat().st_mode
    others = [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_mode != expected]
    return Outcome(NONE, f"files with other rights than the umask gives: {', '.join(others) or 'none'}")


def _cut_character(_: Path) -> Outcome:
    from qvlm_export.inputs.samples import load_processor

    tokenizer = load_processor(TINY).tokenizer
    tokens = tokenizer("red 😀", add_special_tokens=False)["input_ids"][:-1]  # without the last byte
    answer = AnswerText(tokenizer)
    streamed = "".join(answer.add(token) for token in tokens) + answer.rest()
    return Outcome(repr(tokenizer.decode(tokens).lstrip()), repr(streamed))


def _python_pictures(folder: Path) -> Outcome:
    qvlm_export.export("tiny", folder / "x.plan", backend="onnx", scheme="fp16")
    pixels = np.asarray(Image.open(PICTURE).convert("RGB"))
    with qvlm_export.load(folder / "x.plan", "onnxruntime") as model:
        given = (str(PICTURE), PICTURE, Image.open(PICTURE), pixels, [pixels])
        answers = {model.generate("How many objects are there?", picture, max_new_tokens=4) for picture in given}
    return Outcome(NONE, f"{len(given)} forms, {len(answers)} answer: {', '.join(answers)}")


CASES: tuple[Case, ...] = (
    Case("`--out` with a name of 5,000 letters", _name("x" * 5000 + ".plan")),
    Case("`--out` with a name that is not UTF-8", _name(os.fsdecode(b"\xff.plan"))),
    Case("half a surrogate pair in config.json", _half_surrogate),
    Case("config.json is a pipe", _pipe),
    Case("int8 with a norm of 65504", _large_norm),
    Case("a weight of the last layer is NaN, with `--work-dir`", _late_nan),
    Case("killed, and resumed with the model's absolute path", _two_names),
    Case("rights of files that are written", _modes),
    Case("an answer that ends within a character, streamed", _cut_character),
    Case("from Python: path, picture, pixels, alone and in a list", _python_pictures),
)
