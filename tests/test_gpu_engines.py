"""On a machine with an NVIDIA GPU: `pytest -m gpu` builds engines, runs them and compares them with ONNX Runtime.

Written without one at hand and so never run yet; the first run decides what the sentences in docs say.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_sets import FORM, eval_json, make_sets, of_task
from tiny_accuracy import unseen_items

import qvlm_export
from engines.device import Device
from qvlm_export.samples import chat_text, encode

pytestmark = pytest.mark.gpu

SCHEMES = ("fp16", "int8", "int4")


@pytest.fixture(scope="module", params=SCHEMES)
def plan(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / f"{request.param}.plan"
    qvlm_export.export("tiny", out, scheme=request.param, backend="auto", max_batch=2)
    return out


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
    qvlm_export.export(str(folder), out, scheme="int8", backend="auto", samples=4)
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
