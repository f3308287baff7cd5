"""`--prefix`: what an export finds, writes and refuses, and what its forms answer behind it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import (
    ANY_ACCURACY,
    ASK,
    PICTURE,
    assert_refused,
    copy_checkpoint,
    export_onnx,
    export_to,
    read_files,
    run_export,
    run_model,
    write_calibration,
)
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.calibrate.blockwise import block_writer
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.prefix import read_prefix
from qvlm_export.calibrate.errors import PrefixWarning, UserError
from qvlm_export.cli.common import quiet_libraries
from qvlm_export.cli.inspect import app as inspect_app
from qvlm_export.cli.validate import app as validate_app
from qvlm_export.inputs.prefix import find_common_prefix
from qvlm_export.inputs.samples import encode_prompt

Llava = Callable[..., Path]
WITHOUT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
)
WITHOUT += "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def exported(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 export in the default, with its prefix. Do not write beside it."""
    plan = tmp_path_factory.mktemp("prefix") / "new" / "x.plan"
    data = write_calibration(plan.parent.parent)
    export_to(llava(), plan, "--backend", "onnx", "--scheme", "int8", "--calib-data", data, "--max-length", "128")
    return plan


def test_the_default_is_all_that_prompts_begin_with(exported: Path) -> None:
    manifest = json.loads(exported.with_suffix(".json").read_text())
    with qvlm_export.load(exported) as model:
        text = model.manifest.config.text
        prefix = read_prefix(exported.with_name("x.prefix.safetensors"), (text.num_layers, text.num_kv_heads, text.head_dim))
        ids = encode_prompt(model.processor, model.manifest.config, "USER: Why? ASSISTANT:", []).input_ids
        assert tuple(ids[: len(prefix)]) == prefix.token_ids == find_common_prefix(model.processor, model.manifest.config)
        assert model.session.prefix is not None
    found = {"token_ids": list(prefix.token_ids), "text": "<s>USER:", "massive_activations": {}}
    assert manifest["calibration"]["prefix"] == found
    assert manifest["files"]["prefix"]["name"] == "x.prefix.safetensors"
    beside = exported.with_name("x.calibrated") / "prefix.safetensors"
    assert beside.read_bytes() == exported.with_name("x.prefix.safetensors").read_bytes()


def test_torch_graph_and_inspection_agree_behind_it(exported: Path, llava: Llava) -> None:
    options = ["--json", "--limit", "2", "--per-layer", *ANY_ACCURACY, "--reference", str(llava())]
    result = CliRunner().invoke(validate_app, [str(exported), *options])
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    graph = next(run for run in content["forms"] if run["name"] == "graph")
    scores = next(
        comparison["tokens"]["all"] for comparison in graph["comparisons"] if comparison["against"] == "fake-quant"
    )
    assert scores["agreement"] == 1
    assert min(layer["graph_sqnr_db"] for layer in content["layers"]) > 30  # an activation may round to the next code
    assert CliRunner().invoke(inspect_app, [str(exported), "--verify"]).exit_code == 0
    assert run_model(exported, *ASK).exit_code == 0


@pytest.mark.parametrize("effort", ["rtn", "fast"])
def test_zero_is_none(llava: Llava, tmp_path: Path, effort: str) -> None:
    data = write_calibration(tmp_path)
    options = ("--backend", "onnx", "--scheme", "int8", "--calib-data", data, "--max-length", "128", "--effort", effort)
    export_to(llava(), tmp_path / "new" / "x.plan", *options, "--prefix", "0")
    assert not list(tmp_path.rglob("*prefix*"))
    export_to(llava(), tmp_path / "new" / "x.plan", *options, "--prefix", "2")
    with qvlm_export.load(tmp_path / "new" / "x.plan") as model:
        assert model.session.prefix is not None
        assert len(model.session.prefix) == 2
    export_to(llava(), tmp_path / "new" / "x.plan", *options, "--prefix", "0")
    assert not list(tmp_path.rglob("*prefix*"))  # of the export before


@pytest.mark.parametrize("value", ["-1", "many", "1.5", "", "0x3", "٣"])
def test_another_value_is_refused(llava: Llava, absent: Path, value: str) -> None:
    assert_refused(export_onnx(llava(), absent, "--prefix", value), f"--prefix {value}: give auto, a number of tokens, or 0")


def test_more_than_prompts_share_is_refused(llava: Llava, absent: Path) -> None:
    result = export_onnx(llava(), absent, "--prefix", "99")
    assert_refused(
        result, "--prefix 99: prompts of this model's chat template share only the first 3 tokens; give auto or 0"
    )


def test_a_template_without_common_prefix(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "model")
    (model / "chat_template.jinja").write_text(WITHOUT, encoding="utf-8")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["post_processor"] = None  # which would add the first token
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    refused = export_onnx(model, absent, "--prefix", "1")
    assert_refused(refused, "--prefix 1: prompts of this model's chat template share no token; give auto or 0")


def test_a_prefix_without_room_is_refused(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "model")
    path = model / "chat_template.jinja"
    path.write_text("A long introduction that stands before every conversation. " + path.read_text(), encoding="utf-8")
    result = export_onnx(model, absent, "--max-length", "44")  # every sample begins with the prefix, so it is longer
    assert_refused(result, "calibration.jsonl:1: is ", " tokens long, --max-length is 44")


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_prefix_file_that_is_not_as_exported_is_refused(exported: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported.parent.iterdir():
        if path.name != "x.prefix.safetensors":
            (folder / path.name).symlink_to(path, target_is_directory=path.is_dir())
    copy = folder / "x.prefix.safetensors"
    if damage == "changed":
        content = bytearray(exported.with_name(copy.name).read_bytes())
        content[-1] ^= 1
        copy.write_bytes(content)
    before = read_files(folder)
    result = run_model(folder / "x.plan", *ASK)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "x.prefix.safetensors: " + ("is missing" if damage == "missing" else "its sha256 is") in result.stderr
    assert read_files(folder) == before


def test_an_export_that_was_killed_goes_on_with_the_same_prefix(llava: Llava, tmp_path: Path) -> None:
    """The values of finished blocks come from the work folder."""
    data = write_calibration(tmp_path)
    options = ("--backend", "onnx", "--scheme", "int8", "--calib-data", data, "--max-length", "128", "--effort", "fast")
    export_to(llava(), tmp_path / "whole" / "x.plan", *options)
    finish = block_writer.BlockWriter.mark_finished

    def fail(self: block_writer.BlockWriter, block: object, *arguments: object, **named: object) -> None:
        finish(self, block, *arguments, **named)  # type: ignore[arg-type]
        if getattr(block, "prefix", "") == "language_model.model.layers.0":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_writer.BlockWriter, "mark_finished", fail)
        assert export_onnx(llava(), tmp_path / "killed" / "x.plan", *options[2:]).exit_code != 0
    export_to(llava(), tmp_path / "killed" / "x.plan", *options, "--resume")
    names = ("x.prefix.safetensors", "x.onnx.data")
    whole, killed = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("whole", "killed"))
    assert whole == killed


def test_a_calibrated_checkpoint_without_its_prefix_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported.with_name("x.calibrated"), tmp_path / "x.calibrated")
    (folder / "prefix.safetensors").unlink()
    with pytest.raises(UserError, match=r"prefix\.safetensors"):
        CalibratedCheckpoint(folder).read_prefix((2, 2, 64))


@pytest.mark.parametrize("prompt", ["  two spaces", "\n\nlines", "\tx", "a"])
def test_prompts_that_begin_with_white_space_share_the_prefix(
    llava: Llava, absent: Path, tmp_path: Path, prompt: str
) -> None:
    data = tmp_path / "data.jsonl"
    lines = ({"prompt": prompt, "answer": "2"}, {"image": str(PICTURE), "prompt": prompt, "answer": "2"})
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    result = run_export(llava(), absent, "--backend", "onnx", "--calib-data", data, "--dry-run")
    assert result.exit_code == 0, result.stderr


def test_a_warning_of_the_session_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        previous = warnings.showwarning
        try:
            quiet_libraries()
            warnings.warn("two\nlines", PrefixWarning, stacklevel=1)
            warnings.warn("of a library", FutureWarning, stacklevel=1)
        finally:
            warnings.showwarning = previous
    assert capsys.readouterr().err == "warning: two lines\n"
