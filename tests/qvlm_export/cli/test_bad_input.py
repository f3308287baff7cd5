"""Bad arguments and output paths: one line on stderr with cause and remedy, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import (
    assert_refused,
    copy_checkpoint,
    export_onnx,
    export_to,
    read_files,
    run_export,
    set_weight,
    write_calibration,
)
from safetensors import SafetensorError
from typer.testing import CliRunner

import qvlm_export.engines.backend
from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.export import app
from qvlm_export.pipeline import stages
from qvlm_export.pipeline.preparation.prepare import ExportOptions, prepare_export

Llava = Callable[..., Path]
SCRIPT = Path(sys.executable).with_name("qvlm-export")
UP_PROJ = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(llava: Llava, tmp_path: Path) -> Path:
    """An intact checkpoint that may be damaged."""
    return copy_checkpoint(llava(), tmp_path / "checkpoint")


def run_real_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the installed script in a process of its own."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


# The command line


def test_real_command_refuses_missing_model(absent: Path) -> None:
    done = run_real_command("--model", "./no-such-folder", "--out", absent)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --model ./no-such-folder: no such folder, and neither an alias (see --list-models) nor a Hugging Face id\n"
    )


def test_real_command_refuses_damaged_weights(checkpoint: Path, absent: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = run_real_command("--model", checkpoint, "--out", absent, "--calib-data", write_calibration(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {weights}: not a readable safetensors file")
    assert done.stderr.endswith("download it again\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing option '--model'"]),
        (["--model", "x"], ["Missing option '--out'"]),
        (["--model", "x", "--out", "x.plan", "--samples", "0"], ["--samples", "1"]),
        (["--model", "x", "--out", "x.plan", "--samples", "many"], ["--samples", "integer"]),
        (["--model", "x", "--out", "x.plan", "--max-length", "1"], ["--max-length", "greater than or equal to 2"]),
        (["--model", "x", "--out", "x.plan", "--max-batch", "0"], ["--max-batch", "1"]),
        (["--model", "x", "--out", "x.plan", "--colour", "red"], ["No such option", "--colour"]),
        (["--model", "x", "--out", "x.plan", "more"], ["unexpected extra argument", "more"]),
    ],
)
def test_unusable_command_line(arguments: list[str], words: list[str]) -> None:
    assert_refused(CliRunner().invoke(app, arguments), *words, "--help")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "int3"], ["--scheme int3", "int4, int8, fp16"]),
        (["--scheme", "sim-w4a8", "--target", "sm89"], ["--target sm89", "builds no engine"]),
        (["--backend", "tensorflow"], ["--backend tensorflow", "auto, tensorrt, tensorrt-rtx, onnx"]),
        (["--backend", "onnx", "--target", "sm89"], ["--target sm89", "builds no engine"]),
        (["--backend", "tensorrt-rtx", "--target", "sm42"], ["--target sm42", "sm80, sm86, sm89"]),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--target", "sm75"], ["--target sm75", "no INT4", "int8"]),
        (
            ["--backend", "tensorrt-rtx", "--target", "sm75", "--scheme", "int8", "--dtype", "bfloat16"],
            ["--target sm75", "no bfloat16", "leave --dtype out"],
        ),
        (["--calib-data", "/no/such.jsonl"], ["/no/such.jsonl", "No such file"]),
        (["--recipe", "/no/such.yaml"], ["/no/such.yaml", "No such file"]),
        (["--max-length", "36"], ["--max-length 36", "37 (one image and a token) to 512 tokens"]),
        (["--max-length", "513"], ["--max-length 513", "to 512 tokens"]),
        (["--max-length", "40"], ["calibration.jsonl:1", "tokens long, --max-length is 40", "raise the limit"]),
        (["--samples", "3"], ["--samples 3", "holds only 2", "add lines"]),
    ],
)
def test_bad_option(llava: Llava, absent: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(export_onnx(llava(), absent, *arguments), *words)


def test_int8_may_target_a_gpu_without_int4(llava: Llava, absent: Path) -> None:
    result = export_onnx(
        llava(), absent, "--backend", "tensorrt-rtx", "--target", "sm75", "--scheme", "int8", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["targets"] == ["sm75"]


def test_missing_backend_is_refused(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qvlm_export.engines.backend, "_installed", lambda _: False)
    assert_refused(export_onnx(llava(), absent, "--backend", "auto"), "no TensorRT is installed", "pip install", "onnx")
    assert_refused(export_onnx(llava(), absent, "--backend", "tensorrt-rtx"), "not installed", "pip install 'tensorrt-rtx")
    assert_refused(export_onnx(llava(), absent, "--backend", "tensorrt"), "not installed", "pip install ", "tensorrt")


def test_full_tensorrt_without_gpu(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qvlm_export.engines.backend, "_installed", lambda _: True)
    monkeypatch.setattr(qvlm_export.engines.backend, "gpu_present", lambda: False)
    assert_refused(export_onnx(llava(), absent, "--backend", "tensorrt"), "needs an NVIDIA GPU", "--backend tensorrt-rtx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_calibrating_on_a_missing_gpu_is_refused(llava: Llava, absent: Path) -> None:
    assert_refused(export_onnx(llava(), absent, "--device", "cuda"), "--device cuda", "no GPU", "--device cpu")


def test_gpu_with_too_little_memory(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 2**33))
    words = ("--device cuda", "GiB of GPU memory are needed and 0.5 GiB are free", "--samples")
    assert_refused(export_onnx(llava(), absent, "--device", "cuda"), *words)


def test_python_callers_get_the_same_refusals(llava: Llava, tmp_path: Path) -> None:
    for options, words in (({"samples": 0}, "--samples 0"), ({"max_batch": -1}, "--max-batch -1")):
        with pytest.raises(UserError, match=f"{words}: must be at least 1"):
            prepare_export(ExportOptions(str(llava()), tmp_path / "x.plan", backend="onnx", **options))


# Where to write


@pytest.mark.parametrize("name", ["engine", "engine.onnx", ".plan", "engine.plan.gz"])
def test_out_that_is_no_plan_path_is_refused(llava: Llava, tmp_path: Path, name: str) -> None:
    assert_refused(run_export(llava(), tmp_path / name, "--backend", "onnx"), "--out", "must end in .plan")
    assert list(tmp_path.iterdir()) == []


def test_out_is_a_folder(llava: Llava, tmp_path: Path) -> None:
    (tmp_path / "engine.plan").mkdir()
    assert_refused(run_export(llava(), tmp_path / "engine.plan", "--backend", "onnx"), "is a folder", "name a file")


def test_out_has_a_file_for_a_parent(llava: Llava, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "engine.plan", tmp_path / "file" / "deeper" / "engine.plan"):
        assert_refused(run_export(llava(), out, "--backend", "onnx"), str(out), "Not a directory", "choose another")
    assert read_files(tmp_path) == {"file": b"mine"}


def test_out_cannot_be_made_in_proc(llava: Llava) -> None:
    """Not even root can write to /proc."""
    assert_refused(run_export(llava(), "/proc/new/engine.plan", "--backend", "onnx"), "cannot be written")


def test_out_name_that_is_too_long_is_refused(llava: Llava, tmp_path: Path) -> None:
    assert_refused(run_export(llava(), tmp_path / f"{'x' * 240}.plan", "--backend", "onnx"), "too long", "shorten")
    assert_refused(run_export(llava(), tmp_path / ("x" * 300) / "x.plan", "--backend", "onnx"), "cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_out_that_would_replace_a_foreign_file_is_refused(checkpoint: Path) -> None:
    """X.plan comes with X.json, so config.plan must not replace the config.json of a checkpoint."""
    before = read_files(checkpoint)
    refused = run_export(checkpoint, checkpoint / "config.plan", "--backend", "onnx")
    assert_refused(refused, "config.json", "did not write", "choose another name")
    assert read_files(checkpoint) == before


@pytest.mark.parametrize("foreign", ["photo.jpg", "config.json"])
def test_work_dir_with_foreign_files_is_refused(llava: Llava, absent: Path, tmp_path: Path, foreign: str) -> None:
    calibrated = tmp_path / "work" / "calibrated"
    calibrated.mkdir(parents=True)
    (calibrated / foreign).write_text("mine")
    refused = export_onnx(llava(), absent, "--work-dir", tmp_path / "work")
    assert_refused(refused, "--work-dir", str(calibrated), "did not write", "choose another")
    assert read_files(tmp_path / "work") == {f"calibrated/{foreign}": b"mine"}


def test_work_dir_is_a_file(llava: Llava, absent: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    assert_refused(export_onnx(llava(), absent, "--work-dir", tmp_path / "work"), "--work-dir", "Not a directory")


def test_disk_too_small(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40 - 4096, free=4096))
    assert_refused(export_onnx(llava(), absent), str(absent.parent), "are needed", "0.0 GiB are free", "another disk")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_fills_up_while_writing(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(stages, "write_graph", fail)
    out = tmp_path / "new" / "x.plan"
    assert_refused(export_onnx(llava(), out), str(out.parent), "the disk is full", "are needed", "free some", "--resume")
    assert [path.name for path in out.parent.iterdir()] == [".x.work"]


def test_disk_is_full_before_anything_is_finished(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "write_graph", fail)
    result = export_onnx(llava(), absent, "--scheme", "fp16")
    assert_refused(result, str(absent.parent), "the disk is full", "free some")
    assert "--resume" not in result.stderr


def test_numpy_error_without_errno_on_a_full_disk(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's tofile raises an OSError without errno; the free space shows that the disk is full."""

    def fail(*_: object) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40, free=0))
        raise OSError("131072 requested and 7936 written")

    monkeypatch.setattr(stages, "write_graph", fail)
    assert_refused(export_onnx(llava(), tmp_path / "new" / "x.plan"), str(tmp_path / "new"), "the disk is full")


def test_interrupted_export_can_be_resumed(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "write_graph", interrupt)
    result = export_onnx(llava(), tmp_path / "new" / "x.plan")
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted; what was finished is kept in ")
    assert result.stderr.endswith("the same command with --resume continues from there\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".x.work"]


def test_interrupted_before_anything_is_finished_leaves_nothing(
    llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "write_graph", interrupt)
    result = export_onnx(llava(), absent, "--scheme", "fp16")
    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing was written\n")


@pytest.mark.parametrize("scheme", ["int4", "fp16"])
def test_failed_export_leaves_the_older_one_alone(checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    folder = tmp_path / "engines"
    folder.mkdir()
    data = write_calibration(tmp_path)
    export_to(checkpoint, folder / "x.plan", "--backend", "onnx", "--calib-data", data)
    before = read_files(folder)
    set_weight(checkpoint, UP_PROJ, np.nan)
    failed = run_export(checkpoint, folder / "x.plan", "--backend", "onnx", "--calib-data", data, "--scheme", scheme)
    assert_refused(failed, UP_PROJ, "NaN")
    assert read_files(folder) == before
