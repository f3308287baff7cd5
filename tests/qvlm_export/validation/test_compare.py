"""The accuracy ladder on whole, damaged and incomplete exports: it measures what it says and names what was done."""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from damage import (
    copy_export,
    double,
    double_first,
    edit_scale,
    edit_weight,
    reseal_folder,
    times_one_and_a_half,
    zero,
)
from transformers import LlavaForConditionalGeneration

import qvlm_export
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.engines.check.metrics import Sums
from qvlm_export.engines.check.polygraphy import session_runners
from qvlm_export.engines.manifest import describe_file, read_manifest
from qvlm_export.engines.runtime.open import open_session
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation import compare
from qvlm_export.validation.accuracy import (
    ENGINE,
    FAKE_QUANT,
    FLOAT,
    GRAPH,
    Comparison,
    ComparisonChain,
    LayerScore,
    Loss,
    ModelRun,
    check_thresholds,
    find_loss,
    token_groups,
    worst_layers,
)
from qvlm_export.validation.compare import ComparisonJob, compare_forms
from qvlm_export.validation.validate import read_samples

DOWN = "language_model.model.layers.1.mlp.down_proj"
IMAGE = 9


@pytest.fixture(scope="module")
def plans(llava, tmp_path_factory):
    """Exports by scheme, without engines."""
    made = {}
    for scheme in ("int4", "int8", "fp16"):
        made[scheme] = tmp_path_factory.mktemp(scheme) / "export" / "e.plan"
        qvlm_export.export(str(llava()), made[scheme], scheme=scheme, backend="onnx", samples=4, max_length=128)
    return made


def climb_on(plan, *, samples=3, per_layer=False):
    manifest = read_manifest(plan.with_suffix(".json"))
    checkpoint = open_checkpoint(manifest.model["name"])
    job = ComparisonJob(manifest, checkpoint, read_samples(manifest, None, samples), per_layer)
    return compare_forms(job, Reporter(quiet=True))


@pytest.fixture(scope="module")
def whole(plans):
    """The ladders of the undamaged exports, with every layer."""
    return {scheme: climb_on(plan, per_layer=True) for scheme, plan in plans.items()}


def compared(ladder, rung, against):
    (comparison,) = [c for c in ladder.comparisons if (c.rung, c.against) == (rung, against)]
    return comparison


def reasons(ladder):
    return {rung.name: rung.reason for rung in ladder.rungs if rung.logits is None}


def graph_scores(ladder):
    return {layer.block: layer.graph_sqnr_db for layer in ladder.layers}


def test_predictions_belong_to_the_token_they_predict():
    ids = np.array([1, IMAGE, IMAGE, 2, 3, 4, 5, 6])  # the answer is 5 and 6
    groups = token_groups(Sample(ids, np.zeros((1, 3, 2, 2), np.float32), 6), IMAGE)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in groups.items()} == {
        "image": [0, 1],
        "prompt": [2, 3, 4],
        "answer": [5, 6],  # and position 7 predicts what comes after the end
    }


def test_without_an_answer_the_last_position_predicts_its_first_token():
    groups = token_groups(Sample(np.array([1, IMAGE, 2]), np.zeros((1, 3, 2, 2), np.float32), 3), IMAGE)
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "image": [True, False, False],
        "prompt": [False, True, False],
        "answer": [False, False, True],
    }


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_every_rung_that_can_run_does(whole, scheme):
    ladder = whole[scheme]
    assert [rung.name for rung in ladder.rungs] == [FLOAT, FAKE_QUANT, GRAPH, ENGINE]
    assert reasons(ladder) == {ENGINE: "this export has no engine"}
    pairs = [(c.rung, c.against) for c in ladder.comparisons]
    assert pairs == [(FAKE_QUANT, FLOAT), (GRAPH, FLOAT), (GRAPH, FAKE_QUANT)]
    assert [(c.rung, c.against) for c in ladder.steps()] == [(FAKE_QUANT, FLOAT), (GRAPH, FAKE_QUANT)]


def test_the_numbers_are_those_of_transformers_and_the_session(whole, plans):
    """KL and agreement of the graph on answer tokens, computed with torch from models opened by other means."""
    manifest = read_manifest(plans["int4"].with_suffix(".json"))
    model = LlavaForConditionalGeneration.from_pretrained(manifest.model["name"], dtype=torch.float32).eval()
    kl, agreed = [], []
    with open_session(manifest, "onnxruntime") as session, torch.inference_mode():
        for sample in read_samples(manifest, None, 3):
            ids, pixels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.pixel_values)
            wanted = model(input_ids=ids, pixel_values=pixels).logits[0, sample.answer_start - 1 : -1].double()
            found = torch.from_numpy(session.logits(sample.input_ids[None], sample.pixel_values)[0])
            found = found[sample.answer_start - 1 : -1].double()
            kl.append(torch.nn.functional.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1))
            agreed.append(wanted.argmax(-1) == found.argmax(-1))
    answer = compared(whole["int4"], GRAPH, FLOAT).groups["answer"]
    assert answer.tokens == sum(len(k) for k in kl)
    assert answer.mean_kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert answer.agreement == pytest.approx(float(torch.cat(agreed).double().mean()))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_quantization_itself_is_named_where_the_graph_is_right(whole, scheme):
    ladder = whole[scheme]
    loss = find_loss(ladder)
    assert loss.rung == FAKE_QUANT
    assert loss.kl == compared(ladder, FAKE_QUANT, FLOAT).total.mean_kl
    assert set(loss.layers) <= {layer.block for layer in ladder.layers}
    assert (ladder.linears, ladder.wrong) == (34, ())


def test_int8_costs_less_than_int4(whole):
    costs = {scheme: compared(whole[scheme], FAKE_QUANT, FLOAT).total for scheme in ("int4", "int8")}
    assert costs["int8"].mean_kl < costs["int4"].mean_kl / 5
    assert costs["int8"].sqnr_db > costs["int4"].sqnr_db + 6
    assert costs["int8"].agreement > costs["int4"].agreement


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_every_block_is_scored_in_both_forms(whole, scheme):
    layers = whole[scheme].layers
    assert len(layers) == 3 + 1 + 2
    assert layers[0].graph_sqnr_db > 100  # before the first rounding that falls the other way
    for layer in layers:
        assert layer.graph_sqnr_db > layer.sqnr_db > 0


def test_an_export_without_quantization_loses_nothing(whole):
    ladder = whole["fp16"]
    assert reasons(ladder) == {FAKE_QUANT: "the export quantizes no linear", ENGINE: "this export has no engine"}
    assert [(c.rung, c.against) for c in ladder.comparisons] == [(GRAPH, FLOAT)]
    assert find_loss(ladder) is None
    assert compared(ladder, GRAPH, FLOAT).total.agreement == 1.0
    assert compared(ladder, GRAPH, FLOAT).total.sqnr_db > 60
    assert (ladder.layers, ladder.linears) == ((), 0)


def test_a_linear_zeroed_in_the_graph_is_named(whole, plans, tmp_path):
    plan = copy_export(plans["int4"], tmp_path / "damaged")
    edit_weight(plan.with_suffix(".onnx"), f"{DOWN}.weight_codes", np.uint8, zero)
    ladder = climb_on(plan)
    loss = find_loss(ladder)
    assert (loss.rung, loss.layers) == (GRAPH, (DOWN,))
    assert compared(ladder, FAKE_QUANT, FLOAT) == compared(whole["int4"], FAKE_QUANT, FLOAT)
    step, healthy = (compared(which, GRAPH, FAKE_QUANT).total for which in (ladder, whole["int4"]))
    assert step.mean_kl > 100 * healthy.mean_kl
    assert loss.kl == step.mean_kl


def test_a_single_wrong_scale_is_named_though_it_costs_little(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "damaged")
    linear = "multi_modal_projector.linear_1"
    edit_weight(plan.with_suffix(".vision.onnx"), f"{linear}.weight_scale", np.float32, double_first)
    ladder = climb_on(plan, samples=1)
    loss = find_loss(ladder)
    assert (loss.rung, loss.layers) == (GRAPH, (linear,))
    assert ladder.wrong[0].what == "1 of 256 scales differ"


def test_a_damaged_norm_is_found_by_the_output_of_its_block(plans, tmp_path):
    """No quantized weight is wrong here; the loss and the block must come out of the numbers."""
    plan = copy_export(plans["int8"], tmp_path / "damaged")
    norm = "language_model.model.layers.1.post_attention_layernorm.weight"
    edit_weight(plan.with_suffix(".onnx"), norm, np.float16, double)
    ladder = climb_on(plan, samples=1, per_layer=True)
    loss = find_loss(ladder)
    assert ladder.wrong == ()
    assert (loss.rung, loss.layers[0]) == (GRAPH, "language_model.model.layers.1")
    assert graph_scores(ladder)["language_model.model.layers.0"] > 25 > graph_scores(ladder)[loss.layers[0]]


def test_without_the_calibrated_checkpoint_the_graph_is_still_compared(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "copy")
    shutil.rmtree(plan.with_suffix(".calibrated"))
    ladder = climb_on(plan, samples=1)
    assert "is missing" in reasons(ladder)[FAKE_QUANT]
    assert [(c.rung, c.against) for c in ladder.comparisons] == [(GRAPH, FLOAT)]
    assert find_loss(ladder).rung == GRAPH
    manifest = read_manifest(plan.with_suffix(".json"))
    without_role = replace(manifest, files={k: v for k, v in manifest.files.items() if k != "calibrated"})
    assert "--work-dir" in compare.open_calibrated(without_role)[1]


def test_a_changed_calibrated_checkpoint_is_refused_and_the_graph_not_blamed(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "copy")
    stored = plan.with_suffix(".calibrated") / f"model-{DOWN.removesuffix('.mlp.down_proj')}.safetensors"
    edit_scale(stored, f"{DOWN}.weight_scale", 1.5)
    with pytest.raises(UserError, match=r"safetensors: its sha256 is .* it was changed"):
        climb_on(plan, samples=1)


def test_a_scale_wrong_in_checkpoint_and_graph_is_found_by_the_output_of_its_block(whole, plans, tmp_path):
    """As a calibration gone wrong would leave it: graph and checkpoint agree, and every hash is right."""
    plan = copy_export(plans["int8"], tmp_path / "damaged")
    stored = plan.with_suffix(".calibrated") / f"model-{DOWN.removesuffix('.mlp.down_proj')}.safetensors"
    edit_scale(stored, f"{DOWN}.weight_scale", 1.5)
    reseal_folder(plan.with_suffix(".calibrated"))
    edit_weight(plan.with_suffix(".onnx"), f"{DOWN}.weight_scale", np.float32, times_one_and_a_half)
    ladder = climb_on(plan, samples=1)
    loss = find_loss(ladder)
    assert ladder.wrong == ()
    assert (loss.rung, loss.layers[0]) == (FAKE_QUANT, DOWN.removesuffix(".mlp.down_proj"))
    assert find_loss(whole["int8"]).layers[0] != loss.layers[0]


def test_a_changed_plan_is_refused_where_it_would_run(plans, tmp_path, monkeypatch):
    plan = copy_export(plans["int4"], tmp_path / "copy")
    plan.write_bytes(b"a plan")
    manifest = read_manifest(plan.with_suffix(".json"))
    described = {**describe_file(plan), "sha256": 64 * "0"}
    manifest = replace(manifest, files={**manifest.files, "language_plan": described})
    monkeypatch.setattr(compare, "engine_obstacle", lambda _: "")
    with ExitStack() as stack, pytest.raises(UserError, match=r"\.plan: its sha256 is .* it was changed"):
        compare._engine_rung(manifest, [], stack)


def test_without_graphs_the_calibrated_checkpoint_is_still_compared(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "copy")
    plan.with_suffix(".onnx").unlink()
    ladder = climb_on(plan, samples=1)
    assert "is missing" in reasons(ladder)[GRAPH]
    assert [(c.rung, c.against) for c in ladder.comparisons] == [(FAKE_QUANT, FLOAT)]
    assert (ladder.linears, ladder.wrong) == (0, ())


def test_nothing_to_compare_is_an_error_before_any_work(plans, tmp_path, monkeypatch):
    plan = copy_export(plans["fp16"], tmp_path / "copy")
    plan.with_suffix(".onnx.data").unlink()
    monkeypatch.setattr(compare, "_torch_rungs", None)
    with pytest.raises(UserError, match=r"nothing can be compared here.*quantizes no linear.*onnx\.data.*no engine"):
        climb_on(plan, samples=1)


def test_the_engine_rung_runs_through_polygraphy(plans, monkeypatch):
    """There is no engine here; the session's graphs in Polygraphy's runners take its place."""
    monkeypatch.setattr(compare, "engine_obstacle", lambda _: "")
    monkeypatch.setattr(compare, "engine_runners", session_runners)
    ladder = climb_on(plans["int4"], samples=2)
    assert reasons(ladder) == {}
    assert [(c.rung, c.against) for c in ladder.comparisons][-2:] == [(ENGINE, FLOAT), (ENGINE, GRAPH)]
    # It is fed float16 image features, as an engine is.
    assert compared(ladder, ENGINE, GRAPH).total.sqnr_db > 60


def test_an_engine_that_cannot_be_loaded_is_not_run(plans, monkeypatch):
    def refuse(_):
        raise UserError("Polygraphy: built for another GPU")

    monkeypatch.setattr(compare, "engine_obstacle", lambda _: "")
    monkeypatch.setattr(compare, "engine_runners", refuse)
    ladder = climb_on(plans["int4"], samples=1)
    assert reasons(ladder) == {ENGINE: "Polygraphy: built for another GPU"}


def test_samples_without_pictures_skip_the_tower(llava, tmp_path):
    """On a float32 checkpoint, whose graph rounds all floats to float16: fake-quant rounds them too."""
    plan, path = tmp_path / "out" / "e.plan", tmp_path / "text.jsonl"
    qvlm_export.export(str(llava(dtype="float32")), plan, backend="onnx", samples=2, max_length=128)
    path.write_text('{"prompt": "Name the color.", "answer": "red"}\n{"prompt": "And now?"}\n')
    manifest = read_manifest(plan.with_suffix(".json"))
    samples = read_samples(manifest, path, 10)
    ladder = compare_forms(
        ComparisonJob(manifest, open_checkpoint(manifest.model["name"]), samples, True), Reporter(quiet=True)
    )
    groups = compared(ladder, GRAPH, FLOAT).groups
    assert {group: sums.tokens > 0 for group, sums in groups.items()} == {"image": False, "prompt": True, "answer": True}
    assert [layer.block for layer in ladder.layers] == [f"language_model.model.layers.{i}" for i in range(2)]
    # No activation is rounded in an int4 decoder, so nothing but float32 rounding keeps the two apart.
    assert compared(ladder, GRAPH, FAKE_QUANT).total.sqnr_db > 100
    assert all(layer.graph_sqnr_db > 100 for layer in ladder.layers)


def ladder_of(*steps, layers=(), wrong=()):
    """A ladder whose rungs have these sums over answer tokens, each against the one below it and against float."""
    rungs = [ModelRun(name, lambda _: np.zeros(0)) for name in (FLOAT, FAKE_QUANT, GRAPH, ENGINE)[: len(steps) + 1]]
    comparisons = [
        Comparison(rung.name, below.name, {"answer": sums})
        for below, rung, sums in zip(rungs, rungs[1:], steps, strict=False)
    ]
    return ComparisonChain(tuple(rungs), tuple(comparisons), layers, 0, wrong)


def test_the_costliest_step_is_named():
    cheap, dear = Sums(tokens=10, kl=0.1), Sums(tokens=10, kl=0.5)
    layers = (LayerScore("a", 40.0, 90.0), LayerScore("b", 20.0, 80.0), LayerScore("c", 19.0, 10.0))
    assert find_loss(ladder_of(dear, cheap, layers=layers)) == Loss(FAKE_QUANT, 0.05, ("b", "c", "a"))
    assert find_loss(ladder_of(cheap, dear, layers=layers)) == Loss(GRAPH, 0.05, ("c", "b", "a"))
    assert find_loss(ladder_of(cheap, cheap, dear, layers=layers)) == Loss(ENGINE, 0.05, ())
    assert find_loss(ladder_of(dear, replace(cheap, not_finite=1))) == Loss(GRAPH, math.inf, ())
    assert find_loss(ladder_of(Sums(tokens=10), Sums(tokens=10, kl=1e-7))) is None


def test_the_worst_layer_is_the_one_that_adds_noise_not_the_one_that_carries_it():
    assert worst_layers([("a", 40.0), ("b", 20.0), ("c", 19.9), ("d", 25.0), ("e", math.inf)]) == ("b", "c", "a")
    assert worst_layers([("a", math.inf), ("b", math.inf)]) == ()


def test_thresholds_hold_on_their_value_and_fail_beside_it():
    ladder = ladder_of(Sums(tokens=100, agreed=90, kl=2.0))
    assert [c.passed for c in check_thresholds(ladder, 0.9, 0.02)] == [True, True]
    assert [c.passed for c in check_thresholds(ladder, 0.901, 0.0199)] == [False, False]
    assert [c.metric for c in check_thresholds(ladder, None, 0.1)] == ["kl"]
    assert check_thresholds(ladder, None, None) == []


def test_what_is_not_finite_meets_no_threshold():
    ladder = ladder_of(Sums(tokens=99, agreed=99, not_finite=1))
    assert [c.passed for c in check_thresholds(ladder, 1.0, 10.0)] == [False, False]
    ladder = ladder_of(Sums(not_finite=5))
    assert [c.passed for c in check_thresholds(ladder, 0.5, 10.0)] == [False, False]
