"""Interrupted exports: resumed, they give the same bytes as an uninterrupted one, or a line that says why they cannot."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
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
from kills import run_and_kill

from qvlm_export.engines.manifest import read_manifest, verify_files
from qvlm_export.pipeline import stages
from qvlm_export.pipeline.preparation.prepare import ExportOptions
from qvlm_export.pipeline.work_folder import WorkFolder

Llava = Callable[..., Path]
SMALL = {"text": {"num_hidden_layers": 2}, "vision": {"num_hidden_layers": 2}}
RTX = ("--backend", "tensorrt-rtx", "--target", "sm89")


def options_of(model: Path, folder: Path, data: Path, effort: str = "rtn") -> ExportOptions:
    return ExportOptions(str(model), folder / "x.plan", backend="onnx", calib_data=data, effort=effort)


def kill_until_done(options: ExportOptions, draw: Callable[[], int]) -> int:
    """Resumes the export until it finishes, killing it each time at file operation `draw()`; returns the number of kills."""
    for kills in range(200):
        code = run_and_kill(replace(options, resume=True), draw())
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize(("effort", "at_least"), [("rtn", 4), ("fast", 2), ("full", 1), ("qvlm", 1)])
def test_killed_at_random_points_and_resumed_gives_the_same_bytes(
    llava: Llava, tmp_path: Path, effort: str, at_least: int
) -> None:
    """The export may be killed at any of its file operations."""
    model, data = llava(**SMALL), write_calibration(tmp_path)
    whole = tmp_path / "whole"
    assert run_and_kill(options_of(model, whole, data, effort), None) == 0
    expected, kills, draw = read_files(whole), 0, random.Random(0)
    while kills < at_least:
        folder = tmp_path / str(kills)
        kills += kill_until_done(options_of(model, folder, data, effort), lambda: draw.randrange(25, 120))
        assert read_files(folder) == expected


def test_killed_at_every_fifth_operation_near_the_end(llava: Llava, tmp_path: Path) -> None:
    """Among these are writing the report and the manifest, moving files into place, and removing the work folder."""
    model, data = llava(**SMALL), write_calibration(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert run_and_kill(options_of(model, whole, data), None) == 0
    options = options_of(model, folder, data)
    assert run_and_kill(options, 112) == -signal.SIGKILL
    operations = iter(range(24, 200, 5))
    kills = kill_until_done(options, lambda: next(operations))
    assert kills > 3
    assert read_files(folder) == read_files(whole)


def start_command(*arguments: object) -> subprocess.Popen[str]:
    script = Path(sys.executable).with_name("qvlm-export")
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Kills the process as soon as `ready()` is true; it must not end before."""
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.communicate()


def test_real_command_killed_while_calibrating(llava: Llava, tmp_path: Path) -> None:
    arguments = ("--backend", "onnx", "--calib-data", write_calibration(tmp_path), "--effort", "fast")
    out = tmp_path / "killed" / "x.plan"
    work = out.parent / ".x.work" / ".export"
    kill_when(start_command("--model", llava(**SMALL), "--out", out, *arguments), (work / "blocks" / "0001.json").exists)
    refused = run_export(llava(**SMALL), out, *arguments)
    assert_refused(refused, str(work.parent), "unfinished work", "blocks are calibrated", "--resume", "delete the folder")
    done = run_export(llava(**SMALL), out, *arguments, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "resuming after block" in done.stderr
    export_to(llava(**SMALL), tmp_path / "whole" / "x.plan", *arguments)
    assert read_files(out.parent) == read_files(tmp_path / "whole")


def test_real_command_killed_while_building_ends_its_build_process(llava: Llava, tmp_path: Path) -> None:
    arguments = ("--calib-data", write_calibration(tmp_path), *RTX)
    out = tmp_path / "out" / "x.plan"
    staging = out.parent / ".x.work" / "out"
    process = start_command("--model", llava(), "--out", out, *arguments)
    kill_when(process, lambda: bool(list(staging.glob("*.tmp"))))
    before = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.data")}
    (temporary,) = staging.glob("*.tmp")
    worker = int(temporary.name.split(".")[-2])
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the build goes on"
        time.sleep(0.01)
    content = export_to(llava(), out, *arguments, "--resume")
    assert content["linears"] == {"quantized": 34, "checked_integer": 34}
    assert "calibrate" not in content["seconds"]
    after = {name: (out.parent / name).stat().st_mtime_ns for name in before}
    assert before == after  # the graphs are those of the killed run
    assert not list(out.parent.glob(".*"))


# Changes that make unfinished work unusable, and those that do not


@pytest.fixture
def unfinished(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint that may be changed, and the `--out` of an export of it that was interrupted after calibration."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model, out = copy_checkpoint(llava(), tmp_path / "model"), tmp_path / "out" / "x.plan"
    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_graph", interrupt)
        assert export_onnx(model, out).exit_code == 130
    return model, out


def touch_weights(model: Path, _: Path) -> None:
    os.utime(model / "model.safetensors", (1, 1))


def change_one_weight(model: Path, _: Path) -> None:
    """Changes a byte of one weight, and restores the modification time."""
    path = model / "model.safetensors"
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def change_config(model: Path, _: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "mine"}))


def change_samples(_: Path, data: Path) -> None:
    data.write_text(data.read_text().replace("How many", "How few"))


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (touch_weights, (), "model.safetensors"),
        (change_one_weight, (), "model.safetensors"),
        (change_config, (), "config.json"),
        (change_samples, (), "the set of samples"),
        (None, ("--samples", "1"), "the set of samples"),
        (None, ("--scheme", "int8"), "the scheme or recipe"),
        (None, ("--effort", "fast"), "--effort"),
    ],
)
def test_resuming_with_changed_inputs_is_refused(unfinished, tmp_path, change, arguments, words) -> None:
    model, out = unfinished
    data = tmp_path / "calibration.jsonl"
    if change is not None:
        change(model, data)
    before = read_files(out.parent)
    refused = run_export(model, out, "--backend", "onnx", "--calib-data", data, "--resume", *arguments)
    assert_refused(refused, "--resume: ", words, "changed since", "delete the folder")
    assert read_files(out.parent) == before


def test_resuming_with_another_package_version_is_refused(unfinished) -> None:
    model, out = unfinished
    begun = out.parent / ".x.work" / ".export" / "begun.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"the version of torch": "1.0"}))
    assert_refused(export_onnx(model, out, "--resume"), "the version of torch changed")


def test_options_that_calibration_does_not_depend_on_may_change(unfinished) -> None:
    """Limits, for example, concern graphs and engines only."""
    model, out = unfinished
    done = export_onnx(model, out, "--resume", "--max-length", "100", "--json")
    assert done.exit_code == 0, done.stderr
    assert "calibrate" not in json.loads(done.stdout)["seconds"]
    assert json.loads((out.parent / "x.json").read_text())["limits"]["max_length"] == 100


@pytest.mark.parametrize("content", ["{", "[]", "7", '{"a": 1}', '{"shard": "../x", "key": []}', "[" * 700 + "]" * 700])
@pytest.mark.parametrize("damage", ["blocks/0001.json", "begun.json", "stages.json"])
def test_damaged_work_is_refused_in_one_line(llava: Llava, tmp_path: Path, damage: str, content: str) -> None:
    data = write_calibration(tmp_path)
    options = options_of(llava(**SMALL), tmp_path / "out", data)
    assert run_and_kill(options, 50) == -signal.SIGKILL
    path = tmp_path / "out" / ".x.work" / ".export" / damage
    assert path.exists() or damage == "stages.json"
    path.write_text(content)
    refused = run_export(options.model, options.out, "--backend", "onnx", "--calib-data", data, "--resume")
    assert_refused(refused, str(path), "is damaged", "start over")


def test_missing_shard_of_a_finished_block_is_refused(llava: Llava, tmp_path: Path) -> None:
    data = write_calibration(tmp_path)
    options = options_of(llava(**SMALL), tmp_path / "out", data)
    assert run_and_kill(options, 50) == -signal.SIGKILL
    next((tmp_path / "out" / ".x.work" / "calibrated").glob("*layers.0.safetensors")).unlink()
    refused = run_export(options.model, options.out, "--backend", "onnx", "--calib-data", data, "--resume")
    assert refused.exit_code == 2
    (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "layers.0.safetensors: cannot be read" in error
    assert "start over" in error


def test_resume_without_unfinished_work_starts_an_export(llava: Llava, tmp_path: Path) -> None:
    assert export_onnx(llava(), tmp_path / "out" / "x.plan", "--resume").exit_code == 0


def test_resumed_work_dir_keeps_only_the_calibrated_checkpoint(llava: Llava, tmp_path: Path) -> None:
    data, work = write_calibration(tmp_path), tmp_path / "work"
    options = replace(options_of(llava(**SMALL), tmp_path / "out", data), work_dir=work)
    assert kill_until_done(options, iter((40, 40, 40, 200)).__next__) > 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"x.json", "x.onnx"}
    assert {path.name for path in work.iterdir()} == {"calibrated"}


def test_killed_at_any_point_a_work_dir_is_resumed_and_holds_nothing_else(llava: Llava, tmp_path: Path) -> None:
    """Among the points are those inside a shard, between the two last files of the checkpoint, and while publishing it."""
    data, whole = write_calibration(tmp_path), tmp_path / "whole"
    options = options_of(llava(**SMALL), whole, data)
    assert run_and_kill(replace(options, work_dir=whole / "work"), None) == 0
    expected, kills = read_files(whole), 0
    for operation in range(14, 200, 34):
        folder = tmp_path / str(operation)
        options = replace(options_of(llava(**SMALL), folder, data), work_dir=folder / "work")
        if run_and_kill(options, operation) == 0:
            break
        kills += 1
        assert run_and_kill(replace(options, resume=True), None) == 0
        assert read_files(folder) == expected
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert kills > 3


def test_what_a_kill_leaves_of_a_shard_is_not_published(llava: Llava, tmp_path: Path) -> None:
    data, folder = write_calibration(tmp_path), tmp_path / "out"
    options = options_of(llava(**SMALL), folder, data)
    assert run_and_kill(options, 50) == -signal.SIGKILL
    calibrated = folder / ".x.work" / "calibrated"
    (calibrated / ".writing-model-a.safetensors").write_bytes(b"half")
    assert run_and_kill(replace(options, resume=True), None) == 0
    assert not [name for name in read_files(folder) if ".writing-" in name]
    verify_files(read_manifest(folder / "x.json"))


def test_what_a_kill_leaves_beside_a_finished_checkpoint_is_not_published(unfinished: tuple[Path, Path]) -> None:
    model, out = unfinished
    (out.parent / ".x.work" / "calibrated" / ".writing-calibration.json").write_text("half")
    assert export_onnx(model, out, "--resume").exit_code == 0
    assert not [name for name in read_files(out.parent) if ".writing-" in name]


def test_a_relative_path_of_the_model_is_the_same_model(
    unfinished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = unfinished
    monkeypatch.chdir(model.parent)
    for typed in (model.name, f"./{model.name}", f"../{model.parent.name}/{model.name}"):
        data = out.parent.parent / "calibration.jsonl"
        refused = run_export(typed, out, "--backend", "onnx", "--calib-data", data, "--effort", "fast", "--resume")
        assert_refused(refused, "--effort changed")  # and nothing before it
    assert export_onnx(model.name, out, "--resume").exit_code == 0


# Two exports at once


def test_a_locked_work_folder_is_refused(llava: Llava, tmp_path: Path) -> None:
    out, work = tmp_path / "out" / "x.plan", tmp_path / "work"
    for folder in (out.parent / ".x.work", work):
        lock = folder / ".export" / "lock"
        lock.parent.mkdir(parents=True)
        with lock.open("w") as file:
            file.write("4711")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
            refused = export_onnx(llava(), out, "--work-dir", work)
            assert_refused(refused, str(folder), "another export is at work here (process 4711)", "choose another")
    assert (
        export_onnx(llava(), out, "--work-dir", work).exit_code == 0
    )  # the lock is released, as it is when its process dies


# Failures while an export runs


def test_checkpoint_that_changes_while_it_is_read_is_refused(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = copy_checkpoint(llava(), tmp_path / "model"), tmp_path / "out" / "x.plan"
    weights, run_effort = model / "model.safetensors", stages.run_effort
    times, content = weights.stat(), weights.read_bytes()

    def run_effort_and_truncate(effort, job, writer, progress):
        def truncate_after_two_blocks(done: int, total: int, name: str) -> None:
            if done == 2:
                weights.write_bytes(content[:-1000])
            progress(done, total, name)

        return run_effort(effort, job, writer, truncate_after_two_blocks)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "run_effort", run_effort_and_truncate)
        assert_refused(export_onnx(model, out), str(weights), "was changed while it was read", "--resume")
    assert [path.name for path in out.parent.iterdir()] == [".x.work"]
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert export_onnx(model, out, "--resume").exit_code == 0
    assert export_onnx(model, tmp_path / "whole" / "x.plan").exit_code == 0
    assert read_files(out.parent) == read_files(tmp_path / "whole")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1.00 TiB for an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
)
def test_running_out_of_memory_is_reported(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(stages, "write_graph", fail)
    refused = export_onnx(llava(), tmp_path / "out" / "x.plan")
    assert_refused(refused, "memory ran out", "--memory", "--samples", "--resume continues")


def test_damaged_checkpoint_leaves_no_work(llava: Llava, absent: Path, tmp_path: Path) -> None:
    """Work that was begun with a damaged checkpoint can never be resumed."""
    model = copy_checkpoint(llava(dtype="float32"), tmp_path / "model")
    set_weight(model, "language_model.model.layers.1.mlp.up_proj.weight", np.nan, "float32")
    assert_refused(export_onnx(model, absent), "NaN")


def test_a_stage_with_a_truncated_file_is_not_complete(tmp_path: Path) -> None:
    """So that the file is written again."""
    work = WorkFolder(tmp_path, tmp_path)
    work.staging.mkdir()
    work.state.mkdir()
    path = work.staging / "x.onnx"
    path.write_bytes(b"1234")
    work.record_stage("language_onnx", "key", [path], report={"seconds": 1.5})
    assert work.completed_stages() == {"language_onnx": {"key": "key", "files": {"x.onnx": 4}, "report": {"seconds": 1.5}}}
    path.write_bytes(b"123")
    assert work.completed_stages() == {}
