"""What stands where an export writes: its own intact files are replaced, the user's and other exports' are not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, export_onnx, export_to, read_files, run_export
from typer.testing import Result

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import read_manifest, verify_files
from qvlm_export.pipeline import stages

Llava = Callable[..., Path]
NAMES = [
    "x.json", "x.plan", "x.vision.plan", "x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data", "x.report.html",
    "x.processor", "x.calibrated",
]  # fmt: skip
KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("mine"),
    "folder": lambda path: (path.mkdir(), (path / "diary.txt").write_text("mine")),
    "link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """X.plan in an existing folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.plan"


def export_fp16(model: Path, out: Path, *arguments: object) -> Result:
    return run_export(model, out, "--backend", "onnx", "--scheme", "fp16", *arguments)


def state_of(folder: Path) -> dict[str, Any]:
    """Everything in a folder: content of files, targets of links, and which paths are neither."""
    others = {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else None for p in folder.rglob("*")}
    return {**others, **read_files(folder)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_there_is_not_replaced(llava: Llava, out: Path, name: str, kind: str) -> None:
    """Not even where this backend and scheme write no such file."""
    KINDS[kind](out.parent / name)
    before = state_of(out.parent)
    refused = export_fp16(llava(), out)
    words = (
        ("is a folder",) if (name, kind) == ("x.plan", "folder") else (name, "did not write", "move it away", "--overwrite")
    )
    assert_refused(refused, f"--out {out}: ", *words)
    assert state_of(out.parent) == before


@pytest.mark.parametrize(
    ("name", "kind"), [("x.onnx", "file"), ("x.json", "file"), ("x.processor", "folder"), ("x.plan", "link")]
)
def test_overwrite_insists(llava: Llava, out: Path, name: str, kind: str) -> None:
    KINDS[kind](out.parent / name)
    assert export_fp16(llava(), out, "--overwrite").exit_code == 0
    verify_files(read_manifest(out.with_suffix(".json")))
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(
        set(NAMES) - {"x.plan", "x.vision.plan", "x.calibrated"}
    )


def test_an_intact_export_is_replaced_and_what_goes_with_it_is_named(llava: Llava, out: Path) -> None:
    assert export_onnx(llava(), out).exit_code == 0
    again = export_fp16(llava(seed=1), out)
    assert again.exit_code == 0, again.stderr
    assert "removed with the older export: x.prefix.safetensors, x.calibrated\n" in again.stdout
    assert export_to(llava(), out, "--backend", "onnx", "--scheme", "fp16")["removed"] == []


CHANGES: dict[str, Callable[[Path], object]] = {
    "a larger file": lambda out: out.with_suffix(".onnx").write_bytes(b"mine" * 1000),
    "a file of the same size": lambda out: flip_a_bit(out.with_suffix(".report.html")),
    "a file in a folder": lambda out: (out.with_suffix(".calibrated") / "notes.txt").write_text("mine"),
    "a hidden file in a folder": lambda out: (out.with_suffix(".processor") / ".notes").write_text("mine"),
    "a folder for a file": lambda out: (out.with_suffix(".onnx").unlink(), out.with_suffix(".onnx").mkdir()),
    "a plan beside graphs": lambda out: out.write_bytes(b"mine"),
    "the manifest": lambda out: out.with_suffix(".json").write_text(
        out.with_suffix(".json").read_text().replace("int4", "int8")
    ),
}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_an_export_that_was_changed_is_not_replaced(llava: Llava, intact: Path, out: Path, change: str) -> None:
    shutil.copytree(intact.parent, out.parent, dirs_exist_ok=True)
    CHANGES[change](out)
    before = state_of(out.parent)
    assert_refused(export_fp16(llava(), out), "would replace", "--overwrite")
    assert state_of(out.parent) == before
    assert export_fp16(llava(), out, "--overwrite").exit_code == 0


@pytest.fixture(scope="module")
def intact(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X.plan of an INT4 export; do not write there."""
    out = tmp_path_factory.mktemp("intact") / "out" / "x.plan"
    out.parent.mkdir()
    assert export_onnx(llava(), out).exit_code == 0
    return out


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(("first", "second"), [("x", "x.vision"), ("x.vision", "x")])
def test_the_files_of_another_export_are_not_replaced(
    llava: Llava, out: Path, first: str, second: str, overwrite: tuple[str, ...]
) -> None:
    """Both would have an x.vision.onnx."""
    assert export_fp16(llava(), out.with_name(f"{first}.plan")).exit_code == 0
    before = state_of(out.parent)
    refused = export_fp16(llava(), out.with_name(f"{second}.plan"), *overwrite)
    assert_refused(refused, "x.vision.onnx", f"belongs to the export {first}.json", "choose another name")
    assert state_of(out.parent) == before


@pytest.mark.parametrize("stem", ["x.onnx", "x.onnx.data", "x.report", "x.processor", "x.calibrated", "x.json", ".x", "x y"])
def test_exports_of_similar_names_live_side_by_side(llava: Llava, intact: Path, out: Path, stem: str) -> None:
    shutil.copytree(intact.parent, out.parent, dirs_exist_ok=True)
    other = out.with_name(f"{stem}.plan")
    assert export_fp16(llava(), other).exit_code == 0
    for plan in (out, other):
        verify_files(read_manifest(plan.with_suffix(".json")))
        assert export_fp16(llava(), plan).exit_code == 0


@pytest.mark.parametrize("name", ["x.onnx", "x.calibrated", "x.json"])
def test_what_appears_while_an_export_works_is_kept_and_so_is_the_work(
    llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    build = stages.build

    def build_and_interfere(*arguments: Any) -> Any:
        (out.parent / name).write_text("mine")
        return build(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("qvlm_export.pipeline.export.build", build_and_interfere)
        refused = export_fp16(llava(), out)
    assert_refused(refused, f"would replace {out.parent / name}", "did not write", "what was finished is kept", "--resume")
    assert {path.name: path.is_file() and path.read_text() for path in out.parent.iterdir()} == {
        name: "mine",
        ".x.work": False,
    }
    assert_refused(export_fp16(llava(), out, "--resume"), "would replace")
    (out.parent / name).unlink()
    resumed = export_fp16(llava(), out, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["seconds"] == {}  # nothing was made again
    verify_files(read_manifest(out.with_suffix(".json")))
    assert not (out.parent / ".x.work").exists()


@pytest.mark.parametrize("name", [".x.work", ".x.work/diary.txt", ".x.work/.export/diary.txt"])
def test_a_work_folder_that_is_not_ours_is_refused(llava: Llava, out: Path, name: str) -> None:
    (out.parent / name).parent.mkdir(parents=True, exist_ok=True)
    (out.parent / name).write_text("mine")
    before = state_of(out.parent)
    assert_refused(export_fp16(llava(), out), name, "move it away")
    assert state_of(out.parent) == before


# --work-dir


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_the_user_has_in_the_work_dir_is_not_replaced(llava: Llava, out: Path, kind: str) -> None:
    work = out.parent / "work"
    work.mkdir()
    KINDS[kind](work / "calibrated")
    before = state_of(out.parent)
    assert_refused(export_onnx(llava(), out, "--work-dir", work), "--work-dir", "did not write", "--overwrite")
    assert state_of(out.parent) == before
    assert export_onnx(llava(), out, "--work-dir", work, "--overwrite").exit_code == 0
    assert (work / "calibrated" / "calibration.json").is_file()


def test_a_changed_checkpoint_in_the_work_dir_is_not_replaced(llava: Llava, out: Path) -> None:
    work = out.parent / "work"
    for _ in range(2):  # an unchanged one is
        assert export_onnx(llava(), out, "--work-dir", work).exit_code == 0
    (work / "calibrated" / "notes.txt").write_text("mine")
    assert_refused(export_onnx(llava(), out, "--work-dir", work), "changed since", "choose another folder")


@pytest.mark.parametrize("name", [".x.work", ".x.work/deeper", "x.calibrated", "x.processor/y"])
def test_a_work_dir_where_the_export_itself_goes_is_refused(llava: Llava, out: Path, name: str) -> None:
    assert_refused(export_onnx(llava(), out, "--work-dir", out.parent / name), "--work-dir", "choose another folder")
    assert list(out.parent.iterdir()) == []


def test_bad_input_leaves_the_older_checkpoint_in_the_work_dir(
    llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN that is found late leaves no half of a checkpoint, and takes no older one with it."""

    def fail(*_: Any) -> None:
        raise UserError("a weight is NaN")

    work = out.parent / "work"
    monkeypatch.setattr(stages, "write_graph", fail)
    assert_refused(export_onnx(llava(), out, "--work-dir", work), "a weight is NaN")
    assert list(out.parent.iterdir()) == []
    monkeypatch.undo()
    assert export_onnx(llava(), out, "--work-dir", work).exit_code == 0
    before = state_of(out.parent)
    monkeypatch.setattr(stages, "write_graph", fail)
    assert_refused(export_onnx(llava(seed=1), out, "--work-dir", work), "a weight is NaN")
    assert state_of(out.parent) == before
