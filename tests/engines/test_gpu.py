"""On a machine with an NVIDIA GPU: `pytest -m gpu` builds engines, runs them and compares them with ONNX Runtime.

Written without one at hand and so never run yet; the first run decides what the sentences in docs say.
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
    """Exports for this machine: TensorRT-RTX for this very GPU, where its generation is none of the default targets."""
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


def test_a_plan_built_ahead_of_time_runs_here_or_says_why_not(tmp_path):
    """Of the default targets, as a machine without a GPU builds it; its outcome belongs into docs."""
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


def test_several_rows_and_turns_share_the_engine(plan):
    """A batch of unequal prompts against each alone, and a second turn against asking all at once."""
    rows = [np.array([1, *range(5, 5 + length)]) for length in (12, 7)]
    with qvlm_export.load(plan) as engine:
        together = engine.session.start(rows).logits
        for row, got in zip(rows, together, strict=True):
            wanted = engine.logits(row[None])[0, -1]
            assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)
        chat, item = engine.chat(), unseen_items(1)[0]
        "".join(chat.say(item.prompt, [item.image]))
        "".join(chat.say("How many objects are there?", max_new_tokens=3))
        sequence = chat._sequences
        pixels = engine.processor.image_processor([item.image], return_tensors="np")["pixel_values"]
        whole = engine.logits(np.array([sequence.tokens[0][: int(sequence.cached[0])]]), pixels)[0, -1]
        assert np.linalg.norm(sequence.logits[0] - whole) < 0.02 * np.linalg.norm(whole)


def test_the_ladder_reaches_the_engine_and_polygraphy_repeats_it_by_hand(plan, tmp_path):
    arguments = [str(plan), "--limit", "4", "--json", "--save-polygraphy", str(tmp_path / "case")]
    result = CliRunner().invoke(validate_app, arguments)
    assert result.exit_code == 0, result.stdout + result.stderr
    content = json.loads(result.stdout)
    assert {rung["name"]: rung["status"] for rung in content["rungs"]}["engine"] == "run"
    judged = {verdict["output"] for verdict in content["polygraphy"]["verdicts"] if "engine" in verdict["runners"]}
    assert judged == {"image_embeds", "logits"}
    lines = [line for line in content["polygraphy"]["commands"] if "--trt" in line]
    assert len(lines) == 2
    for line in lines:
        done = run_shell(line)
        assert done.returncode == 0, done.stdout + done.stderr


def test_engine_logits_match_the_graph(plan):
    with qvlm_export.load(plan) as engine, qvlm_export.load(plan, "onnxruntime:cpu") as graph:
        assert engine.session.runner.name in ("tensorrt", "tensorrt-rtx")
        for item in unseen_items(14):
            text = chat_text(engine.processor, [{"role": "user", "text": item.prompt, "images": 1}])
            pixels, ids = encode(engine.processor, text, [item.image])
            got, wanted = engine.logits(ids[None], pixels), graph.logits(ids[None], pixels)
            assert np.isfinite(got).all()
            assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


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
        whole = engine.logits(ids[None], pixels)[0, -1]
        assert np.linalg.norm(sequences.logits[0] - whole) < 0.02 * np.linalg.norm(whole)


def test_int8_products_with_long_sums_do_not_overflow(llava, tmp_path):
    """K of a real decoder, all activations and weights near their range: a float16 accumulator would be infinite."""
    folder = llava(dtype="float32", text={"hidden_size": 4096, "intermediate_size": 13824, "num_hidden_layers": 1})
    out = tmp_path / "wide.plan"
    export_here(str(folder), out, scheme="int8", samples=4)
    ids = np.array([[1, *range(5, 40)]])
    with qvlm_export.load(out) as engine, qvlm_export.load(out, "onnxruntime:cpu") as graph:
        got, wanted = engine.logits(ids), graph.logits(ids)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)


def test_onnx_runtime_uses_cuda_or_says_why_not(plan):
    """The float16 graph on the GPU, where onnxruntime-gpu is installed and has all kernels, against the twin on CPU."""
    with qvlm_export.load(plan, "onnxruntime") as graph, qvlm_export.load(plan, "onnxruntime:cpu") as twin:
        runner, why = graph.session.runner, graph.session.why
        print(f"{graph.manifest.scheme}: {runner.device} ({why})")
        if runner.device == "cpu":
            assert "CUDA: " in why or "install onnxruntime-gpu" in why
        for item in unseen_items(14):
            text = chat_text(graph.processor, [{"role": "user", "text": item.prompt, "images": 1}])
            pixels, ids = encode(graph.processor, text, [item.image])
            got, wanted = graph.logits(ids[None], pixels), twin.logits(ids[None], pixels)
            assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)
            assert graph.generate(item.prompt, [item.image], max_new_tokens=3)


def test_the_device_says_what_it_is():
    device = Device()
    assert device.capability().startswith("sm")
    address = device.allocate(64)
    device.upload(address, np.arange(16, dtype=np.float32))
    back = np.zeros(16, np.float32)
    device.download(back, address)
    assert back.tolist() == list(range(16))
    device.close()
    assert not device.holds(address)


def test_evaluation_of_the_engine_scores_as_that_of_the_graph(plan, tmp_path):
    sets = make_sets(tmp_path / "sets", 40)
    common = (plan, *of_task(sets, "scienceqa"), *FORM)
    scores = [eval_json(*common, "--rung", r, "--predictions", tmp_path / f"{r}.jsonl") for r in ("auto", "graph")]
    assert [score["rung"] for score in scores] == ["engine", "graph"]
    assert abs(scores[0]["metrics"]["Avg"] - scores[1]["metrics"]["Avg"]) <= 0.05


def test_evaluation_in_torch_on_the_gpu_scores_as_on_the_cpu(tmp_path):
    sets = make_sets(tmp_path / "sets", 40)
    common = ("tiny", *of_task(sets, "scienceqa"), *FORM)
    cuda, cpu = (eval_json(*common, "--device", d, "--predictions", tmp_path / f"{d}.jsonl") for d in ("cuda", "cpu"))
    assert abs(cuda["metrics"]["Avg"] - cpu["metrics"]["Avg"]) <= 0.05
