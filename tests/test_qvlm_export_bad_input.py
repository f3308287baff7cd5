"""Bad input to qvlm-export: one line on stderr with cause and cure, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import PICTURE, assert_refused, copy_checkpoint, export_to, read_files, run_export, write_calibration
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

import engines.backend
from qvlm_export import pipeline
from qvlm_export.cli_export import app

Llava = Callable[..., Path]
Edit = Callable[[dict[str, Any]], object]
SCRIPT = Path(sys.executable).with_name("qvlm-export")
UP_PROJ = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the export is to go; after the test the folder must not even have been made."""
    yield tmp_path / "new" / "engine.plan"
    assert not (tmp_path / "new").exists()


@pytest.fixture
def checkpoint(llava: Llava, tmp_path: Path) -> Path:
    """A good checkpoint to be damaged."""
    return copy_checkpoint(llava(), tmp_path / "checkpoint")


def export_onnx(model: Path, out: Path, *arguments: object) -> Result:
    """An export without engines, calibrated with two samples."""
    data = write_calibration(out.parent.parent)
    return run_export(model, out, "--backend", "onnx", "--calib-data", data, *arguments)


def real_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed script in a process of its own."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


# The command line


def test_real_command_refuses_model_that_is_not_there(out: Path) -> None:
    done = real_command("--model", "./no-such-folder", "--out", out)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --model ./no-such-folder: no such folder, and neither an alias (tiny, llava-7b, llava-13b) nor a Hugging "
        "Face id\n"
    )


def test_real_command_refuses_damaged_weights(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = real_command("--model", checkpoint, "--out", out, "--calib-data", write_calibration(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {weights}: not a readable safetensors file")
    assert done.stderr.endswith("download it again\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing option '--model'"]),
        (["--model", "x"], ["Missing option '--out'"]),
        (["--model", "x", "--out", "x.plan", "--samples", "0"], ["--samples", "greater than or equal to 1"]),
        (["--model", "x", "--out", "x.plan", "--samples", "many"], ["--samples", "integer"]),
        (["--model", "x", "--out", "x.plan", "--max-length", "1"], ["--max-length", "greater than or equal to 2"]),
        (["--model", "x", "--out", "x.plan", "--max-batch", "0"], ["--max-batch", "greater than or equal to 1"]),
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
        *[
            (["--scheme", f"sim-{name}"], [f"--scheme sim-{name}", "no kernel", "use int4 or int8"])
            for name in ("w6a6", "w4a4", "w4a8", "w3a16")
        ],
        (["--backend", "tensorflow"], ["--backend tensorflow", "auto, tensorrt, tensorrt-rtx, onnx"]),
        (["--backend", "onnx", "--target", "sm89"], ["--target sm89", "builds no engine"]),
        (["--backend", "tensorrt-rtx", "--target", "sm42"], ["--target sm42", "sm80, sm86, sm89"]),
        (["--backend", "tensorrt-rtx", "--target", "sm89", "--target", "sm75"], ["--target sm75", "no INT4", "int8"]),
        (["--calib-data", "/no/such.jsonl"], ["/no/such.jsonl", "No such file"]),
        (["--recipe", "/no/such.yaml"], ["/no/such.yaml", "No such file"]),
        (["--max-length", "36"], ["--max-length 36", "37 (one image and a token) to 512 tokens"]),
        (["--max-length", "513"], ["--max-length 513", "to 512 tokens"]),
        (["--max-length", "40"], ["calibration.jsonl:1", "tokens long, --max-length is 40", "raise the limit"]),
        (["--samples", "3"], ["--samples 3", "holds only 2", "add lines"]),
    ],
)
def test_bad_option(llava: Llava, out: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(export_onnx(llava(), out, *arguments), *words)


def test_int8_may_have_the_target_without_int4(llava: Llava, out: Path) -> None:
    result = export_onnx(
        llava(), out, "--backend", "tensorrt-rtx", "--target", "sm75", "--scheme", "int8", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["targets"] == ["sm75"]


def test_no_backend_installed(llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.backend, "_installed", lambda _: False)
    assert_refused(export_onnx(llava(), out, "--backend", "auto"), "no TensorRT is installed", "pip install", "onnx")
    assert_refused(export_onnx(llava(), out, "--backend", "tensorrt-rtx"), "not installed", "qvlm-export[rtx]")
    assert_refused(export_onnx(llava(), out, "--backend", "tensorrt"), "not installed", "qvlm-export[gpu]")


def test_full_tensorrt_without_gpu(llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.backend, "_installed", lambda _: True)
    monkeypatch.setattr(engines.backend, "gpu_present", lambda: False)
    assert_refused(export_onnx(llava(), out, "--backend", "tensorrt"), "needs an NVIDIA GPU", "--backend tensorrt-rtx")


def test_python_callers_get_the_same_refusals(llava: Llava, tmp_path: Path) -> None:
    for options, words in (({"samples": 0}, "--samples 0"), ({"max_batch": -1}, "--max-batch -1")):
        with pytest.raises(pipeline.UserError, match=f"{words}: must be at least 1"):
            pipeline.plan_export(pipeline.ExportOptions(str(llava()), tmp_path / "x.plan", backend="onnx", **options))


# Where to write


@pytest.mark.parametrize("name", ["engine", "engine.onnx", ".plan", "engine.plan.gz"])
def test_out_is_no_plan(llava: Llava, tmp_path: Path, name: str) -> None:
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
    """Not even root can write there."""
    assert_refused(run_export(llava(), "/proc/new/engine.plan", "--backend", "onnx"), "cannot be written")


def test_out_has_a_name_beyond_what_disks_take(llava: Llava, tmp_path: Path) -> None:
    assert_refused(run_export(llava(), tmp_path / f"{'x' * 240}.plan", "--backend", "onnx"), "too long", "shorten")
    assert_refused(run_export(llava(), tmp_path / ("x" * 300) / "x.plan", "--backend", "onnx"), "cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_out_would_replace_a_file_of_somebody_else(checkpoint: Path) -> None:
    """X.plan comes with X.json: config.plan beside a checkpoint's config.json must not take it away."""
    before = read_files(checkpoint)
    refused = run_export(checkpoint, checkpoint / "config.plan", "--backend", "onnx")
    assert_refused(refused, "config.json", "did not write", "choose another name")
    assert read_files(checkpoint) == before


@pytest.mark.parametrize("foreign", ["photo.jpg", "config.json"])
def test_work_dir_holds_files_of_somebody_else(llava: Llava, out: Path, tmp_path: Path, foreign: str) -> None:
    kept = tmp_path / "work" / "calibrated"
    kept.mkdir(parents=True)
    (kept / foreign).write_text("mine")
    refused = export_onnx(llava(), out, "--work-dir", tmp_path / "work")
    assert_refused(refused, "--work-dir", str(kept), "did not write", "choose another")
    assert read_files(tmp_path / "work") == {f"calibrated/{foreign}": b"mine"}


def test_work_dir_is_a_file(llava: Llava, out: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("mine")
    assert_refused(export_onnx(llava(), out, "--work-dir", tmp_path / "work"), "--work-dir", "Not a directory")


def test_disk_too_small(llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40 - 4096, free=4096))
    assert_refused(export_onnx(llava(), out), str(out.parent), "are needed", "0.0 GiB are free", "another disk")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        pipeline.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_fills_up_while_writing(llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "write_graph", fail)
    assert_refused(export_onnx(llava(), out), str(out.parent), "the disk is full", "are needed", "free some")


def test_numpy_writes_short_on_a_full_disk(llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's tofile raises an OSError without a number; the free space tells what it was."""

    def fail(*_: object) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40, free=0))
        raise OSError("131072 requested and 7936 written")

    monkeypatch.setattr(pipeline, "write_graph", fail)
    assert_refused(export_onnx(llava(), out), str(out.parent), "the disk is full")


def test_interrupted(llava: Llava, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_graph", interrupt)
    result = export_onnx(llava(), out)
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


# The model


def test_model_is_a_file(out: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    assert_refused(export_onnx(tmp_path / "model.gguf", out), "is a file", "folder")


def test_model_is_an_empty_folder(out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(export_onnx(tmp_path / "empty", out), "no config.json", "give the folder of a LLaVA")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not readable as JSON", "download it again"]),
        ("[" * 100_000, ["not readable as JSON"]),
        ("[1, 2]", ["no JSON object"]),
        ("null", ["no JSON object"]),
        ('{"model_type": "bert"}', ["model_type is 'bert'", "supported: llava"]),
        ("{}", ["model_type is None", "supported: llava"]),
    ],
)
def test_config_is_no_llava(checkpoint: Path, out: Path, content: str, words: list[str]) -> None:
    (checkpoint / "config.json").write_text(content)
    assert_refused(export_onnx(checkpoint, out), str(checkpoint / "config.json"), *words)


def test_config_is_not_utf8(checkpoint: Path, out: Path) -> None:
    (checkpoint / "config.json").write_bytes(b'{"model_type": "\xff"}')
    assert_refused(export_onnx(checkpoint, out), "config.json", "not readable as JSON")


def put(section: str, key: str, value: object) -> Edit:
    """An edit of config.json."""
    return lambda config: (config[section] if section else config).update({key: value})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("vision_config", "model_type", "siglip_vision_model"), ["vision_config.model_type", "siglip", "clip"]),
        (put("text_config", "model_type", "mistral"), ["text_config.model_type is 'mistral'", "supports llama"]),
        (put("vision_config", "hidden_act", "swish"), ["vision_config.hidden_act is 'swish'", "quick_gelu"]),
        (put("text_config", "hidden_act", "gelu"), ["text_config.hidden_act is 'gelu'", "silu"]),
        (put("", "projector_hidden_act", "relu6"), ["projector_hidden_act is 'relu6'", "gelu"]),
        (put("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}), ["rope_type is 'linear'", "default"]),
        (
            put("text_config", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            ["rope_type is 'dynamic'", "default"],
        ),
        (put("", "vision_feature_layer", [-2, -5]), ["vision_feature_layer is [-2, -5]", "single layer"]),
        (put("", "vision_feature_layer", 9), ["vision_feature_layer is 9", "layer of the tower"]),
        (put("", "vision_feature_layer", 0), ["vision_feature_layer is 0"]),
        (put("", "vision_feature_select_strategy", "cls"), ["vision_feature_select_strategy", "cls"]),
        (put("", "image_token_index", 512), ["image_token_index is 512", "vocab_size 512"]),
        (put("vision_config", "image_size", 50), ["vision_config.image_size is 50", "patch_size 8"]),
        (put("vision_config", "image_size", [48, 48]), ["vision_config.image_size is [48, 48]", "whole numbers"]),
        (put("vision_config", "patch_size", 0), ["vision_config.patch_size is 0", "above 0"]),
        (put("vision_config", "num_channels", 4), ["vision_config.num_channels is 4", "supports 3"]),
        (put("vision_config", "num_attention_heads", 3), ["vision_config.num_attention_heads is 3"]),
        (put("text_config", "num_attention_heads", 0), ["text_config.num_attention_heads is 0", "above 0"]),
        (put("text_config", "num_key_value_heads", 3), ["text_config.num_key_value_heads is 3", "4 heads"]),
        (put("text_config", "num_hidden_layers", -1), ["text_config.num_hidden_layers is -1", "above 0"]),
        (put("text_config", "head_dim", 63), ["text_config.head_dim is 63", "even"]),
        (put("text_config", "pad_token_id", 10**6), ["text_config.pad_token_id is 1000000"]),
        (put("text_config", "hidden_size", "wide"), ["not a valid configuration", "hidden_size", "int"]),
        (put("text_config", "mlp_bias", None), ["not a valid configuration", "mlp_bias"]),
        (put("", "text_config", [1]), ["not a valid configuration", "text_config"]),
    ],
)
def test_config_beyond_what_the_graphs_express(
    llava: Llava, out: Path, tmp_path: Path, edit: Edit, words: list[str]
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert_refused(export_onnx(model, out), str(model / "config.json"), *words)


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (put("text_config", "intermediate_size", 768), "language_model.model.layers.0.mlp."),
        (put("text_config", "vocab_size", 640), "language_model.model.embed_tokens.weight"),
        (put("vision_config", "image_size", 56), "vision_tower.vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_shape_contradicts_config(llava: Llava, out: Path, tmp_path: Path, edit: Edit, tensor: str) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", edit)
    assert_refused(export_onnx(model, out), tensor, "has shape", "config.json says", "do not belong together")


def test_more_layers_in_config_than_in_weights(llava: Llava, out: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint", put("text_config", "num_hidden_layers", 3))
    assert_refused(export_onnx(model, out), "lacks the tensor language_model.model.layers.2.", "incomplete")


def test_no_group_divides_the_hidden_size(llava: Llava, out: Path) -> None:
    model = llava(text={"hidden_size": 96, "head_dim": 24})
    q_proj = "language_model.model.layers.0.self_attn.q_proj"
    assert_refused(export_onnx(model, out), q_proj, "128 nor 64 does not divide its 96 inputs", "--scheme int8")
    assert export_onnx(model, out, "--scheme", "int8", "--dry-run").exit_code == 0


# The weights


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: (2**60).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"dtype":"F16"', b'"dtype":"F17"'),
        lambda data: b"<!DOCTYPE html>" + data,
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
    ids=["empty", "header cut", "one byte short", "one byte long", "huge header", "unknown type", "web page", "LFS"],
)
def test_damaged_safetensors(checkpoint: Path, out: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert_refused(export_onnx(checkpoint, out), f"{weights}: not a readable safetensors file", "download it again")


def test_unsupported_type_of_tensor(checkpoint: Path, out: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"dtype":"F16"', b'"dtype":"U16"'))
    assert_refused(export_onnx(checkpoint, out), "has type U16", "convert it")


def test_quantized_checkpoint(checkpoint: Path, out: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {UP_PROJ: tensors[UP_PROJ].astype(np.int8)}, checkpoint / "model.safetensors", {"format": "pt"})
    assert_refused(export_onnx(checkpoint, out), UP_PROJ, "is int8", "unquantized checkpoint")


def test_no_weights(checkpoint: Path, out: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert_refused(export_onnx(checkpoint, out), str(checkpoint), "no weights", "model.safetensors")


@pytest.mark.parametrize("name", [UP_PROJ, "vision_tower.pre_layrnorm.bias", "language_model.lm_head.weight"])
def test_missing_tensor(checkpoint: Path, out: Path, name: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    canonical = name.replace("vision_tower.", "vision_tower.vision_model.")
    assert_refused(export_onnx(checkpoint, out), "lacks", canonical)


def test_missing_shard(llava: Llava, out: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(max_shard_size="1MB"), tmp_path / "checkpoint")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(export_onnx(model, out), f"{shard}: this shard is named by", "missing", "download it")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ["not a weight index"]),
        ("[]", ["not a weight index"]),
        ("{}", ["not a weight index", "weight_map"]),
        ('{"weight_map": {"a": ["b"]}}', ["not a weight index"]),
        ('{"weight_map": {"a": 1}}', ["names the file 1", "not in this folder"]),
        ('{"weight_map": {"a": "../b.safetensors"}}', ["names the file '../b.safetensors'", "not in this folder"]),
        ('{"weight_map": {"a": "/etc/passwd"}}', ["names the file '/etc/passwd'", "not in this folder"]),
        ('{"weight_map": {}}', ["lacks the tensor", "incomplete"]),
    ],
)
def test_damaged_index(checkpoint: Path, out: Path, index: str, words: list[str]) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert_refused(export_onnx(checkpoint, out), *words)


class Payload:
    """Unpickled with the code that a pickle may carry, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "zip beside tensors", "before torch 1.6", "bare pickle"])
def test_code_in_a_pickle_does_not_run(checkpoint: Path, out: Path, tmp_path: Path, form: str) -> None:
    trap, payload = checkpoint / "pytorch_model.bin", Payload(tmp_path / "pwned")
    (checkpoint / "model.safetensors").unlink()
    if form == "bare pickle":
        trap.write_bytes(pickle.dumps(payload))
    else:
        content = {"a": torch.zeros(1), "b": payload} if form == "zip beside tensors" else payload
        torch.save(content, trap, _use_new_zipfile_serialization=form != "before torch 1.6")
    refused = export_onnx(checkpoint, out)
    assert not payload.path.exists()
    assert_refused(refused, f"{trap}:", "was not opened, as it could run code", "safetensors")


def test_the_payload_would_work(tmp_path: Path) -> None:
    """Otherwise the test above proved nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "pwned")))  # noqa: S301
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], ["no dictionary of tensors"]),
        ({"state_dict": {"a": torch.zeros(1)}}, ["'state_dict' is no plain tensor"]),
        ({1: torch.zeros(1)}, ["1 is no plain tensor"]),
        ({"a": torch.eye(3).to_sparse()}, ["'a' is no plain tensor"]),
        ({"a": torch.zeros(3, device="meta")}, ["'a' is no plain tensor"]),
        ({"a": torch.zeros(3)}, ["lacks the tensor", "incomplete"]),
    ],
    ids=["list", "nested", "number for a name", "sparse", "meta", "too few"],
)
def test_torch_file_without_a_model(checkpoint: Path, out: Path, content: object, words: list[str]) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(content, checkpoint / "pytorch_model.bin")
    assert_refused(export_onnx(checkpoint, out), *words)


@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_truncated_torch_file(checkpoint: Path, out: Path, kept: int) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save({"a": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(export_onnx(checkpoint, out), f"{path}: not a readable torch checkpoint", "download it again")


def set_weight(checkpoint: Path, name: str, value: float, dtype: str = "float16") -> None:
    """Writes `value` into one place of the tensor `name`, all tensors stored as `dtype`."""
    tensors = {key: array.astype(dtype) for key, array in load_file(checkpoint / "model.safetensors").items()}
    tensors[name].reshape(-1)[5] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_is_not_finite(checkpoint: Path, out: Path, scheme: str, value: float) -> None:
    set_weight(checkpoint, UP_PROJ, value)
    assert_refused(export_onnx(checkpoint, out, "--scheme", scheme), f"{UP_PROJ}: holds NaN or infinite values")


@pytest.mark.parametrize("scheme", ["int4", "fp16"])
@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.0.layer_norm1.bias",
        "vision_tower.embeddings.class_embedding",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ],
)
def test_no_tensor_is_too_small_to_be_checked(checkpoint: Path, out: Path, name: str, scheme: str) -> None:
    set_weight(checkpoint, name, np.nan)
    canonical = name.replace("vision_tower.", "vision_tower.vision_model.")
    assert_refused(export_onnx(checkpoint, out, "--scheme", scheme), f"{canonical}: holds NaN or infinite values")


def test_weight_beyond_float16(checkpoint: Path, out: Path) -> None:
    set_weight(checkpoint, UP_PROJ, 1e6, "float32")
    assert_refused(export_onnx(checkpoint, out, "--scheme", "fp16"), UP_PROJ, "beyond float16's 65504")


# The processor


def edit_processor(edit: Edit) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "processor_config.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize("scheme", ["int4", "fp16"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "processor_config.json").unlink(), ["cannot be loaded", "processor files"]),
        (lambda folder: (folder / "processor_config.json").write_text("[]"), ["cannot be loaded"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["cannot be loaded", "tokenizer"]),
        (lambda folder: (folder / "tokenizer.json").write_text('"x"'), ["cannot be loaded"]),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), ["no end-of-sequence token"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("Hello"), ["does not place <image>"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ a.b.c }}"), ["'a' is undefined"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"), ["its processor fails"]),
        (edit_processor(put("", "patch_size", 16)), ["9 image tokens", "the model takes 36"]),
        (edit_processor(put("", "patch_size", None)), ["its processor fails"]),
        (edit_processor(put("", "processor_class", "Other")), ["no processor of pictures and text"]),
        (edit_processor(put("image_processor", "crop_size", {"height": 96, "width": 96})), ["[3, 96, 96]", "[3, 48, 48]"]),
        (edit_processor(put("image_processor", "do_center_crop", False)), ["the model takes [3, 48, 48]"]),
        (edit_processor(put("image_processor", "image_std", [0, 0, 0])), ["NaN or infinite", "image_std"]),
    ],
)
def test_processor_does_not_fit(
    checkpoint: Path, out: Path, scheme: str, damage: Callable[[Path], object], words: list[str]
) -> None:
    """For fp16 too, which needs no samples: it must not show after the engines were built."""
    damage(checkpoint)
    assert_refused(export_onnx(checkpoint, out, "--scheme", scheme, "--dry-run"), str(checkpoint), *words)


# Calibration data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no samples", "image and prompt"]),
        ("\n  \n", ["holds no samples"]),
        ('{"prompt": "a"}\n{"prompt": ', [":2: not JSON", "one JSON object a line"]),
        ("prompt,image\n", [":1: not JSON"]),
        ("[" * 100_000, [":1: not JSON"]),
        ("1" * 5000, [":1: not JSON"]),
        ("[]", [":1: the line", "dictionary"]),
        ('{"image": "a.png"}', [":1: prompt: Field required", '"prompt": text']),
        ('{"prompt": 5}', [":1: prompt", "string"]),
        ('{"prompt": "a", "image": 5}', [":1: image", "string"]),
        ('{"prompt": "a", "answer": ["b"]}', [":1: answer", "string"]),
        ('{"prompt": "a"}\n\n{"prompt": "<image> b"}', [":3: has 1 times <image> for 0 pictures", "leave <image> out"]),
        ('{"prompt": "a", "answer": "<image>"}', [":1: has 1 times <image>"]),
        ('{"prompt": "\\ud800"}', [":1: holds half a surrogate pair", "UTF-8"]),
        ('{"prompt": "a", "answer": "\\ud800"}', [":1: holds half a surrogate pair"]),
        (json.dumps({"prompt": "word " * 600}), [":1: is ", "tokens long, --max-length is 512", "shorten it"]),
        (json.dumps({"prompt": "a", "answer": "word " * 600}), ["tokens long, --max-length is 512"]),
    ],
)
def test_bad_jsonl(llava: Llava, out: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    assert_refused(run_export(llava(), out, "--backend", "onnx", "--calib-data", path), str(path), *words)


def test_jsonl_is_not_utf8(llava: Llava, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes('{"prompt": "Où?"}'.encode("latin-1"))
    refused = run_export(llava(), out, "--backend", "onnx", "--calib-data", path)
    assert_refused(refused, str(path), "is not UTF-8 text", "save it as UTF-8")


def test_samples_without_pictures_cannot_calibrate_the_tower(llava: Llava, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "a"}\n')
    refused = run_export(llava(), out, "--backend", "onnx", "--calib-data", path)
    assert_refused(refused, "vision_tower.vision_model.encoder.layers.0.", "no calibration sample reached it")


def write_truncated(path: Path) -> None:
    path.write_bytes(PICTURE.read_bytes()[:-200])


def write_animation(path: Path) -> None:
    frames = [Image.new("L", (32, 32), grey) for grey in (0, 128, 255)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, ["there is no picture", "relative to that file"]),
        (lambda path: path.mkdir(), ["cannot be read", "Is a directory"]),
        (write_truncated, ["cannot be read", "truncated", "save it again"]),
        (lambda path: path.write_bytes(b""), ["is not a picture", "PNG, JPEG or WebP"]),
        (lambda path: path.write_text("<svg/>"), ["is not a picture", "PNG, JPEG or WebP"]),
        (lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"), ["1x1 pixels", "too small"]),
        (lambda path: Image.new("RGB", (4000, 8)).save(path, "PNG"), ["4000x8 pixels", "strip"]),
        (lambda path: Image.new("1", (10_000, 10_000)).save(path, "PNG"), ["10000x10000", "below 64 megapixels"]),
        (lambda path: Image.new("1", (20_000, 20_000)).save(path, "PNG"), ["larger than 64 megapixels", "scale it down"]),
        (lambda path: Image.new("CMYK", (32, 32)).save(path, "JPEG"), ["colour mode CMYK", "convert it to RGB"]),
        (write_animation, ["animated (3 frames)", "save the frame"]),
    ],
    ids=["missing", "folder", "truncated", "empty", "text", "1 pixel", "strip", "100 MP", "400 MP", "CMYK", "GIF"],
)
def test_bad_picture(llava: Llava, out: Path, tmp_path: Path, write: Callable[[Path], object], words: list[str]) -> None:
    write(tmp_path / "picture.png")
    data = tmp_path / "pictures.jsonl"
    data.write_text(f'{{"prompt": "a"}}\n{json.dumps({"image": "picture.png", "prompt": "What is it?"})}\n')
    refused = run_export(llava(), out, "--backend", "onnx", "--calib-data", data)
    assert_refused(refused, f"{data}:2: ", str(tmp_path / "picture.png"), *words)


# The recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("base: [", ["cannot be read as YAML"]),
        ("[" * 3000, ["cannot be read as YAML"]),
        ("base: 2021-02-30", ["cannot be read as YAML", "day is out of range"]),
        ("!!python/object/apply:os.system ['true']", ["cannot be read as YAML", "constructor"]),
        ("[]", ["the recipe", "dictionary"]),
        ("false", ["the recipe", "dictionary"]),
        ("int8", ["the recipe", "dictionary"]),
        ("base: int5", ["base", "'int4', 'int8' or 'fp16'"]),
        ("bits: 4", ["bits: Extra inputs are not permitted", "write base, and rules"]),
        ("rules: W8A8", ["rules", "list"]),
        ("rules: [{match: '*'}]", ["rules.0.scheme: Field required"]),
        ("rules: [{match: '*', scheme: W8A8, bits: 8}]", ["rules.0.bits: Extra inputs are not permitted"]),
        ("rules: [{match: '*', scheme: W3A16}]", ["rules.0.scheme", "'W4A16', 'W8A8' or 'float'"]),
        ("rules: [{match: '*', scheme: W4A16, group_size: 32}]", ["rules.0.group_size", "128 or 64"]),
        ("rules: [{match: '*', scheme: W8A8, group_size: 64}]", ["rules.0", "W8A8 has no groups"]),
    ],
)
def test_bad_recipe(llava: Llava, out: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert_refused(export_onnx(llava(), out, "--recipe", path), f"--recipe {path}", *words)


def test_recipe_rule_matches_nothing(llava: Llava, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rules: [{match: '*', scheme: W8A8}, {match: 'language_model.layers.*', scheme: float}]")
    refused = export_onnx(llava(), out, "--recipe", path)
    assert_refused(refused, "recipe rule 2", "'language_model.layers.*' matches no linear", "names look like vision_tower.")
