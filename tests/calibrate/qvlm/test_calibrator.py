"""A whole calibration by Q-VLM: its record, its checkpoint, its errors, and a run that was interrupted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_export import make_sample, mixed_samples, schemes_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step, record_outputs
from qvlm_export.calibrate.quantization.quantizer import sqnr_db
from qvlm_export.calibrate.quantization.tokens import mean_token_error
from qvlm_export.calibrate.qvlm.block_search import SQNR_ROWS
from qvlm_export.calibrate.qvlm.calibrator import calibrate_qvlm
from qvlm_export.calibrate.qvlm.config import QVLM
from qvlm_export.calibrate.qvlm.joint_search import relative_error
from qvlm_export.checkpoints.checkpoint import open_checkpoint

LAST = "language_model.model.layers.1"
TOWER = "vision_tower.vision_model.encoder.layers"
QUICK = replace(QVLM, vision_epochs=2, vision_batch=1)
NOT_TUNED = replace(QVLM, vision_epochs=0)
LAYERWISE = replace(NOT_TUNED, partition="layers")


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_checkpoint(str(llava(dtype="float32", vision={"num_hidden_layers": 3})))  # of which two are used


def samples_of(checkpoint):
    """Samples with one, no and two images; the last two tokens are the answer."""
    return [Sample(s.input_ids, s.pixel_values, len(s.input_ids) - 2) for s in mixed_samples(checkpoint)[:3]]


def calibrated(checkpoint, schemes, folder, config, *, samples=None, work=None, steps=None):
    calibration_set = samples_of(checkpoint) if samples is None else samples
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, calibration_set, work)
    writer = CalibratedWriter(folder)
    report = (lambda *_: None) if steps is None else (lambda *step: steps.append(step))
    summary = calibrate_qvlm(job, writer, report, config)
    writer.finish(checkpoint.config_json, summary)
    return CalibratedCheckpoint(folder)


def simulate(checkpoint, quantized, source):
    """Outputs of all blocks, and of the last linear, in the float model (quantized is None) or as quantized."""
    step = float_step(source) if quantized is None else fake_quantized_step(quantized, source)
    outputs, last, model = {}, [], make_blocks(checkpoint.hf_config)
    recording = record_outputs(step, lambda prefix, out: outputs.update({prefix: out}))
    down = model.text_layers[-1].module.mlp.down_proj
    handle = down.register_forward_hook(lambda _, __, out: last.append(out[0]))
    samples = samples_of(checkpoint)
    run_decoder_blocks(model, source, samples, run_vision_blocks(model, source, samples, recording), recording)
    handle.remove()
    return outputs, {"down": torch.cat(last)}


@pytest.mark.parametrize(("preset", "config"), [("sim-w4a4", QUICK), ("int4", LAYERWISE)])
def test_the_record_agrees_with_a_simulation_of_the_checkpoint(checkpoint, tmp_path, preset, config):
    quantized = calibrated(checkpoint, schemes_of(checkpoint, preset), tmp_path / "c", config)
    blocks = quantized.summary["blocks"]
    exact, exact_down = simulate(checkpoint, None, checkpoint.source)
    rounded, rounded_down = simulate(checkpoint, quantized, DequantizedSource(quantized))
    for block in blocks:
        expected = mean_token_error(rounded[block["name"]], exact[block["name"]])
        assert block["error"] == pytest.approx(expected, rel=1e-3)
    assert blocks[-1]["joint_searches"][-1]["error_after"] == pytest.approx(
        relative_error(rounded_down, exact_down), rel=1e-3
    )

    exact_rows, rounded_rows = exact_down["down"], rounded_down["down"]
    some = torch.linspace(0, len(exact_rows) - 1, min(SQNR_ROWS, len(exact_rows))).long()
    assert len(some) < len(exact_rows)
    down = blocks[-1]["layers"][-1]["linears"][f"{LAST}.mlp.down_proj"]
    assert down["sqnr_db"] == pytest.approx(sqnr_db(exact_rows[some], rounded_rows[some]), abs=0.01)

    layers = [layer for block in blocks for layer in block["layers"]]
    names = [name for layer in layers for name in layer["linears"]]
    assert len(names) == len(set(names))
    assert set(names) == set(make_blocks(checkpoint.hf_config).quantizable())
    depths = [search["layers"] for block in blocks for search in block["joint_searches"]]
    assert max(depths) == (1 if config is LAYERWISE else 3)
    for block in blocks:
        starts = [layer["starts_block"] for layer in block["layers"]]
        assert starts[0]
        assert sum(starts) == len(block["joint_searches"])
        assert sum(search["layers"] for search in block["joint_searches"]) == len(starts)
        for search in block["joint_searches"]:
            quantizes = quantized.schemes[next(iter(block["layers"][0]["linears"]))].activation_bits is not None
            assert search["layer_forwards"] == (1 + quantizes) * sum(5**d for d in range(1, search["layers"] + 1))
            assert search["error_after"] <= search["error_before"]
    json.dumps(quantized.summary, allow_nan=False)


def test_ranges_are_the_recorded_percentiles_of_the_tensors(checkpoint, tmp_path):
    schemes = {n: s for n, s in schemes_of(checkpoint, "sim-w4a4").items() if n.startswith(f"{TOWER}.0.self_attn.q")}
    quantized = calibrated(checkpoint, schemes, tmp_path / "c", NOT_TUNED)
    ((name, scheme),) = schemes.items()
    (layer,) = (layer for block in quantized.summary["blocks"] for layer in block["layers"])
    inputs, model = [], make_blocks(checkpoint.hf_config)
    linear = model.vision_layers[0].module.self_attn.q_proj
    linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten()))
    run_vision_blocks(model, checkpoint.source, samples_of(checkpoint), float_step(checkpoint.source))
    values = torch.cat(inputs).abs().numpy()
    amax = np.quantile(values, layer["activation_percentile"], method="inverted_cdf")
    assert layer["activation_percentile"] < 1.0
    assert quantized.input_scale(name) == pytest.approx(amax / 7, rel=2e-3)
    groups = np.abs(checkpoint.source.load(f"{name}.weight")).reshape(128, -1, scheme.group_size)
    amax = np.quantile(groups, layer["weight_percentile"], axis=2, method="inverted_cdf")
    np.testing.assert_allclose(quantized.linear(name).scale, amax / scheme.qmax, rtol=1e-3)


def test_tuning_changes_gains_and_biases_of_the_visual_encoder_and_nothing_else(checkpoint, tmp_path):
    schemes = {n: s for n, s in schemes_of(checkpoint, "sim-w3a16").items() if not n.startswith("language")}
    tuned, plain = (calibrated(checkpoint, schemes, tmp_path / n, c) for n, c in {"on": QUICK, "off": NOT_TUNED}.items())
    source = checkpoint.source
    floats = [name for name in source if name.removesuffix(".weight") not in schemes]
    assert [name for name in floats if not np.array_equal(plain.floats.load(name), source.load(name))] == []
    changed = {name for name in floats if not np.array_equal(tuned.floats.load(name), source.load(name))}
    records = {b["name"]: b["vision_optimization"] for b in tuned.summary["blocks"] if not b["name"].startswith("language")}
    assert list(records) == [f"{TOWER}.0", f"{TOWER}.1", "multi_modal_projector"]
    assert {name for name, record in records.items() if record["tuned"]} >= {f"{TOWER}.0", f"{TOWER}.1"}
    expected = {n for n in floats for block, r in records.items() if r["tuned"] and n.startswith(f"{block}.")}
    assert changed == {n for n in expected if source.load(n).ndim == 1}
    for record in records.values():
        terms = record["before"], record["after"]
        lower = [sum(t[k] / terms[0][k] for k in ("task", "entropy", "error")) for t in terms]
        assert (lower[1] < lower[0]) == record["tuned"]
    assert (plain.summary["vision_optimization"], plain.summary["block_backwards"]) == (None, 0)
    assert tuned.summary["vision_optimization"]["after"] == records["multi_modal_projector"]["after"]
    errors = [{block["name"]: block["error"] for block in x.summary["blocks"]} for x in (tuned, plain)]
    assert errors[0][f"{TOWER}.1"] < errors[1][f"{TOWER}.1"]  # after the search, on these samples


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """A calibration that was not interrupted, with a work folder, and its reports of progress."""
    folder, steps = tmp_path_factory.mktemp("whole"), []
    work = CalibrationWork(folder / "work")
    return calibrated(checkpoint, few(checkpoint), folder / "c", QUICK, work=work, steps=steps), steps


def few(checkpoint):
    """Schemes of some blocks only, as others take time."""
    parts = (f"{TOWER}.0.mlp", f"{TOWER}.1.mlp", f"{LAST}.mlp")
    return {name: scheme for name, scheme in schemes_of(checkpoint, "sim-w4a8").items() if name.startswith(parts)}


def test_progress_never_goes_back(whole):
    _, steps = whole
    done, totals = [step[0] for step in steps], {step[1] for step in steps}
    assert done == sorted(done)
    assert totals == {done[-1]}


@pytest.mark.parametrize("share", [0.06, 0.105, 0.5])
def test_a_run_that_was_interrupted_continues_to_the_same_bytes(checkpoint, tmp_path, whole, share):
    """Inside the optimization of the visual encoder, in the observation, and between two searched blocks."""
    expected, steps = whole
    assert expected.summary["vision_optimization"]["tuned"] == 2
    assert any(0.06 < done / total < 0.07 for done, total, _ in steps)  # when the first block was tuned

    def kill(done, total, _):
        if done >= share * total:
            raise KilledError

    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, few(checkpoint), samples_of(checkpoint))
    with pytest.raises(KilledError):
        calibrate_qvlm(replace(job, work=CalibrationWork(tmp_path / "w")), CalibratedWriter(tmp_path / "c"), kill, QUICK)
    resumed = calibrated(checkpoint, few(checkpoint), tmp_path / "c", QUICK, work=CalibrationWork(tmp_path / "w"))
    assert {path.name for path in resumed.folder.iterdir()} == {path.name for path in expected.folder.iterdir()}
    for path in expected.folder.iterdir():
        assert path.read_bytes() == (resumed.folder / path.name).read_bytes(), path.name


def test_inputs_that_8_bits_cannot_hold_stay_quantized(checkpoint, tmp_path):
    """The paper has nothing to fall back to, so a job that is not strict keeps its schemes, too."""
    schemes = {n: s for n, s in schemes_of(checkpoint, "int8").items() if n.startswith(LAST)}
    quantized = calibrated(checkpoint, schemes, tmp_path / "c", QUICK)
    assert quantized.schemes == schemes
    assert quantized.summary["vision_optimization"] is None  # nothing of the visual encoder is quantized


def test_missing_images_and_pixels_that_are_not_finite_are_refused(checkpoint, tmp_path):
    texts = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    with pytest.raises(UserError, match=r"^vision_tower.*no calibration sample has a picture"):
        calibrated(checkpoint, schemes_of(checkpoint, "int4"), tmp_path / "c", QUICK, samples=texts)
    good, bad = (make_sample(checkpoint, words=8, images=1, seed=seed) for seed in range(2))
    bad.pixel_values[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=rf"^{TOWER}\.0: activations of sample 2 are not finite"):
        calibrated(checkpoint, schemes_of(checkpoint, "int4"), tmp_path / "c", QUICK, samples=[good, bad])
