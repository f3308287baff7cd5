"""Tests that need an NVIDIA GPU, run by `pytest -m gpu`: engines are built, run and compared with ONNX Runtime.

They were written without a GPU and have never run; what the docs say about engines waits for the first run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from eval_sets import FORM, eval_json, make_sets, of_task
from shell import run_shell
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.cli.validate import app as validate_app
from qvlm_export.engines.backend import choose_backend
from qvlm_export.engines.runtime.device import Device
from qvlm_export.inputs.samples import encode
from tools.tiny.accuracy import unseen_items

pytestmark = pytest.mark.gpu

SCHEMES = ("fp16", "int8", "int4")


def export_here(model: str, out: Path, **options: object) -> None:
    """Exports for this machine; with TensorRT-RTX for the current GPU, where its generation is not a default target."""
    device = Device()
    capability = device.capability()
    device.close()
    backend = choose_backend("auto", ())
    targets = () if not backend.targets or capability in backend.targets else ("current",)
    qvlm_export.export(model, out, backend=backend.name, targets=targets, **options)


@pytest.fixture(scope="module", params=SCHEMES)
def plan(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / f"{request.param}.plan"
    export_here("tiny", out, scheme=request.param, max_batch=2)
    return out


def test_a_plan_built_ahead_of_time_runs_or_its_error_names_the_gpu(tmp_path):
    """A plan for the default targets, as a machine without a GPU builds it; the outcome belongs in docs."""
    pytest.importorskip("tensorrt_rtx")
    qvlm_export.export("tiny", tmp_path / "ahead.plan", backend="tensorrt-rtx", samples=2)
    device = Device()
    capability = device.capability()
    device.close()
    with qvlm_export.load(tmp_path / "ahead.plan") as model:
        print(f"{capability}: {model.session.runner.name} ({model.session.why})")
        if capability in model.manifest.backend["targets"]:
            assert model.session.runner.name == "tensorrt-rtx"
        else:
            assert model.session.runner.name == "tensorrt-rtx" or capability in model.session.why


def test_batches_and_turns_equal_single_prompts(plan):
    """A batch of unequal prompts gives the logits of each prompt alone; a second turn those of one long prompt."""
    rows = [np.array([1, *range(5, 5 + length)]) for length in (12, 7)]
    with qvlm_export.load(plan) as engine:
        together = engine.session.start(rows).logits
        for row, actual in zip(rows, together, strict=True):
            expected = engine.logits(row[None])[0, -1]
            assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)
        chat, item = engine.chat(), unseen_items(1)[0]
        "".join(chat.say(item.prompt, [item.image]))
        "".join(chat.say("How many objects are there?", max_new_tokens=3))
        sequence = chat._sequences
        pixels = engine.processor.image_processor([item.image], return_tensors="np")["pixel_values"]
        expected_last = engine.logits(np.array([sequence.tokens[0][: int(sequence.cached[0])]]), pixels)[0, -1]
        assert np.linalg.norm(sequence.logits[0] - expected_last) < 0.02 * np.linalg.norm(expected_last)


def test_validation_runs_the_engine_and_its_polygraphy_commands_pass(plan, tmp_path):
    arguments = [str(plan), "--limit", "4", "--json", "--save-polygraphy", str(tmp_path / "case")]
    result = CliRunner().invoke(validate_app, arguments)
    assert result.exit_code == 0, result.stdout + result.stderr
    content = json.loads(result.stdout)
    assert {model_form["name"]: model_form["status"] for model_form in content["forms"]}["engine"] == "run"
    compared = {verdict["output"] for verdict in content["polygraphy"]["verdicts"] if "engine" in verdict["runners"]}
    assert compared == {"image_embeds", "logits"}
    commands = [command for command in content["polygraphy"]["commands"] if "--trt" in command]
    assert len(commands) == 2
    for command in commands:
        process = run_shell(command)
        assert process.returncode == 0, process.stdout + process.stderr


def test_engine_logits_match_the_graph(plan):
    with qvlm_export.load(plan) as engine, qvlm_export.load(plan, "onnxruntime:cpu") as graph:
        assert engine.session.runner.name in ("tensorrt", "tensorrt-rtx")
        for item in unseen_items(14):
            text = chat_text(engine.processor, [{"role": "user", "text": item.prompt, "images": 1}])
            pixels, ids = encode(engine.processor, text, [item.image])
            actual, expected = engine.logits(ids[None], pixels), graph.logits(ids[None], pixels)
            assert np.isfinite(actual).all()
            assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


def test_engine_answers_like_the_graph(plan):
    items = unseen_items(70)
    with qvlm_export.load(plan) as engine, qvlm_export.load(plan, "onnxruntime:cpu") as graph:
        same = [engine.generate(i.prompt, [i.image]) == graph.generate(i.prompt, [i.image]) for i in items]
    assert sum(same) >= 0.95 * len(same)


def test_decoding_through_the_cache_equals_prefill(plan):
    item = unseen_items(1)[0]
    with qvlm_export.load(plan) as engine:
        text = chat_text(engine.processor, [{"role": "user", "text": item.prompt, "images": 1}])
        pixels, ids = encode(engine.processor, text, [item.image])
        sequences = engine.session.start([ids[:-6]], pixels)
        for token in ids[-6:]:
            engine.session.extend(sequences, [np.array([token])])
        expected = engine.logits(ids[None], pixels)[0, -1]
        assert np.linalg.norm(sequences.logits[0] - expected) < 0.02 * np.linalg.norm(expected)


def test_int8_products_with_long_sums_do_not_overflow(llava, tmp_path):
    """With the K of a real decoder and values near the ends of their ranges, float16 sums would overflow."""
    folder = llava(dtype="float32", text={"hidden_size": 4096, "intermediate_size": 13824, "num_hidden_layers": 1})
    out = tmp_path / "wide.plan"
    export_here(str(folder), out, scheme="int8", samples=4)
    ids = np.array([[1, *range(5, 40)]])
    with qvlm_export.load(out) as engine, qvlm_export.load(out, "onnxruntime:cpu") as graph:
        actual, expected = engine.logits(ids), graph.logits(ids)
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


def test_onnx_runtime_uses_cuda_or_gives_a_reason(plan):
    """The float16 graph with CUDA, where onnxruntime-gpu has all kernels, against its float32 copy on the CPU."""
    with qvlm_export.load(plan, "onnxruntime") as graph, qvlm_export.load(plan, "onnxruntime:cpu") as cpu:
        runner, why = graph.session.runner, graph.session.why
        print(f"{graph.manifest.scheme}: {runner.device} ({why})")
        if runner.device == "cpu":
            assert "CUDA: " in why or "install onnxruntime-gpu" in why
        for item in unseen_items(14):
            text = chat_text(graph.processor, [{"role": "user", "text": item.prompt, "images": 1}])
            pixels, ids = encode(graph.processor, text, [item.image])
            actual, expected = graph.logits(ids[None], pixels), cpu.logits(ids[None], pixels)
            assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
            assert graph.generate(item.prompt, [item.image], max_new_tokens=3)


def test_the_device_has_a_capability_and_copies_memory_both_ways():
    device = Device()
    assert device.capability().startswith("sm")
    address = device.allocate(64)
    device.upload(address, np.arange(16, dtype=np.float32))
    downloaded = np.zeros(16, np.float32)
    device.download(downloaded, address)
    assert downloaded.tolist() == list(range(16))
    device.close()
    assert not device.holds(address)


def test_the_engine_scores_as_the_graph_in_an_evaluation(plan, tmp_path):
    sets = make_sets(tmp_path / "sets", 40)
    common = (plan, *of_task(sets, "scienceqa"), *FORM)
    scores = [eval_json(*common, "--model-form", r, "--predictions", tmp_path / f"{r}.jsonl") for r in ("auto", "graph")]
    assert [score["model_form"] for score in scores] == ["engine", "graph"]
    assert abs(scores[0]["metrics"]["Avg"] - scores[1]["metrics"]["Avg"]) <= 0.05


def test_torch_on_the_gpu_scores_as_on_the_cpu_in_an_evaluation(tmp_path):
    sets = make_sets(tmp_path / "sets", 40)
    common = ("tiny", *of_task(sets, "scienceqa"), *FORM)
    cuda, cpu = (eval_json(*common, "--device", d, "--predictions", tmp_path / f"{d}.jsonl") for d in ("cuda", "cpu"))
    assert abs(cuda["metrics"]["Avg"] - cpu["metrics"]["Avg"]) <= 0.05
