"""The commands with models on the Hub: what is downloaded when, what manifests record, and how a model is found again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import assert_refused, copy_checkpoint, export_onnx, put, set_weight
from paths import ROOT, TINY
from safetensors.numpy import load_file, save_file
from shell import restore_interrupts
from typer.testing import CliRunner, Result

from qvlm_export.cli.evaluate import app as evaluate_app
from qvlm_export.cli.validate import app as validate_app
from qvlm_export.engines.manifest import seal
from qvlm_export.pipeline.fetch import fetch_weights
from qvlm_export.pipeline.fingerprint import work_fingerprint
from qvlm_export.pipeline.preparation.prepare import ExportOptions, prepare_export
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.pipeline.work_folder import work_folder
from tools.compatibility.hub_server import Hub, sha256

NAME, COMMIT, OLDER = "someone/llava", "1" * 40, "2" * 40
Llava = Callable[..., Path]


@pytest.fixture
def model(hub: Hub, llava: Llava) -> Path:
    """The folder whose files the repository `someone/llava` has, in two commits."""
    hub.add_folder(NAME, llava(), revisions={"v1": OLDER})
    return llava()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "new" / "engine.plan"


def export(plan: Path, *arguments: object, model: str = NAME) -> Result:
    return export_onnx(model, plan, "--scheme", "fp16", *arguments)


def read_model(plan: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))["model"]
    return content


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


# Dry run


def test_a_dry_run_downloads_no_weights(hub: Hub, model: Path, absent: Path) -> None:
    result = export(absent, "--dry-run")
    assert result.exit_code == 0, result.stderr
    end = "Nothing was written, except configuration and tokenizer to the Hub's cache where it lacked them.\n"
    assert result.stdout.endswith(end)
    assert f"on the Hub: {NAME}, commit {COMMIT}" in result.stdout
    assert result.stderr == ""
    assert hub.served_weights() < weights_bytes(model) / 2


def test_a_dry_run_finds_by_headers_what_it_finds_by_files(model: Path, absent: Path) -> None:
    remote, local = (json.loads(export(absent, "--dry-run", "--json", model=name).stdout) for name in (NAME, str(model)))
    assert (remote["download_bytes"], remote["hub"]) == (weights_bytes(model), [{"repository": NAME, "commit": COMMIT}])
    assert (local["download_bytes"], local["hub"]) == (0, [])
    measured = {"seconds", "estimate", "calibration_floor_seconds", "model", "download_bytes", "hub"}
    assert [key for key in local if key not in measured and local[key] != remote[key]] == []


def test_a_dry_run_of_a_local_folder_says_that_nothing_was_written(model: Path, absent: Path) -> None:
    assert export(absent, "--dry-run", model=str(model)).stdout.endswith("Nothing was written.\n")


# Checks before the download


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: edit_config(folder, put("text_config", "num_hidden_layers", 3)), ["lacks the tensor", "layers.2."]),
        (lambda folder: edit_config(folder, put("text_config", "intermediate_size", 768)), ["has shape", "belong together"]),
        (lambda folder: edit_config(folder, put("", "model_type", "bert")), ["model_type is 'bert'"]),
        (lambda folder: store_as(folder, "int8"), ["is int8; give an unquantized checkpoint"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["its processor cannot be loaded"]),
        (lambda folder: (folder / "config.json").unlink(), ["holds no config.json"]),
    ],
)
def test_bad_checkpoints_are_refused_before_their_weights_are_downloaded(
    hub: Hub, llava: Llava, absent: Path, edit: Callable[[Path], object], words: list[str]
) -> None:
    tmp_path = absent.parents[1]
    folder = copy_checkpoint(llava(), tmp_path / "damaged")
    edit(folder)
    hub.add_folder(NAME, folder)
    for arguments in ((), ("--dry-run",)):
        assert_refused(export(absent, *arguments), *words)
    assert hub.served_weights() < weights_bytes(folder) / 2


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    edit(content)
    (folder / "config.json").write_text(json.dumps(content))


def store_as(folder: Path, dtype: str) -> None:
    path = folder / "model.safetensors"
    save_file({name: array.astype(dtype) for name, array in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--revision", "v2"], ["someone/llava has no branch, tag or commit v2"]),
        (["--memory", "0.001"], ["--memory 0.001"]),
        (["--max-length", "4"], ["--max-length 4"]),
        (["--target", "sm89"], ["--target"]),
    ],
)
def test_bad_options_are_refused_before_the_download(
    hub: Hub, model: Path, absent: Path, arguments: list[str], words: list[str]
) -> None:
    assert_refused(export(absent, *arguments), *words)
    assert hub.served_weights() < weights_bytes(model) / 2


def test_a_download_that_the_disk_has_no_room_for_is_refused(
    hub: Hub, model: Path, absent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_export(ExportOptions(NAME, absent, scheme="fp16", backend="onnx"))
    usage, needed = shutil.disk_usage("/"), prepared.disk_bytes + prepared.download_bytes
    assert prepared.download_bytes == weights_bytes(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    prepare_export(prepared.options)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    assert_refused(export(absent), "are needed on this disk", "HF_HOME")
    assert hub.served_weights() < weights_bytes(model)


@pytest.mark.usefixtures("model")
def test_a_revision_of_a_local_folder_is_refused(absent: Path) -> None:
    for name in ("tiny", str(TINY)):
        assert_refused(export(absent, "--revision", "main", model=name), "--revision main", "local folder")


# Export


def test_an_export_downloads_and_records_the_model(hub: Hub, model: Path, plan: Path) -> None:
    hub.drops["model.safetensors"] = [100_000, 1000]
    result = export(plan)
    assert result.exit_code == 0, result.stderr
    assert f"MiB of {NAME} to" in result.stderr
    content = (model / "model.safetensors").read_bytes()
    weights = [{"name": "model.safetensors", "bytes": len(content), "sha256": sha256(content)}]
    expected = {
        "name": NAME,
        "source": "hub",
        "repository": NAME,
        "commit": COMMIT,
        "weights": weights,
        "model_type": "llava",
    }
    assert read_model(plan) == expected
    served = hub.served_weights()
    assert export(plan, "--json", "--revision", "v1").exit_code == 0
    assert read_model(plan) == {**expected, "commit": OLDER}
    assert hub.served_weights() <= served + 2 * 2**17  # of the other commit, whose file is the same, the header only


def test_an_export_from_the_hub_is_the_export_of_the_same_folder(model: Path, plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "engine.plan"
    assert (export(plan).exit_code, export(other, model=str(model)).exit_code) == (0, 0)
    for name in ("engine.onnx", "engine.onnx.data", "engine.vision.onnx", "engine.vision.onnx.data"):
        assert (plan.parent / name).read_bytes() == (other.parent / name).read_bytes()


def test_quiet_with_json(model: Path, plan: Path) -> None:
    result = export(plan, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["seconds"]["download"] >= 0
    assert model.is_dir()


def test_a_failed_download_is_one_line_and_the_next_run_fetches_the_rest(
    hub: Hub, llava: Llava, tmp_path: Path, plan: Path
) -> None:
    folder = copy_checkpoint(llava(), tmp_path / "sharded")
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for number in range(3):
        name = f"model-0000{number + 1}-of-00003.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    hub.add_folder(NAME, folder)
    assert export(plan, "--dry-run").exit_code == 0
    headers = hub.served_weights()
    last = "model-00003-of-00003.safetensors"
    hub.drops[last] = [2**17, 50_000] + [0] * 50  # the first is the header's
    assert_refused(
        export(plan, "--json"), "the download stopped", f"{NAME}/{last}", "the same command fetches only the rest"
    )
    assert not plan.parent.exists()
    hub.drops.clear()
    assert export(plan).exit_code == 0
    assert hub.served_weights() - weights_bytes(folder) <= 3 * headers  # every run reads headers of what is not there
    assert sorted(file["name"] for file in read_model(plan)["weights"]) == sorted(set(weight_map.values()))


def fingerprint(plan: Path, model: str, revision: str | None = None) -> dict[str, str]:
    """What --resume compares."""
    prepared = prepare_export(ExportOptions(model, plan, revision, "fp16", backend="onnx"))
    before = work_fingerprint(prepared.checkpoint, prepared.linears, prepared.samples, "rtn", "cpu")
    checkpoint = fetch_weights(prepared.checkpoint, Reporter(quiet=True))
    assert work_fingerprint(checkpoint, prepared.linears, prepared.samples, "rtn", "cpu") == before
    return before


def test_the_fingerprint_tells_commits_apart_and_not_ways_to_name_one(
    hub: Hub, model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint(plan, NAME)
    assert fingerprint(plan, NAME, "main") == fingerprint(plan, NAME, COMMIT) == first
    other = fingerprint(plan, NAME, "v1")
    assert {key for key in first if first[key] != other[key]} == {"the checkpoint's commit"}
    shutil.rmtree(plan.parents[1] / "hub")  # downloaded again, the files are younger
    assert fingerprint(plan, NAME) == first
    assert hub.requests
    monkeypatch.chdir(model.parent)
    assert (
        fingerprint(plan, str(model))
        == fingerprint(plan, model.name)
        == fingerprint(plan, f"../{model.parent.name}/{model.name}")
    )


def test_a_work_folder_that_cannot_be_used_is_refused_before_the_download(hub: Hub, model: Path, plan: Path) -> None:
    with work_folder(plan, None) as work:
        assert_refused(export(plan), "another export is at work here")
        work.begin({"the checkpoint's commit": f"{NAME} {OLDER}"}, resume=False)
        (work.staging / "a").touch()
        work.record_stage("a", "key", [work.staging / "a"])
    assert_refused(export(plan), "holds the unfinished work of an earlier export", "--resume")
    assert_refused(export(plan, "--resume"), "the checkpoint's commit changed since the work")
    assert hub.served_weights() < weights_bytes(model)


# The manifest, and what reads it


def validate(plan: Path, *arguments: object) -> Result:
    return CliRunner().invoke(validate_app, [str(plan), "--json", "--limit", "1", *map(str, arguments)])


def test_validate_compares_with_the_exported_commit(hub: Hub, model: Path, llava: Llava, plan: Path) -> None:
    assert export(plan).exit_code == 0
    repository = hub.add_folder(NAME, llava(seed=1), commit="3" * 40)  # main moves on
    repository.revisions[COMMIT] = COMMIT
    result = validate(plan)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["reference"] == NAME
    assert_refused(validate(plan, "--revision", "main"), "--revision main", "is of --reference")
    other = validate(plan, "--reference", NAME, "--revision", "main", "--min-agreement", "1")
    assert (other.exit_code, model.is_dir()) == (1, True), other.stderr


@pytest.mark.parametrize("place", [".", "..", "cwd"])
def test_validate_finds_a_local_folder_by_its_name(
    llava: Llava, tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    plan.parent.mkdir()
    parent = tmp_path / "elsewhere" if place == "cwd" else plan.parent / place
    folder = copy_checkpoint(llava(), parent.resolve() / "my-llava")
    assert export(plan, model=str(folder)).exit_code == 0
    assert str(tmp_path) not in plan.with_suffix(".json").read_text()
    weights = [{"name": "model.safetensors", "bytes": (folder / "model.safetensors").stat().st_size}]
    assert read_model(plan) == {"name": "my-llava", "source": "folder", "weights": weights, "model_type": "llava"}
    if place == "cwd":
        assert_refused(validate(plan), "my-llava: no such folder here or beside", "--reference says where it is now")
        assert validate(plan, "--reference", folder).exit_code == 0
        monkeypatch.chdir(parent)
    assert validate(plan).exit_code == 0
    set_weight(folder, "language_model.lm_head.weight", 0.5, "float32")
    assert_refused(validate(plan), "its model.safetensors is not the exported one", "--reference")


def test_the_same_folder_named_differently_gives_the_same_manifest(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_checkpoint(llava(), tmp_path / "my-llava")
    manifests = []
    for number, (name, cwd) in enumerate(
        [(str(folder), tmp_path), ("my-llava", tmp_path), (".", folder), ("../my-llava", folder)]
    ):
        monkeypatch.chdir(cwd)
        plan = tmp_path / str(number) / "engine.plan"
        assert export(plan, model=name).exit_code == 0
        manifests.append(plan.with_suffix(".json").read_bytes())
    assert len(set(manifests)) == 1


def test_manifests_of_older_versions_name_what_was_typed(llava: Llava, plan: Path) -> None:
    assert export(plan, model=str(llava())).exit_code == 0
    manifest = json.loads(plan.with_suffix(".json").read_text())
    manifest["model"] = {"name": str(llava()), "model_type": "llava"}
    plan.with_suffix(".json").write_text(json.dumps(seal(manifest)))
    assert validate(plan).exit_code == 0


def test_eval_takes_a_model_of_the_hub_and_a_revision(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Bad data ends the command before the model is looked for; a bad revision ends it before weights are downloaded."""
    (tmp_path / "set").mkdir()
    arguments = ["--task", "hateful-memes", "--data", str(tmp_path / "set"), "--model-form", "float"]
    result = CliRunner().invoke(evaluate_app, [NAME, *arguments, "--revision", "v1"])
    assert_refused(result, str(tmp_path / "set"))
    assert hub.requests == []
    assert model.is_dir()


# A process of its own, as users start it


def test_an_interrupted_download_is_one_line_and_is_continued(hub: Hub, model: Path, plan: Path) -> None:
    """Ctrl-C in the middle of the file."""
    cache = plan.parents[1] / "hub"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from qvlm_export.cli.commands import export; export()"]
    command += ["--model", NAME, "--out", str(plan), "--backend", "onnx", "--scheme", "fp16"]
    hub.stalls["model.safetensors"] = 200_000
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": restore_interrupts}
    with subprocess.Popen(command, env=variables, **pipes) as process:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 190_000 for path in cache.rglob("*.incomplete")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        hub.stalls.clear()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    line = r"interrupted; \d\.\d MiB of the download are missing, the same command fetches only the rest"
    assert re.fullmatch(line, errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert not plan.parent.exists()
    before = hub.served_weights()
    assert export(plan).exit_code == 0
    assert hub.served_weights() - before < weights_bytes(model) - 190_000 + 2**17
