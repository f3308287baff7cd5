"""Stepwise accuracy validation on intact, damaged and incomplete exports: its numbers are right, and it finds the damage."""

from __future__ import annotations

import contextlib
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
from qvlm_export.inference.forms import ENGINE, FAKE_QUANT, FLOAT, GRAPH
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation import compare
from qvlm_export.validation.accuracy import (
    AccuracyLoss,
    Comparison,
    ComparisonChain,
    LayerScore,
    ModelRun,
    check_thresholds,
    find_accuracy_loss,
    token_kind_masks,
    worst_layers,
)
from qvlm_export.validation.compare import ComparisonJob, compare_forms
from qvlm_export.validation.validate import read_inputs

DOWN = "language_model.model.layers.1.mlp.down_proj"
IMAGE = 9


@pytest.fixture(scope="module")
def plans(llava, tmp_path_factory):
    """The paths of an int4, an int8 and an fp16 export without engines, by scheme."""
    paths = {}
    for scheme in ("int4", "int8", "fp16"):
        paths[scheme] = tmp_path_factory.mktemp(scheme) / "export" / "e.plan"
        qvlm_export.export(str(llava()), paths[scheme], scheme=scheme, backend="onnx", samples=4, max_length=128)
    return paths


@pytest.fixture(scope="module", autouse=True)
def in_folder_of_the_checkpoint(llava):
    """Manifests hold no paths, so a checkpoint is found by its name in the current folder."""
    with contextlib.chdir(llava().parent):
        yield


def compare_export(plan, *, samples=3, per_layer=False):
    """Compares an export with the checkpoint that it was made from, on the first built-in samples."""
    manifest = read_manifest(plan.with_suffix(".json"))
    checkpoint = open_checkpoint(manifest.model["name"])
    job = ComparisonJob(manifest, checkpoint, read_inputs(manifest, None, samples), per_layer)
    return compare_forms(job, Reporter(quiet=True))


@pytest.fixture(scope="module")
def intact(plans):
    """The comparison chains of the undamaged exports, with scores of every block, by scheme."""
    return {scheme: compare_export(plan, per_layer=True) for scheme, plan in plans.items()}


def comparison_of(chain, form, against):
    (comparison,) = [c for c in chain.comparisons if (c.form, c.against) == (form, against)]
    return comparison


def reasons(chain):
    """Why forms did not run, by form."""
    return {run.name: run.reason for run in chain.runs if run.logits is None}


def graph_scores(chain):
    """SQNR in dB of the graph's block outputs against fake-quant, by block."""
    return {layer.block: layer.graph_sqnr_db for layer in chain.layers}


def test_positions_belong_to_the_kind_of_the_token_they_predict():
    ids = np.array([1, IMAGE, IMAGE, 2, 3, 4, 5, 6])  # the answer is 5 and 6
    by_kind = token_kind_masks(Sample(ids, np.zeros((1, 3, 2, 2), np.float32), 6), IMAGE)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in by_kind.items()} == {
        "image": [0, 1],
        "prompt": [2, 3, 4],
        "answer": [5, 6],  # position 7 would predict a token behind the end
    }


def test_without_an_answer_the_last_position_predicts_the_first_answer_token():
    by_kind = token_kind_masks(Sample(np.array([1, IMAGE, 2]), np.zeros((1, 3, 2, 2), np.float32), 3), IMAGE)
    assert {name: mask.tolist() for name, mask in by_kind.items()} == {
        "image": [True, False, False],
        "prompt": [False, True, False],
        "answer": [False, False, True],
    }


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_every_form_that_can_run_is_compared_with_float_and_the_form_before_it(intact, scheme):
    chain = intact[scheme]
    assert [run.name for run in chain.runs] == [FLOAT, FAKE_QUANT, GRAPH, ENGINE]
    assert reasons(chain) == {ENGINE: "this export has no engine"}
    pairs = [(c.form, c.against) for c in chain.comparisons]
    assert pairs == [(FAKE_QUANT, FLOAT), (GRAPH, FLOAT), (GRAPH, FAKE_QUANT)]
    assert [(c.form, c.against) for c in chain.steps()] == [(FAKE_QUANT, FLOAT), (GRAPH, FAKE_QUANT)]


def test_kl_and_agreement_equal_those_of_transformers_and_a_session(intact, plans):
    """An independent reference: KL and agreement of the graph on answer tokens, from transformers and `open_session`."""
    manifest = read_manifest(plans["int4"].with_suffix(".json"))
    model = LlavaForConditionalGeneration.from_pretrained(manifest.model["name"], dtype=torch.float32).eval()
    kl, agreed = [], []
    with open_session(manifest, "onnxruntime") as session, torch.inference_mode():
        for sample in (one.sample for one in read_inputs(manifest, None, 3)):
            ids, pixels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.pixel_values)
            expected = model(input_ids=ids, pixel_values=pixels).logits[0, sample.answer_start - 1 : -1].double()
            logits = torch.from_numpy(session.logits(sample.input_ids[None], sample.pixel_values)[0])
            logits = logits[sample.answer_start - 1 : -1].double()
            kl.append(torch.nn.functional.kl_div(logits.log_softmax(-1), expected.softmax(-1), reduction="none").sum(-1))
            agreed.append(expected.argmax(-1) == logits.argmax(-1))
    answer = comparison_of(intact["int4"], GRAPH, FLOAT).by_kind["answer"]
    assert answer.tokens == sum(len(k) for k in kl)
    assert answer.mean_kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert answer.agreement == pytest.approx(float(torch.cat(agreed).double().mean()))


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_with_a_correct_graph_the_loss_is_attributed_to_quantization(intact, scheme):
    chain = intact[scheme]
    loss = find_accuracy_loss(chain)
    assert loss.form == FAKE_QUANT
    assert loss.kl == comparison_of(chain, FAKE_QUANT, FLOAT).total.mean_kl
    assert set(loss.layers) <= {layer.block for layer in chain.layers}
    assert (chain.checked_linears, chain.wrong_weights) == (34, ())


def test_int8_loses_less_accuracy_than_int4(intact):
    costs = {scheme: comparison_of(intact[scheme], FAKE_QUANT, FLOAT).total for scheme in ("int4", "int8")}
    assert costs["int8"].mean_kl < costs["int4"].mean_kl / 5
    assert costs["int8"].sqnr_db > costs["int4"].sqnr_db + 6
    assert costs["int8"].agreement > costs["int4"].agreement


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_every_block_has_an_sqnr_in_fake_quant_and_in_the_graph(intact, scheme):
    layers = intact[scheme].layers
    assert len(layers) == 3 + 1 + 2
    assert layers[0].graph_sqnr_db > 100  # before any value is rounded differently in the graph
    for layer in layers:
        assert layer.graph_sqnr_db > layer.sqnr_db > 0


def test_an_export_without_quantization_loses_nothing(intact):
    chain = intact["fp16"]
    assert reasons(chain) == {FAKE_QUANT: "the export quantizes no linear", ENGINE: "this export has no engine"}
    assert [(c.form, c.against) for c in chain.comparisons] == [(GRAPH, FLOAT)]
    assert find_accuracy_loss(chain) is None
    assert comparison_of(chain, GRAPH, FLOAT).total.agreement == 1.0
    assert comparison_of(chain, GRAPH, FLOAT).total.sqnr_db > 60
    assert (chain.layers, chain.checked_linears) == ((), 0)


def test_a_linear_zeroed_in_the_graph_is_named(intact, plans, tmp_path):
    plan = copy_export(plans["int4"], tmp_path / "damaged")
    edit_weight(plan.with_suffix(".onnx"), f"{DOWN}.weight_codes", np.uint8, zero)
    chain = compare_export(plan)
    loss = find_accuracy_loss(chain)
    assert (loss.form, loss.layers) == (GRAPH, (DOWN,))
    assert comparison_of(chain, FAKE_QUANT, FLOAT) == comparison_of(intact["int4"], FAKE_QUANT, FLOAT)
    damaged, undamaged = (comparison_of(c, GRAPH, FAKE_QUANT).total for c in (chain, intact["int4"]))
    assert damaged.mean_kl > 100 * undamaged.mean_kl
    assert loss.kl == damaged.mean_kl


def test_a_single_wrong_scale_is_named_even_if_it_costs_little(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "damaged")
    linear = "multi_modal_projector.linear_1"
    edit_weight(plan.with_suffix(".vision.onnx"), f"{linear}.weight_scale", np.float32, double_first)
    chain = compare_export(plan, samples=1)
    loss = find_accuracy_loss(chain)
    assert (loss.form, loss.layers) == (GRAPH, (linear,))
    assert chain.wrong_weights[0].what == "1 of 256 scales differ"


def test_a_damaged_norm_is_found_by_the_sqnr_of_its_block(plans, tmp_path):
    """No quantized weight is wrong here, so form and block must be found from KL divergence and SQNR."""
    plan = copy_export(plans["int8"], tmp_path / "damaged")
    norm = "language_model.model.layers.1.post_attention_layernorm.weight"
    edit_weight(plan.with_suffix(".onnx"), norm, np.float16, double)
    chain = compare_export(plan, samples=1, per_layer=True)
    loss = find_accuracy_loss(chain)
    assert chain.wrong_weights == ()
    assert (loss.form, loss.layers[0]) == (GRAPH, "language_model.model.layers.1")
    assert graph_scores(chain)["language_model.model.layers.0"] > 25 > graph_scores(chain)[loss.layers[0]]


def test_without_the_calibrated_checkpoint_the_graph_is_still_compared(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "copy")
    shutil.rmtree(plan.with_suffix(".calibrated"))
    chain = compare_export(plan, samples=1)
    assert "is missing" in reasons(chain)[FAKE_QUANT]
    assert [(c.form, c.against) for c in chain.comparisons] == [(GRAPH, FLOAT)]
    assert find_accuracy_loss(chain).form == GRAPH
    manifest = read_manifest(plan.with_suffix(".json"))
    without_role = replace(manifest, files={k: v for k, v in manifest.files.items() if k != "calibrated"})
    assert "--work-dir" in compare.open_calibrated(without_role)[1]


def test_a_changed_calibrated_checkpoint_is_refused(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "copy")
    stored = plan.with_suffix(".calibrated") / f"model-{DOWN.removesuffix('.mlp.down_proj')}.safetensors"
    edit_scale(stored, f"{DOWN}.weight_scale", 1.5)
    with pytest.raises(UserError, match=r"safetensors: its sha256 is .* it was changed"):
        compare_export(plan, samples=1)


def test_a_scale_wrong_in_checkpoint_and_graph_is_found_by_the_sqnr_of_its_block(intact, plans, tmp_path):
    """As a faulty calibration would leave it: graph and calibrated checkpoint agree, and every hash is right."""
    plan = copy_export(plans["int8"], tmp_path / "damaged")
    stored = plan.with_suffix(".calibrated") / f"model-{DOWN.removesuffix('.mlp.down_proj')}.safetensors"
    edit_scale(stored, f"{DOWN}.weight_scale", 1.5)
    reseal_folder(plan.with_suffix(".calibrated"))
    edit_weight(plan.with_suffix(".onnx"), f"{DOWN}.weight_scale", np.float32, times_one_and_a_half)
    chain = compare_export(plan, samples=1)
    loss = find_accuracy_loss(chain)
    assert chain.wrong_weights == ()
    assert (loss.form, loss.layers[0]) == (FAKE_QUANT, DOWN.removesuffix(".mlp.down_proj"))
    assert find_accuracy_loss(intact["int8"]).layers[0] != loss.layers[0]


def test_a_changed_engine_file_is_refused_before_it_runs(plans, tmp_path, monkeypatch):
    plan = copy_export(plans["int4"], tmp_path / "copy")
    plan.write_bytes(b"a plan")
    manifest = read_manifest(plan.with_suffix(".json"))
    described = {**describe_file(plan), "sha256": 64 * "0"}
    manifest = replace(manifest, files={**manifest.files, "language_plan": described})
    monkeypatch.setattr(compare, "engine_obstacle", lambda _: "")
    with ExitStack() as stack, pytest.raises(UserError, match=r"\.plan: its sha256 is .* it was changed"):
        compare._open_engine_run(manifest, [], stack)


def test_without_graphs_the_calibrated_checkpoint_is_still_compared(plans, tmp_path):
    plan = copy_export(plans["int8"], tmp_path / "copy")
    plan.with_suffix(".onnx").unlink()
    chain = compare_export(plan, samples=1)
    assert "is missing" in reasons(chain)[GRAPH]
    assert [(c.form, c.against) for c in chain.comparisons] == [(FAKE_QUANT, FLOAT)]
    assert (chain.checked_linears, chain.wrong_weights) == (0, ())


def test_nothing_to_compare_is_an_error_before_any_work(plans, tmp_path, monkeypatch):
    plan = copy_export(plans["fp16"], tmp_path / "copy")
    plan.with_suffix(".onnx.data").unlink()
    monkeypatch.setattr(compare, "run_reference", None)
    with pytest.raises(UserError, match=r"nothing can be compared here.*quantizes no linear.*onnx\.data.*no engine"):
        compare_export(plan, samples=1)


def test_the_engine_runs_through_polygraphy(plans, monkeypatch):
    """This machine has no engine; the session's graphs in Polygraphy's runners stand in for it."""
    monkeypatch.setattr(compare, "engine_obstacle", lambda _: "")
    monkeypatch.setattr(compare, "engine_runners", session_runners)
    chain = compare_export(plans["int4"], samples=2)
    assert reasons(chain) == {}
    assert [(c.form, c.against) for c in chain.comparisons][-2:] == [(ENGINE, FLOAT), (ENGINE, GRAPH)]
    # Image features are fed in float16, as to an engine, which costs some accuracy.
    assert comparison_of(chain, ENGINE, GRAPH).total.sqnr_db > 60


def test_an_engine_that_cannot_be_loaded_is_reported_as_not_run(plans, monkeypatch):
    def refuse(_):
        raise UserError("Polygraphy: built for another GPU")

    monkeypatch.setattr(compare, "engine_obstacle", lambda _: "")
    monkeypatch.setattr(compare, "engine_runners", refuse)
    chain = compare_export(plans["int4"], samples=1)
    assert reasons(chain) == {ENGINE: "Polygraphy: built for another GPU"}


def test_samples_without_images_skip_the_vision_tower(llava, tmp_path):
    """With a float32 checkpoint, whose graph rounds all floats to float16; fake-quant must round them, too."""
    plan, path = tmp_path / "out" / "e.plan", tmp_path / "text.jsonl"
    model = str(llava(dtype="float32"))
    qvlm_export.export(model, plan, backend="onnx", samples=2, max_length=128)
    path.write_text('{"prompt": "Name the color.", "answer": "red"}\n{"prompt": "And now?"}\n')
    manifest = read_manifest(plan.with_suffix(".json"))
    inputs = read_inputs(manifest, path, 10)
    chain = compare_forms(ComparisonJob(manifest, open_checkpoint(model), inputs, True), Reporter(quiet=True))
    by_kind = comparison_of(chain, GRAPH, FLOAT).by_kind
    assert {kind: sums.tokens > 0 for kind, sums in by_kind.items()} == {"image": False, "prompt": True, "answer": True}
    assert [layer.block for layer in chain.layers] == [f"language_model.model.layers.{i}" for i in range(2)]
    # No activation is quantized in an int4 decoder, so the two differ by float32 rounding only.
    assert comparison_of(chain, GRAPH, FAKE_QUANT).total.sqnr_db > 100
    assert all(layer.graph_sqnr_db > 100 for layer in chain.layers)


def make_chain(*steps, layers=(), wrong_weights=()):
    """A chain in which each form has the given sums over answer tokens, against the form before it."""
    runs = [ModelRun(name, lambda _: np.zeros(0)) for name in (FLOAT, FAKE_QUANT, GRAPH, ENGINE)[: len(steps) + 1]]
    comparisons = [
        Comparison(run.name, previous.name, {"answer": sums})
        for previous, run, sums in zip(runs, runs[1:], steps, strict=False)
    ]
    return ComparisonChain(tuple(runs), tuple(comparisons), layers, 0, wrong_weights)


def test_the_form_with_the_largest_kl_is_named():
    small, large = Sums(tokens=10, kl=0.1), Sums(tokens=10, kl=0.5)
    layers = (LayerScore("a", 40.0, 90.0), LayerScore("b", 20.0, 80.0), LayerScore("c", 19.0, 10.0))
    assert find_accuracy_loss(make_chain(large, small, layers=layers)) == AccuracyLoss(FAKE_QUANT, 0.05, ("b", "c", "a"))
    assert find_accuracy_loss(make_chain(small, large, layers=layers)) == AccuracyLoss(GRAPH, 0.05, ("c", "b", "a"))
    assert find_accuracy_loss(make_chain(small, small, large, layers=layers)) == AccuracyLoss(ENGINE, 0.05, ())
    assert find_accuracy_loss(make_chain(large, replace(small, not_finite=1))) == AccuracyLoss(GRAPH, math.inf, ())
    assert find_accuracy_loss(make_chain(Sums(tokens=10), Sums(tokens=10, kl=1e-7))) is None


def test_the_worst_block_is_the_one_that_adds_noise_not_one_that_inherits_it():
    assert worst_layers([("a", 40.0), ("b", 20.0), ("c", 19.9), ("d", 25.0), ("e", math.inf)]) == ("b", "c", "a")
    assert worst_layers([("a", math.inf), ("b", math.inf)]) == ()


def test_thresholds_pass_at_their_value_and_fail_just_beyond_it():
    chain = make_chain(Sums(tokens=100, agreed=90, kl=2.0))
    assert [c.passed for c in check_thresholds(chain, 0.9, 0.02)] == [True, True]
    assert [c.passed for c in check_thresholds(chain, 0.901, 0.0199)] == [False, False]
    assert [c.metric for c in check_thresholds(chain, None, 0.1)] == ["kl"]
    assert check_thresholds(chain, None, None) == []


def test_logits_that_are_not_finite_meet_no_threshold():
    chain = make_chain(Sums(tokens=99, agreed=99, not_finite=1))
    assert [c.passed for c in check_thresholds(chain, 1.0, 10.0)] == [False, False]
    chain = make_chain(Sums(not_finite=5))
    assert [c.passed for c in check_thresholds(chain, 0.5, 10.0)] == [False, False]
