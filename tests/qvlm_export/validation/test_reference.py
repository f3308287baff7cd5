"""The float reference is transformers' own model; an export that is another model fails by default."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import copy_checkpoint, export_to, write_calibration
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.cli.validate import app
from qvlm_export.engines.graph import language
from qvlm_export.inputs.samples import default_calibration, encode_entries, load_processor, read_entries
from qvlm_export.validation import reference as reference_module
from qvlm_export.validation.compare import ComparisonJob, _measure_own_forward
from qvlm_export.validation.reference import ReferenceInput, reference_inputs, run_reference
from tools.families.random_families import KINDS, write_family
from tools.families.random_original import write_original

Llava = Callable[..., Path]


def make_inputs(folder: Path, count: int = 3) -> list[ReferenceInput]:
    checkpoint, processor = open_checkpoint(str(folder)), load_processor(folder)
    entries = read_entries(default_calibration(), None, count)
    return reference_inputs(processor, entries, encode_entries(entries, processor, checkpoint.config, 1024))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kind", ["llava", "interleave", "vipllava", "next-vicuna", "next-mistral", "onevision"])
def test_logits_are_those_of_the_loaded_model(tmp_path: Path, kind: str) -> None:
    write_family(tmp_path / kind, kind)
    inputs = make_inputs(tmp_path / kind)
    run = run_reference(open_checkpoint(str(tmp_path / kind)), inputs, 0, lambda _: None)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
    with torch.inference_mode():
        for number, one in enumerate(inputs):
            ids = torch.from_numpy(one.sample.input_ids)[None]
            assert relative(run.logits(number), model(input_ids=ids, **one.images).logits[0].numpy()) < 1e-5
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_the_kinds_above_exist() -> None:
    assert {"llava", "interleave", "vipllava", "next-vicuna", "next-mistral", "onevision"} <= set(KINDS)


def test_the_authors_layout_has_a_reference_too(tmp_path: Path) -> None:
    model = write_original(tmp_path / "v1.6-vicuna", "v1.6-vicuna").float()
    inputs = make_inputs(tmp_path / "v1.6-vicuna", 1)
    run = run_reference(open_checkpoint(str(tmp_path / "v1.6-vicuna")), inputs, 0, lambda _: None)
    ids = torch.from_numpy(inputs[0].sample.input_ids)[None]
    with torch.inference_mode():
        wanted = model(input_ids=ids, **inputs[0].images).logits[0].numpy()
    assert relative(run.logits(0), wanted) < 1e-3  # the mean rows of the table are rounded once more


def test_samples_run_together_without_changing_each_other(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, inputs = open_checkpoint(str(llava())), make_inputs(llava(), 6)
    together = run_reference(checkpoint, inputs, 2, lambda _: None)
    monkeypatch.setattr(reference_module, "BATCH_TOKENS", 1)
    alone = run_reference(checkpoint, inputs, 2, lambda _: None)
    assert len({len(one.sample.input_ids) for one in inputs}) > 1
    for number in range(6):
        assert relative(together.logits(number), alone.logits(number)) < 1e-5


def test_parameters_are_in_memory_only_while_they_are_used(llava: Llava) -> None:
    checkpoint = open_checkpoint(str(llava()))
    seen: list[str] = []

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(checkpoint.source, name)

        def __contains__(self, name: object) -> bool:
            return name in checkpoint.source

        def load(self, name: str) -> np.ndarray:
            seen.append(name)
            return checkpoint.source.load(name)

    run_reference(replace(checkpoint, source=Recording()), make_inputs(llava(), 1), 0, lambda _: None)
    assert len(seen) == len(set(seen)) > 50


def test_layers_behind_the_last_feature_may_be_missing(llava: Llava, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    inputs = make_inputs(model, 1)
    whole = run_reference(open_checkpoint(str(llava())), inputs, 0, lambda _: None).logits(0)
    assert np.array_equal(run_reference(open_checkpoint(str(model)), inputs, 0, lambda _: None).logits(0), whole)


def test_a_fault_in_our_own_forward_pass_is_measured(llava: Llava) -> None:
    checkpoint, inputs = open_checkpoint(str(llava())), make_inputs(llava(), 2)
    job = ComparisonJob(None, checkpoint, inputs)  # type: ignore[arg-type]  # it reads no manifest
    run, blocks = run_reference(checkpoint, inputs, 0, lambda _: None), make_blocks(checkpoint.hf_config)
    assert _measure_own_forward(job, blocks, run) < 1e-5
    assert _measure_own_forward(job, replace(blocks, sliding_window=24), run) > 0.1


def validate(plan: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, [str(plan), "--json", "--limit", "3", *arguments])
    return result.exit_code, json.loads(result.stdout)


def test_a_graph_that_is_another_model_fails_by_default(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact, other = tmp_path / "intact" / "x.plan", tmp_path / "other" / "x.plan"
    options = ("--backend", "onnx", "--scheme", "fp16", "--max-length", "256")
    export_to(llava(), intact, *options)
    real = language.causal_mask
    monkeypatch.setattr(language, "causal_mask", lambda op, ids, length, _, dtype: real(op, ids, length, 24, dtype))
    export_to(llava(), other, *options)
    reference = ("--reference", str(llava()))
    code, content = validate(intact, *reference)
    assert (code, content["passed"]) == (0, True)
    code, content = validate(other, *reference)
    assert (code, content["passed"]) == (1, False)
    assert {check["form"] for check in content["thresholds"] if not check["passed"]} == {"graph"}


def test_activations_beyond_float16_fail_a_float16_export(llava: Llava, tmp_path: Path) -> None:
    model = copy_checkpoint(llava(), tmp_path / "checkpoint")
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name in ("up_proj", "down_proj"):
        tensors[f"language_model.model.layers.0.mlp.{name}.weight"] *= 2.0**8
    save_file(tensors, path, {"format": "pt"})
    plan = tmp_path / "out" / "x.plan"
    # A float16 checkpoint is not measured before round-to-nearest of weights alone.
    export_to(model, plan, "--backend", "onnx", "--scheme", "fp16", "--calib-data", str(write_calibration(tmp_path)))
    code, content = validate(plan)
    assert code == 1
    (failed,) = [check for check in content["thresholds"] if not check["passed"]]
    assert (failed["form"], failed["metric"]) == ("float", "largest activation")
    place, magnitude = content["largest_activation"]
    assert (place.startswith("language_model."), magnitude > 65504) == (True, True)
    result = CliRunner().invoke(app, [str(plan), "--limit", "1"])
    assert "<= 65504 on float, at language_model." in result.stdout
