"""Exports that are given no data: the float model writes its own where that pays and memory suffices."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, export_to, read_files, run_export, write_calibration
from kills import run_and_kill

from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.export import dry_run_summary
from qvlm_export.inference import self_calibration as writing
from qvlm_export.inputs.lines import Line
from qvlm_export.inputs.samples import Entry, read_entries
from qvlm_export.pipeline.preparation.calibration_set import EMPTY, describe_faults
from qvlm_export.pipeline.preparation.machine import Machine
from qvlm_export.pipeline.preparation.prepare import ExportOptions, estimate_export, prepare_export

Llava = Callable[..., Path]
OPTIONS = ("--backend", "onnx", "--scheme", "int8", "--samples", "6", "--max-length", "128")
SET = "calibration_set"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few tokens, in two batches."""
    kinds = [replace(k, prompt_tokens=min(k.prompt_tokens, 3), answer_tokens=4) for k in writing.KINDS]
    monkeypatch.setattr(writing, "KINDS", tuple(kinds))
    monkeypatch.setattr(writing, "BATCH", 4)


def read_calibration(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "x.json").read_text())
    return dict(content["calibration"])


def test_the_set_lies_in_the_calibrated_checkpoint_and_calibrates_alike(llava: Llava, tmp_path: Path) -> None:
    content = export_to(llava(), tmp_path / "a" / "x.plan", *OPTIONS, "--calib-data", "self")
    assert "write" in content["seconds"]
    assert read_calibration(tmp_path / "a")["data"] == "self"
    assert read_calibration(tmp_path / "a")["samples"] == 6
    stored = tmp_path / "a" / "x.calibrated" / SET / "self.jsonl"
    lines = [json.loads(line) for line in stored.read_text().splitlines()]
    assert len(lines) == 6
    assert {path.name for path in stored.parent.glob("images/*")} == {Path(x["image"]).name for x in lines if "image" in x}
    export_to(llava(), tmp_path / "b" / "x.plan", *OPTIONS, "--calib-data", stored)
    a, b = (read_files(tmp_path / name) for name in "ab")
    differing = {name for name in a if SET not in name and a[name] != b[name]}
    # They name the data.
    assert differing == {"x.json", "x.report.html", "x.calibrated/calibration.json"}


def test_killed_while_writing_and_later_and_resumed_gives_the_same_bytes(llava: Llava, tmp_path: Path) -> None:
    options = ExportOptions(
        str(llava()), tmp_path / "whole" / "x.plan", backend="onnx", calib_data=Path("self"), samples=6, max_length=128
    )
    assert run_and_kill(options, None) == 0
    killed = replace(options, out=tmp_path / "killed" / "x.plan", resume=True)
    for operation in (22, 60):
        assert run_and_kill(killed, operation) == -signal.SIGKILL
    assert run_and_kill(killed, None) == 0
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")


def test_parts_that_were_written_need_resume_and_the_same_data(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "x.plan"
    write, self = writing._Writer.write, ("--calib-data", "self")

    def interrupt(writer: Any, drafts: Any, seed: int, progress: Any) -> Any:
        if seed:
            raise KeyboardInterrupt
        return write(writer, drafts, seed, progress)

    with monkeypatch.context() as patched:
        patched.setattr(writing._Writer, "write", interrupt)
        assert run_export(llava(), out, *OPTIONS, *self).exit_code == 130
    assert [path.name for path in (out.parent / ".x.work" / ".export" / "written").glob("*.jsonl")] == ["000.jsonl"]
    assert_refused(run_export(llava(), out, *OPTIONS, *self), "unfinished work", "--resume")
    data = write_calibration(tmp_path, 6)
    refused = run_export(llava(), out, *OPTIONS, "--calib-data", data, "--resume")
    assert_refused(refused, "--resume: --calib-data changed")
    written: list[int] = []

    def note(writer: Any, drafts: Any, seed: int, progress: Any) -> Any:
        written.append(seed)
        return write(writer, drafts, seed, progress)

    monkeypatch.setattr(writing._Writer, "write", note)
    export_to(llava(), out, *OPTIONS, *self, "--resume")
    assert written == [1]


@pytest.mark.parametrize(
    ("effort", "data", "note"),
    [
        ("rtn", None, "3 of the package's own drawn scenes, as --calib-data was not given"),
        ("fast", None, "3 conversations that the model writes first, as --calib-data was not given"),
        ("rtn", "self", None),
        ("fast", "built-in", None),
    ],
)
def test_what_calibrates(llava: Llava, absent: Path, effort: str, data: str | None, note: str | None) -> None:
    path, name = None if data is None else Path(data), data or {"rtn": "built-in", "fast": "self"}[effort]
    options = ExportOptions(str(llava()), absent, backend="onnx", effort=effort, calib_data=path, samples=3)
    chosen = prepare_export(options).calibration_set
    assert (chosen.name, len(chosen.drafts)) == (name, 3 if name == "self" else 0)
    assert chosen.note is None if note is None else str(chosen.note).startswith(f"calibrating with {note}")


def test_a_model_too_large_for_memory_takes_the_scenes(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlm_export.pipeline.preparation.prepare.installed_memory", lambda _: 2**29)
    prepared = prepare_export(ExportOptions(str(llava()), absent, backend="onnx", effort="fast", samples=3))
    assert prepared.calibration_set.name == "built-in"
    assert "as writing its own takes the model 0.7 GiB of memory, of 0.5 GiB" in str(prepared.calibration_set.note)
    refused = run_export(llava(), absent, *OPTIONS, "--calib-data", "self")
    assert_refused(refused, "--calib-data self: the float model takes 0.7 GiB of memory, of 0.5 GiB", "or built-in")


def test_memory_is_what_the_user_gives(llava: Llava, absent: Path) -> None:
    refused = run_export(llava(), absent, *OPTIONS, "--calib-data", "self", "--memory", "0.5")
    assert_refused(refused, "--calib-data self: the float model takes 0.7 GiB of memory, of 0.5 GiB")


def test_a_file_of_that_name_is_ambiguous(
    llava: Llava, absent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_calibration(tmp_path, 2).rename(tmp_path / "self")
    (tmp_path / "built-in").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("self", "built-in"):
        refused = run_export(llava(), absent, *OPTIONS, "--calib-data", name)
        assert_refused(refused, f"--calib-data {name}: is a choice, and a file here; give the file by its full path")
    options = ExportOptions(str(llava()), absent, backend="onnx", calib_data=tmp_path / "self")
    assert prepare_export(options).calibration_set == replace(
        EMPTY, name="self", entries=tuple(read_entries(tmp_path / "self", None, 2))
    )


def test_the_estimate_counts_the_writing(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1e10, 1e9, 1e10, 1e9, 1e9, 1e9, 1e9, 1e9, 2)
    monkeypatch.setattr("qvlm_export.pipeline.preparation.prepare.measure_machine", lambda *_: machine)
    own, few = (
        dry_run_summary(prepared, estimate_export(prepared))
        for prepared in (
            prepare_export(ExportOptions(str(llava()), absent, backend="onnx", calib_data=Path("self"), samples=samples))
            for samples in (None, 16)
        )
    )
    assert (own["calibration_data"], own["calibration_samples"]) == ("self", 64)
    assert next(iter(own["seconds"])) == "write"
    assert 2 < own["seconds"]["write"] / few["seconds"]["write"] < 8
    # 0.6 MB of float16 weights and caches of 16 sequences beside the program
    assert own["memory_bytes"] == few["memory_bytes"] > 700 * 2**20
    given = prepare_export(ExportOptions(str(llava()), absent, backend="onnx", calib_data=Path("built-in")))
    assert "write" not in estimate_export(given).seconds


def test_a_model_that_cannot_write_is_refused(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("the logits are NaN")

    monkeypatch.setattr("qvlm_export.pipeline.stages.open_float_session", fail)
    refused = run_export(llava(), tmp_path / "out" / "x.plan", *OPTIONS, "--calib-data", "self")
    assert_refused(
        refused, "the float model cannot write its calibration set: the logits are NaN; or add --calib-data built-in"
    )
    assert not (tmp_path / "out").exists()


def entries(*answers: str | None) -> list[Entry]:
    return [Entry("", Line(prompt="Hm?", answer=answer), None) for answer in answers]


def test_what_is_wrong_with_a_set_is_said() -> None:
    loop = "yes " * 40
    assert describe_faults(entries("A.", "B.", None, None)) == []
    (silent,) = describe_faults(entries("A.", None, None))
    assert "2 of the model's 3 texts end at once; see calibration_set/self.jsonl" in silent
    (looping,) = describe_faults(entries(loop, loop, "A."))
    assert "2 of the model's 3 texts repeat themselves" in looping
    with pytest.raises(UserError, match=r"ends all of its 2 answers at once.*--calib-data built-in"):
        describe_faults(entries(None, None))
