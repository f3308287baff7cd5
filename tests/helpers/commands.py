"""Runs the commands in this process and asserts what a refusal looks like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from qvlm_export.cli.export import app as export_app
from qvlm_export.cli.run import app as run_app
from qvlm_export.inputs.samples import default_calibration

Edit = Callable[[dict[str, Any]], object]
PICTURE = default_calibration().parent / "images" / "000.png"
ASK = ("--prompt", "What color is the ring?", "--image", PICTURE, "--max-new-tokens", "6")  # for qvlm-run
ANY_ACCURACY = ("--min-agreement", "0", "--max-kl", "100")  # for qvlm-validate of random models, whose logits are flat
RUNTIME = "runtime: onnxruntime on CPU (this export has no engine)\n"  # what qvlm-run says of an export without engines


def run_export(model: Path | str, out: Path | str, *arguments: object) -> Result:
    """`qvlm-export --model model --out out arguments…`"""
    return CliRunner().invoke(export_app, ["--model", str(model), "--out", str(out), *map(str, arguments)])


def run_model(plan: Path, *arguments: object) -> Result:
    """`qvlm-run plan arguments…`"""
    return CliRunner().invoke(run_app, [str(plan), *map(str, arguments)])


def export_to(model: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """Runs an export that must succeed, with --json; returns the JSON on stdout."""
    result = run_export(model, out, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def assert_refused(result: Result, *words: str) -> None:
    """Asserts exit code 2, a single line on stderr that contains all of `words`, and nothing on stdout."""
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    missing = [word for word in words if word not in result.stderr]
    assert not missing, f"{missing} not in: {result.stderr}"


def write_calibration(folder: Path, count: int = 2) -> Path:
    """Writes a JSONL calibration set of `count` questions about an image of the package; returns its path."""
    path = folder / "calibration.jsonl"
    line = {"image": str(PICTURE), "prompt": "How many objects are there?", "answer": "2"}
    path.write_text(f"{json.dumps(line)}\n" * count, encoding="utf-8")
    return path


def copy_checkpoint(source: Path, folder: Path, config: Edit | None = None) -> Path:
    """Makes a copy of the checkpoint that a test may change. config: edits the content of config.json in place."""
    shutil.copytree(source, folder)
    if config is not None:
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        config(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """Content of every file under `folder`, including hidden ones, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export_onnx(model: Path | str, out: Path, *arguments: object) -> Result:
    """Runs `qvlm-export` without engines on two samples, which are written beside the folder of `out`."""
    data = write_calibration(out.parent.parent)
    return run_export(model, out, "--backend", "onnx", "--calib-data", data, *arguments)


def set_weight(checkpoint: Path, name: str, value: float, dtype: str = "float16") -> None:
    """Sets one element of the tensor `name` and stores all tensors as `dtype`."""
    tensors = {key: array.astype(dtype) for key, array in load_file(checkpoint / "model.safetensors").items()}
    tensors[name].reshape(-1)[5] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def put(section: str, key: str, value: object) -> Edit:
    """An edit of config.json that sets `key` in `section`, or at the top level if the section is empty."""
    return lambda config: (config[section] if section else config).update({key: value})
