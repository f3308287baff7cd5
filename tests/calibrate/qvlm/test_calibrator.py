"""The Q-VLM baseline: replay against the whole block, the search against trying everything, and a whole calibration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from quantized_module import quantized_output
from small_export import make_sample, mixed_samples, schemes_of
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear, load_block, make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step, record_outputs
from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.qvlm.calibrator import calibrate_percentile, calibrate_qvlm, observe_inputs, search_block
from qvlm_export.calibrate.qvlm.clip_candidates import Clips, QuantizableLayer
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, record_linear_outputs, relative_error, replay_module
from qvlm_export.calibrate.qvlm.partition import LayerInput, partition_by_entropy
from qvlm_export.checkpoints.checkpoint import open_checkpoint

W4A4 = LinearScheme(4, 4, 64)
LAST = "language_model.model.layers.1"


def make_block(checkpoint, kind):
    """A block of this kind, batches of its inputs, and how to run it."""
    blocks, generator = make_blocks(checkpoint.hf_config), torch.Generator().manual_seed(0)
    if kind == "decoder":
        batches = [torch.randn(1, n, 256, generator=generator) for n in (7, 12)]

        def run(module, x):
            rope = blocks.rotary(x, position_ids=torch.arange(x.shape[1])[None])
            return module(x, attention_mask=None, position_embeddings=rope)

        return blocks.text_layers[1], batches, run
    batches = [torch.randn(n, 9, 128, generator=generator) for n in (1, 2)]
    if kind == "projector":
        return blocks.projector, batches, lambda module, x: module(x)
    return blocks.vision_layers[1], batches, lambda module, x: module(x, attention_mask=None)


def make_layers(module, batches, run, schemes):
    """Runs the float module; returns its outputs, the outputs and the inputs of its linears, and its quantizable layers."""
    shared_inputs = find_shared_inputs(module)
    inputs = {s: [] for s in shared_inputs}
    handles = [
        get_linear(module, s.linears[0]).register_forward_pre_hook(lambda _, x, s=s: inputs[s].append(x[0].flatten(0, -2)))
        for s in shared_inputs
    ]
    outputs, linear_outputs = record_linear_outputs(module, [n for s in shared_inputs for n in s.linears], run, batches)
    for handle in handles:
        handle.remove()
    layers = []
    for shared in shared_inputs:
        histogram = observe_rows("inputs", torch.cat(inputs[shared]).reshape(-1, 1)).histogram()
        linears = {name: get_linear(module, name) for name in shared.linears}
        ranges = {c: c.activation_amax(histogram) for c in PAPER_CLIPS}
        own_schemes = {name: schemes[name] for name in shared.linears if name in schemes}
        weights = {(n, c): c.weight_amax(linears[n].weight, s) for n, s in own_schemes.items() for c in PAPER_CLIPS}
        layers.append(QuantizableLayer(linears, own_schemes, ranges, weights))
    return outputs, linear_outputs, {s: torch.cat(rows) for s, rows in inputs.items()}, layers


@pytest.mark.parametrize("kind", ["decoder", "tower", "projector"])
def test_a_block_replayed_layer_by_layer_equals_the_whole_block(llava, kind):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    block, batches, run = make_block(checkpoint, kind)
    with load_block(block, checkpoint.source) as module, torch.inference_mode():
        outputs, _, inputs, layers = make_layers(module, batches, run, {})
        modules = dict(module.named_modules())
        with replay_module(module, [tuple(layer.linears) for layer in layers], run, batches) as replay:
            layer_outputs = ()
            for layer, rows in zip(layers, inputs.values(), strict=True):
                np.testing.assert_allclose(replay.layer_input(layer_outputs), rows, atol=1e-5)
                layer_outputs = (*layer_outputs, layer.output(replay.layer_input(layer_outputs), Clips()))
            assert not any(isinstance(m, nn.Linear) for m in module.modules())
            replayed = replay.finish(layer_outputs)
        assert dict(module.named_modules()) == modules
    for output, expected in zip(replayed, outputs, strict=True):
        np.testing.assert_allclose(output, expected, atol=1e-5)


def test_the_search_finds_the_best_activation_clips_and_then_the_best_weight_clips(llava):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    block, batches, run = make_block(checkpoint, "decoder")
    schemes = {"mlp.gate_proj": W4A4, "mlp.up_proj": W8A8, "mlp.down_proj": W4A4}  # attention stays float
    with load_block(block, checkpoint.source) as module, torch.inference_mode():
        module.mlp.down_proj.weight[3, 5] = 2.0  # worth clipping
        _, linear_outputs, _, layers = make_layers(module, batches, run, schemes)
        layers = layers[2:]
        noisy = [x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in batches]
        with replay_module(module, [tuple(layer.linears) for layer in layers], run, noisy) as replay:
            result = search_block(layers, replay, (), linear_outputs)

        def error(clips):
            outputs = quantized_output(module, noisy, run, layers=layers, chosen=clips, last=["mlp.down_proj"])
            return relative_error(outputs, linear_outputs)

        pairs = list(itertools.product(PAPER_CLIPS, repeat=2))
        activations = min(pairs, key=lambda p: error([Clips(p[0]), Clips(p[1])]))
        both = {p: [Clips(a, w) for a, w in zip(activations, p, strict=True)] for p in pairs}
        best = min(both.values(), key=error)
        assert list(result.clips) == best
        assert result.error == pytest.approx(error(best), rel=1e-4)
        assert result.first_error == pytest.approx(error([Clips(), Clips()]), rel=1e-4)
    assert result.error < result.first_error
    assert result.layer_forwards == 2 * (5 + 25)


def calibrated(checkpoint, schemes, folder, *, method=calibrate_qvlm, samples=None):
    calibration_set = mixed_samples(checkpoint)[:3] if samples is None else samples
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, calibration_set)
    writer, steps = CalibratedWriter(folder), []
    summary = method(job, writer, lambda *step: steps.append(step))
    writer.finish(checkpoint.config_json, summary)
    assert [step[0] for step in steps] == list(range(1, job.blocks.num_blocks() + 1))
    return CalibratedCheckpoint(folder)


@pytest.mark.parametrize(("preset", "method"), [("sim-w4a4", calibrate_qvlm), ("int4", calibrate_percentile)])
def test_the_record_agrees_with_the_checkpoint(llava, tmp_path, preset, method):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    quantized = calibrated(checkpoint, schemes_of(checkpoint, preset), tmp_path / "c", method=method)
    blocks = quantized.summary["blocks"]
    layers = [layer for block in blocks for layer in block["layers"]]
    assert sorted(n for layer in layers for n in layer["linears"]) == sorted(make_blocks(checkpoint.hf_config).quantizable())
    depths = [len(block["layers"]) for block in blocks]
    assert max(depths) == (3 if method is calibrate_qvlm else 1)
    for block, depth in zip(blocks, depths, strict=True):
        passes = 1 + (quantized.schemes[block["layers"][0]["linears"][0]].activation_bits is not None)
        assert block["layer_forwards"] == passes * sum(5**d for d in range(1, depth + 1))
        assert block["error_after"] <= block["error_before"]
        assert len({n.split("layers.")[-1].split(".")[0] for layer in block["layers"] for n in layer["linears"]}) == 1

    # The last recorded error is that of the last linear's output in a simulation of the checkpoint.
    samples, outputs = mixed_samples(checkpoint)[:3], []
    source = DequantizedSource(quantized)
    for step in (float_step(checkpoint.source), fake_quantized_step(quantized, source)):
        recorded = {}
        weights = source if outputs else checkpoint.source
        model = make_blocks(checkpoint.hf_config)
        recording = record_outputs(step, lambda prefix, out, recorded=recorded: recorded.update({prefix: out}))
        handle = model.text_layers[-1].module.mlp.down_proj.register_forward_hook(
            lambda _, __, out, recorded=recorded: recorded.setdefault("down", []).append(out[0])
        )
        features = run_vision_blocks(model, weights, samples, recording)
        run_decoder_blocks(model, weights, samples, features, recording)
        handle.remove()
        outputs.append({"down": torch.cat(recorded["down"])})
    assert relative_error(outputs[1], outputs[0]) == pytest.approx(blocks[-1]["error_after"], rel=1e-3)


def test_the_same_calibration_twice_writes_the_same_bytes_and_counts_its_forwards(llava, tmp_path):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    schemes = {n: s for n, s in schemes_of(checkpoint, "int8").items() if n.startswith(LAST)}
    samples = mixed_samples(checkpoint)[1:3]
    one, two = (calibrated(checkpoint, schemes, tmp_path / name, samples=samples) for name in ("one", "two"))
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes(), path.name
    forwards = sum(block["layer_forwards"] for block in one.summary["blocks"])
    # Both samples pass 2 decoder layers, the one with images 3 vision layers and the projector, twice.
    assert one.summary["block_forwards"] == 2 * (2 * 2 + 4) + forwards * 2 / 4
    assert set(one.schemes) == set(schemes)


def test_blocks_end_with_their_module_and_thresholds_are_by_bits():
    entropies = [("a", 4, 1.0), ("a", 4, 3.0), ("b", 4, 3.0), ("b", 4, 3.0), ("b", 8, 4.0), ("b", 8, 6.0)]
    inputs = [LayerInput(block, ("x",), bits, entropy, {}) for block, bits, entropy in entropies]
    blocks, thresholds = partition_by_entropy(inputs)
    assert thresholds == {"4": 3.0, "8": 5.0}
    assert [(b.start, b.stop) for b in blocks] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6)]
    assert partition_by_entropy([]) == ((), {})


def test_inputs_are_observed_on_the_float_model(llava):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    schemes = {f"{LAST}.mlp.up_proj": W4A4, f"{LAST}.self_attn.o_proj": LinearScheme(8, 8, None)}
    samples = mixed_samples(checkpoint)
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples)
    inputs, forwards = observe_inputs(job)
    assert [(x.block, x.linears, x.num_bits) for x in inputs] == [
        (LAST, ("self_attn.o_proj",), 8),
        (LAST, ("mlp.gate_proj", "mlp.up_proj"), 4),
    ]
    assert forwards == 3 * 3 + 3 + 2 * 4
    for x in inputs:
        assert 0 < x.entropy < x.num_bits * math.log(2)
        amax = [x.ranges[clip] for clip in PAPER_CLIPS]
        assert amax == sorted(amax, reverse=True)
        assert amax[-1] < amax[0]


def test_missing_images_and_values_that_are_not_finite_are_refused_by_layer(llava, tmp_path):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    texts = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    with pytest.raises(UserError, match=r"^vision_tower.*no calibration sample reached it"):
        calibrated(checkpoint, schemes_of(checkpoint, "int4"), tmp_path / "c", samples=texts)
    good, bad = (make_sample(checkpoint, words=8, images=1, seed=seed) for seed in range(2))
    bad.pixel_values[0, 0, 0, 0] = np.nan
    message = r"^vision_tower\.vision_model\.encoder\.layers\.0\.self_attn\.q_proj: activations of batch 1 are not finite"
    with pytest.raises(UserError, match=message):
        calibrated(checkpoint, schemes_of(checkpoint, "int4"), tmp_path / "c", samples=[good, bad])
