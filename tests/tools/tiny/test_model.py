"""The tiny model that ships: the claims of its card hold, in torch and as exported graphs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from paths import ROOT
from transformers import LlavaForConditionalGeneration

import qvlm_export
from tools.tiny import plant_outliers, scenes
from tools.tiny.accuracy import graph_answers, load_torch, quantize_crudely_, rates, torch_answers, unseen_items

TINY = ROOT / "qvlm_export" / "tiny"
ITEMS = 350


@pytest.fixture(scope="module")
def tiny():
    return load_torch(TINY)


@pytest.fixture(scope="module", params=["fp16", "int8", "int4"])
def plan(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / f"{request.param}.plan"
    qvlm_export.export("tiny", out, scheme=request.param, backend="onnx")
    return out


def test_model_is_small_and_has_the_structure_of_llava(tiny):
    model, processor = tiny
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 10e6
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 20e6
    config = model.config
    assert config.vision_config.model_type == "clip_vision_model"
    assert config.vision_config.hidden_act == "quick_gelu"
    assert (config.vision_feature_layer, config.projector_hidden_act) == (-2, "gelu")
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    widths = (config.vision_config.hidden_size, config.vision_config.intermediate_size, config.text_config.hidden_size)
    assert all(width % 128 == 0 for width in (*widths, config.text_config.intermediate_size))
    assert processor.chat_template


def test_model_answers_unseen_scenes(tiny):
    model, processor = tiny
    items = unseen_items(ITEMS)
    got = rates(items, torch_answers(model, processor, items))
    assert got["overall"] >= 0.95
    # 50 questions of each kind: the claim is 0.90 on 400 questions each, less a margin for chance
    assert min(got[kind] for kind in scenes.KINDS) >= 0.86


def test_committed_accuracies_meet_their_targets():
    table = json.loads((ROOT / "docs" / "tiny_accuracy.json").read_text())["exact_match"]
    assert table["torch float32"]["overall"] >= 0.95
    assert min(table["torch float32"].values()) >= 0.90
    assert table["torch, W8A8 round-to-nearest"]["overall"] >= table["torch float32"]["overall"] - 0.03
    assert table["torch, W4A4 round-to-nearest"]["overall"] <= 0.05


def test_round_to_nearest_at_w4a4_fails():
    model, processor = load_torch(TINY)
    quantize_crudely_(model, processor, 4, 4)
    items = unseen_items(70)
    assert rates(items, torch_answers(model, processor, items))["overall"] <= 0.05


def test_planting_outliers_does_not_change_the_logits(llava):
    folder = llava(dtype="float32", text={"num_hidden_layers": 3})
    plain, planted = (LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    rng = np.random.default_rng(0)
    ids = torch.tensor(np.concatenate([[1], [4] * 36, rng.integers(5, 300, 9)]))[None]
    pixels = torch.tensor(rng.standard_normal((1, 3, 48, 48)), dtype=torch.float32)
    with torch.no_grad():
        plant_outliers.plant_(planted, seed=0)
        before, after = (m(input_ids=ids, pixel_values=pixels).logits for m in (plain, planted))
    assert float((after - before).norm() / before.norm()) < 1e-5
    gains = planted.model.language_model.layers[0].input_layernorm.weight
    assert float(gains.abs().max() / gains.abs().median()) >= 16


def test_exported_graphs_answer_unseen_scenes(plan):
    items = unseen_items(140)
    assert rates(items, graph_answers(plan, items))["overall"] >= 0.93


def test_float_graph_generates_the_answers_of_transformers(tiny, tmp_path):
    model, processor = tiny
    out = tmp_path / "tiny.plan"
    qvlm_export.export("tiny", out, scheme="fp16", backend="onnx")
    with qvlm_export.load(out) as loaded:
        for item in unseen_items(28):
            inputs = processor(images=item.image, text=f"USER: <image>\n{item.prompt} ASSISTANT:", return_tensors="pt")
            expected = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert (
                loaded.generate(item.prompt, [item.image], max_new_tokens=48)
                == processor.decode(expected, skip_special_tokens=True).strip()
            )
