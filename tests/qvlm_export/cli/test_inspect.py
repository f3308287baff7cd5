"""qvlm-inspect: a table or JSON on stdout, or one line on stderr and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused
from typer.testing import CliRunner, Result

import qvlm_export
from qvlm_export.cli.inspect import app
from qvlm_export.engines.manifest import read_manifest, seal
from qvlm_export.report.contents import inspect

SCRIPT = Path(sys.executable).with_name("qvlm-inspect")
HASHED = (
    "x.plan",
    "x.vision.plan",
    "x.onnx",
    "x.onnx.data",
    "x.vision.onnx",
    "x.vision.onnx.data",
    "x.report.html",
    "x.prefix.safetensors",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan path of an export of the tiny model with engines. Do not write beside it."""
    plan = tmp_path_factory.mktemp("inspect") / "x.plan"
    qvlm_export.export("tiny", plan, backend="tensorrt-rtx", targets=("sm89",), samples=2)
    return plan


@pytest.fixture
def mine(exported: Path, tmp_path: Path) -> Path:
    """The plan path of a copy that may be damaged."""
    shutil.copytree(exported.parent, tmp_path / "copy")
    return tmp_path / "copy" / "x.plan"


def run_inspect(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def read(*arguments: object) -> dict[str, Any]:
    result = run_inspect(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def split_rows(text: str) -> set[tuple[str, ...]]:
    """Returns the columns of every line; two or more spaces separate them."""
    return {tuple(re.split(r" {2,}", line.strip())) for line in text.splitlines()}


def test_tables_show_sizes_schemes_and_interface(exported: Path) -> None:
    result = run_inspect(exported)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()[:40]
    tables = [line for line in lines if not line.startswith(("calibration: ", "built with: "))]
    assert max(len(line) for line in tables) <= 80
    rows = split_rows(result.stdout)
    manifest = read_manifest(exported.with_suffix(".json"))
    digest = manifest.files["language_plan"]["sha256"][:12]
    for row in (
        ("embeddings", "131,072", "0.2 MiB", "0.2 MiB", "16.00", "1.00x"),
        ("language_model", "W4A16 g128", "half x int4 -> half", "28"),
        ("vision_tower", "W8A8", "int8 x int8 -> float", "18"),
        ("lm_head", "float16", "float", "1"),
        ("48 of 49 linears are quantized; engine check: 48 of 48 run on integers",),
        ("inputs and outputs; * is a layer, 0 to 3",),
        ("language", "in", "past_key_values.*.key", "float16 [batch, 2, 512, 64]"),
        ("vision", "out", "image_embeds", "float16 [image_tokens, 256]"),
        ("limits: 512 tokens, batch 1, 4 images at once",),
    ):
        assert row in rows, result.stdout
    assert f"{digest}…" in result.stdout
    assert f"tensorrt-rtx {manifest.backend['version']} for sm89, python" in result.stdout
    assert "tied" not in result.stdout


def test_json_is_the_summary_of_inspect(exported: Path) -> None:
    content = read(exported)
    assert content == json.loads(json.dumps(inspect(exported).summary()))
    assert content["plan_check"] == {"checked": 48, "passed": 48}
    assert len(content["linears"]) == 49
    assert [c["name"] for c in content["components"]] == [
        "vision_tower",
        "projector",
        "language_model",
        "lm_head",
        "embeddings",
    ]
    assert content["total"]["stored_bytes"] == sum(c["stored_bytes"] for c in content["components"])
    assert content["total"]["bits_per_weight"] == pytest.approx(6.02, abs=0.01)
    manifest = read_manifest(exported.with_suffix(".json"))
    assert content["interface"] == manifest.interface
    assert content["versions"] == manifest.versions
    assert {f["role"]: f["sha256"] for f in content["files"]} == {r: e.get("sha256") for r, e in manifest.files.items()}
    assert (content["limits"]["max_length"], content["verified"]) == (512, None)


def test_the_manifest_is_accepted_as_an_argument(exported: Path) -> None:
    assert run_inspect(exported.with_suffix(".json")).stdout == run_inspect(exported).stdout


def test_real_command(exported: Path, tmp_path: Path) -> None:
    """The installed script runs in another folder, and prints nothing on stderr."""
    command = [sys.executable, SCRIPT, exported, "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_inspect(exported, "--verify").stdout


def test_help_shows_examples() -> None:
    result = run_inspect("--help")
    assert result.exit_code == 0
    assert "qvlm-inspect engine.plan --verify" in result.stdout


def list_folder_files(plan: Path) -> list[str]:
    """Returns the files in the folders of processor and calibrated checkpoint, relative to the export."""
    folders = (plan.with_suffix(".processor"), plan.with_suffix(".calibrated"))
    return [path.relative_to(plan.parent).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_verify_compares_every_file(exported: Path) -> None:
    result = run_inspect(exported, "--verify")
    assert (result.exit_code, result.stderr) == (0, "")
    count = len(HASHED) + len(list_folder_files(exported))
    assert count > len(HASHED) + 5
    assert f"verified {count} files in {exported.parent.resolve()}" in result.stdout
    assert "not recorded" not in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.rstrip().endswith(" verified")]) == 10
    assert read(exported, "--verify")["verified"] == count


def test_a_changed_file_inside_a_folder_is_found(mine: Path) -> None:
    for name in list_folder_files(mine):
        path = mine.parent / name
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert_refused(run_inspect(mine, "--verify"), f"{path}: its sha256 is", "it was changed", "export again")
        path.write_bytes(data)
    assert run_inspect(mine, "--verify").exit_code == 0


def test_files_that_an_older_export_did_not_record_are_listed(mine: Path) -> None:
    path = mine.with_suffix(".json")
    content = json.loads(path.read_text())
    for role in ("processor", "calibrated"):
        del content["files"][role]["files"]
    path.write_text(json.dumps(seal(content)))
    result = run_inspect(mine, "--verify")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "verified 8 files in " in result.stdout
    assert "; not recorded by that export, so not verified: x.processor, x.calibrated\n" in result.stdout
    assert {f["state"] for f in read(mine, "--verify")["files"]} == {"verified", "present"}


@pytest.mark.parametrize("name", HASHED)
def test_one_changed_byte_is_found(mine: Path, name: str) -> None:
    path = mine.parent / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    assert run_inspect(mine).exit_code == 0
    assert_refused(run_inspect(mine, "--verify"), f"{path}: its sha256 is", "it was changed", "export again")


@pytest.mark.parametrize("name", ["x.plan", "x.vision.onnx.data"])
def test_half_a_file_is_found(mine: Path, name: str) -> None:
    path = mine.parent / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    words = (f"{path}: has {len(data) // 2} bytes, the manifest says {len(data)}", "incomplete, export again")
    assert_refused(run_inspect(mine, "--verify", "--json"), *words)
    assert {f["name"]: f["state"] for f in read(mine)["files"] if f["state"] != "present"} == {name: "changed"}


@pytest.mark.parametrize("name", HASHED)
def test_missing_file_is_found(mine: Path, name: str) -> None:
    (mine.parent / name).unlink()
    assert_refused(
        run_inspect(mine, "--verify"), f"{mine.parent / name}: is missing", "keep the files of an export together"
    )
    assert {f["name"]: f["state"] for f in read(mine)["files"] if f["state"] != "present"} == {name: "missing"}


def test_a_changed_hash_is_found(mine: Path) -> None:
    manifest = mine.with_suffix(".json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["files"]["vision_plan"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(seal(content)), encoding="utf-8")
    assert_refused(run_inspect(mine, "--verify"), f"{mine.with_suffix('.vision.plan')}: its sha256", "says 000000000000")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not a readable manifest", "export again"]),
        ('{"format": "other"}', ["no manifest of qvlm-export"]),
        ('{"format": "qvlm-export", "version": 99}', ["manifest version 99", "update qvlm-export"]),
        ('{"format": "qvlm-export", "version": 1}', ["was changed since the export", "export again"]),
    ],
)
def test_damaged_manifest(tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert_refused(run_inspect(tmp_path / "x.plan"), str(tmp_path / "x.json"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing argument", "--help"]),
        (["/no/such.plan"], ["/no/such.json", "no such manifest"]),
        (["/no/such.onnx"], ["/no/such.onnx", "give the .plan"]),
        (["x.plan", "--hashes"], ["--hashes"]),
    ],
)
def test_unusable_arguments(arguments: list[str], words: list[str]) -> None:
    assert_refused(run_inspect(*arguments), *words)
