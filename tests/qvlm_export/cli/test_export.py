"""`qvlm-export` with good input: what it writes, that this is what the dry run said, and that it is reproducible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import copy_checkpoint, export_onnx, export_to, read_files, run_export, set_weight, write_calibration
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.cli.export import app

Llava = Callable[..., Path]
PLANS = {"x.plan", "x.vision.plan"}
GRAPHS = {"x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data", "x.report.html"}  # written with every backend
RTX = ("--backend", "tensorrt-rtx", "--target", "sm89")


@pytest.fixture(scope="module")
def int4(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An INT4 export with engines: its folder, and the JSON that it printed."""
    folder = tmp_path_factory.mktemp("int4")
    data = write_calibration(tmp_path_factory.mktemp("data"))
    return folder, export_to(llava(), folder / "x.plan", "--calib-data", data, *RTX)


def read_manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "x.json").read_text(encoding="utf-8"))
    return content


def test_help_shows_examples_and_every_option() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "qvlm-export --model tiny --out engine.plan" in result.stdout
    for option in ("--scheme", "--recipe", "--calib-data", "--target", "--max-length", "--dry-run", "--json"):
        assert option in result.stdout


def test_dry_run_writes_nothing_and_prints_sizes(llava: Llava, tmp_path: Path) -> None:
    result = run_export(llava(), tmp_path / "new" / "x.plan", *RTX, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    for words in ("20 W8A8, 14 W4A16", "tensorrt-rtx sm89", "512 tokens", "MiB", "Nothing was written", "64 samples"):
        assert words in result.stdout


def test_dry_run_as_json(llava: Llava, tmp_path: Path) -> None:
    result = export_onnx(llava(), tmp_path / "out" / "x.plan", "--dry-run", "--json", "--max-length", "100")
    content = json.loads(result.stdout)
    assert (content["backend"], content["targets"], content["max_length"]) == ("onnx", [], 100)
    assert content["linears"] == {"W8A8": 20, "W4A16": 14}
    assert content["calibration_samples"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.jsonl"]


def test_brackets_in_names_are_shown_as_they_are(llava: Llava, tmp_path: Path) -> None:
    """They must not be taken for markup of the terminal library."""
    model = copy_checkpoint(llava(), tmp_path / "llava[/v1]")
    result = run_export(model, tmp_path / "out" / "x.plan", "--backend", "onnx", "--scheme", "fp16", "--dry-run")
    assert result.exit_code == 0, result.exception
    assert "llava[/v1]" in result.stdout.replace("\n", "")


def test_the_manifest_lists_exactly_the_files_written(int4: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = int4
    written = {path.name for path in folder.iterdir()}
    named = {entry["name"] for entry in read_manifest(folder)["files"].values()}
    assert written == named | {"x.json"}
    assert written >= PLANS | GRAPHS | {"x.processor"}


def test_the_manifest_has_size_and_hash_of_every_file(int4: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = int4
    hashed = {entry["name"]: entry for entry in read_manifest(folder)["files"].values() if "sha256" in entry}
    assert set(hashed) == PLANS | GRAPHS | {"x.prefix.safetensors"}
    for name, entry in hashed.items():
        data = (folder / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_plan_check_covers_every_quantized_linear(int4: tuple[Path, dict[str, Any]]) -> None:
    folder, stdout = int4
    manifest = read_manifest(folder)
    checked = {check["linear"]: check for check in manifest["plan_check"]}
    assert set(checked) == set(manifest["linears"])
    assert len(checked) == 34
    assert all(check["passed"] for check in checked.values())
    assert stdout["linears"] == {"quantized": 34, "checked_integer": 34}
    q_proj = checked["language_model.model.layers.0.self_attn.q_proj"]
    fc1 = checked["vision_tower.vision_model.encoder.layers.0.mlp.fc1"]
    assert (q_proj["scheme"], fc1["scheme"]) == ("W4A16", "W8A8")
    assert "int4" in q_proj["executed"]
    assert "int8 x int8" in fc1["executed"]


def test_manifest_records_model_scheme_data_and_backend(int4: tuple[Path, dict[str, Any]], llava: Llava) -> None:
    folder, stdout = int4
    manifest = read_manifest(folder)
    weights = [{"name": "model.safetensors", "bytes": (llava() / "model.safetensors").stat().st_size}]
    expected = {"name": llava().name, "source": "folder", "weights": weights, "model_type": "llava"}
    assert manifest["model"] == expected
    assert manifest["scheme"] == stdout["scheme"] == "int4"
    assert manifest["calibration"]["samples"] == 2
    assert manifest["calibration"]["data"] == "calibration.jsonl"
    assert manifest["backend"]["targets"] == ["sm89"]
    assert manifest["linears"]["language_model.model.layers.1.mlp.down_proj"] == "W4A16 g128"
    assert [value["name"] for value in manifest["interface"]["vision"]["inputs"]] == ["pixel_values"]


def test_json_lists_what_was_written(int4: tuple[Path, dict[str, Any]]) -> None:
    folder, stdout = int4
    assert stdout["manifest"] == str(folder / "x.json")
    assert {Path(entry["path"]) for entry in stdout["files"].values()} == {p for p in folder.iterdir() if p.name != "x.json"}
    assert set(stdout["seconds"]) == {"calibrate", "accuracy", "graph", "build", "check"}
    assert stdout["peak_bytes"] > 10**8  # torch alone takes more than that


def test_dry_run_predicts_the_sizes(int4: tuple[Path, dict[str, Any]], llava: Llava, tmp_path: Path) -> None:
    """The weights are within 6 % of the data files, which also have embeddings, biases and padding."""
    folder, stdout = int4
    result = run_export(llava(), tmp_path / "x.plan", *RTX, "--dry-run", "--json")
    parts = json.loads(result.stdout)["parts"]
    for part, name in (("vision", "x.vision.onnx.data"), ("language", "x.onnx.data")):
        written = (folder / name).stat().st_size
        assert parts[part]["weights_bytes"] == pytest.approx(written, rel=0.06)
        assert stdout["compression"][part] == round(parts[part]["float16_bytes"] / written, 2)
    assert (
        sum(path.stat().st_size for path in folder.glob("x.*") if path.is_file()) < json.loads(result.stdout)["disk_bytes"]
    )


def test_same_export_twice_differs_in_plans_only(int4: tuple[Path, dict[str, Any]], llava: Llava, tmp_path: Path) -> None:
    folder, _ = int4
    again = tmp_path / "again"
    export_to(llava(), again / "x.plan", "--calib-data", write_calibration(tmp_path), *RTX)
    one, two = read_files(folder), read_files(again)
    assert one.keys() == two.keys()
    # TensorRT-RTX orders some tables of a plan at random. Sizes, and all other files, must agree.
    differing = {name for name in one if one[name] != two[name]}
    assert differing <= {"x.plan", "x.vision.plan", "x.json"}
    assert {name: len(one[name]) for name in one} == {name: len(two[name]) for name in two}
    manifests = read_manifest(folder), read_manifest(again)
    for manifest in manifests:
        del manifest["sha256"]
        for role in ("language_plan", "vision_plan"):
            del manifest["files"][role]["sha256"]
    assert manifests[0] == manifests[1]


def test_same_graphs_twice_give_the_same_bytes(llava: Llava, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert export_onnx(llava(), tmp_path / folder / "x.plan").exit_code == 0
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


def test_onnx_backend_writes_graphs_only(llava: Llava, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = export_onnx(llava(), folder / "x.plan")
    assert result.exit_code == 0, result.stderr
    assert "x.vision.onnx.data" in result.stdout
    assert f"in {folder}\n" in result.stdout
    assert "block by block: x.report.html\n" in result.stdout
    assert {path.name for path in folder.iterdir() if path.is_file()} == GRAPHS | {"x.json", "x.prefix.safetensors"}
    assert read_manifest(folder)["plan_check"] == []


def test_built_in_calibration_set_is_the_default_and_reported(llava: Llava, tmp_path: Path) -> None:
    result = run_export(llava(), tmp_path / "x.plan", "--backend", "onnx", "--samples", "2")
    assert result.exit_code == 0, result.stderr
    assert "of the package's own drawn scenes" in " ".join(result.stderr.split())
    assert (
        read_manifest(tmp_path)["calibration"] | {"data": "built-in", "samples": 2} == read_manifest(tmp_path)["calibration"]
    )


def test_export_over_an_older_one_replaces_it(llava: Llava, tmp_path: Path) -> None:
    """Engines of the older export must not stay beside the graphs of the newer one."""
    folder, data = tmp_path / "out", write_calibration(tmp_path)
    export_to(llava(), folder / "x.plan", "--calib-data", data, *RTX)
    old = read_files(folder)
    assert set(old) >= PLANS
    (folder / "other.txt").write_text("mine")
    export_to(llava(seed=1), folder / "x.plan", "--backend", "onnx", "--scheme", "fp16")
    manifest = read_manifest(folder)
    assert (manifest["scheme"], manifest["linears"]) == ("fp16", {})
    assert {path.name for path in folder.iterdir()} == GRAPHS | {"x.json", "x.processor", "other.txt"}
    assert read_files(folder)["x.onnx.data"] != old["x.onnx.data"]


def test_two_exports_share_a_folder(llava: Llava, tmp_path: Path) -> None:
    for name in ("a", "b.1"):
        export_to(llava(), tmp_path / f"{name}.plan", "--backend", "onnx", "--scheme", "fp16")
    written = {path.name for path in tmp_path.iterdir()}
    suffixes = ("json", "onnx", "onnx.data", "vision.onnx", "vision.onnx.data", "report.html", "processor")
    assert written == {f"{name}.{suffix}" for name in ("a", "b.1") for suffix in suffixes}


def test_useless_remains_of_a_killed_export_are_removed(llava: Llava, tmp_path: Path) -> None:
    work = tmp_path / ".x.work" / "out"
    work.mkdir(parents=True)
    (work / "x.plan").write_text("half")
    export_to(llava(), tmp_path / "x.plan", "--backend", "onnx", "--scheme", "fp16")
    assert {path.name for path in tmp_path.iterdir()} == GRAPHS | {"x.json", "x.processor"}


def test_work_dir_keeps_the_calibrated_checkpoint_and_the_files_of_the_user(llava: Llava, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    for seed in (0, 1):  # the second export replaces the checkpoint of the first
        result = export_onnx(llava(seed=seed), tmp_path / "out" / "x.plan", "--work-dir", work)
        assert result.exit_code == 0, result.stderr
    assert (work / "notes.txt").read_text() == "mine"
    assert {path.name for path in work.iterdir()} == {"notes.txt", "calibrated"}
    assert (work / "calibrated" / "calibration.json").exists()


def test_recipe_changes_single_blocks(llava: Llava, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "base: int4\n"
        "rules:\n"
        "- {match: 'language_model.*', scheme: W4A16, group_size: 64}\n"
        "- {match: 'language_model.model.layers.1.*', scheme: float}\n"
    )
    result = export_onnx(llava(), tmp_path / "out" / "x.plan", "--recipe", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    decoder = {name: scheme for name, scheme in manifest["linears"].items() if name.startswith("language_model.")}
    assert set(decoder.values()) == {"W4A16 g64"}
    assert {name.split(".")[3] for name in decoder} == {"0"}
    assert len(decoder) == 7
    assert manifest["scheme"] == "mine.yaml"
    graph = onnx.load(tmp_path / "out" / "x.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["language_model.model.layers.0.mlp.up_proj.weight_codes"] == onnx.TensorProto.INT4
    assert types["language_model.model.layers.1.mlp.up_proj.weight_transposed"] == onnx.TensorProto.FLOAT16
    blocks = {
        a.i for node in graph.node if node.op_type == "DequantizeLinear" for a in node.attribute if a.name == "block_size"
    }
    assert blocks == {64}


def test_limits_reach_the_graph(llava: Llava, tmp_path: Path) -> None:
    result = export_onnx(
        llava(), tmp_path / "out" / "x.plan", "--scheme", "fp16", "--max-length", "80", "--max-batch", "3", "--json"
    )
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest["limits"] == {"max_length": 80, "max_batch": 3, "max_images": 3}
    cache = next(v for v in manifest["interface"]["language"]["inputs"] if v["name"] == "past_key_values.0.key")
    assert cache["shape"] == ["batch", 2, 80, 64]


def test_from_python(llava: Llava, tmp_path: Path) -> None:
    """Paths may be strings or Path objects, and the result can be loaded."""
    result = qvlm_export.export(
        llava(), str(tmp_path / "x.plan"), backend="onnx", scheme="int8", calib_data=str(write_calibration(tmp_path))
    )
    assert result.manifest.path == tmp_path / "x.json"
    assert set(result.manifest.linears.values()) == {"W8A8"}
    with qvlm_export.load(tmp_path / "x.plan") as model:
        logits = model.logits(np.array([[1, 7, 8, 9]]))
    assert logits.shape == (1, 4, open_checkpoint(str(llava())).config.text.vocab_size)
    assert np.isfinite(logits).all()
    with pytest.raises(qvlm_export.UserError, match="--scheme int3: unknown"):
        qvlm_export.export(str(llava()), tmp_path / "y.plan", scheme="int3")


def test_the_source_checkpoint_is_not_changed(llava: Llava, tmp_path: Path) -> None:
    """Not even when the export is written to its folder."""
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    before = read_files(model)
    export_to(model, model / "x.plan", "--backend", "onnx", "--calib-data", write_calibration(tmp_path))
    after = read_files(model)
    assert {name: after[name] for name in before} == before


def test_dry_run_does_not_read_weights(llava: Llava, tmp_path: Path) -> None:
    """It reads headers only, so that a NaN in the weights does not stop it."""
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    set_weight(model, "language_model.model.norm.weight", np.nan)
    assert export_onnx(model, tmp_path / "out" / "x.plan", "--dry-run").exit_code == 0
