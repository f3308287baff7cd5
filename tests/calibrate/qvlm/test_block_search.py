"""The search of a module: replay against the whole module, the search against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from quantized_module import quantized_output
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear, load_block, make_blocks
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.observers import observe_rows
from qvlm_export.calibrate.qvlm.block_search import run_float, search_block
from qvlm_export.calibrate.qvlm.clip_candidates import Clips, QuantizableLayer
from qvlm_export.calibrate.qvlm.joint_search import PAPER_CLIPS, record_linear_outputs, relative_error, replay_module
from qvlm_export.checkpoints.checkpoint import open_checkpoint

W4A4 = LinearScheme(4, 4, 64)


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
    assert result.calls == (2 * 5, 2 * 25)


def test_the_float_run_keeps_all_tokens_of_the_last_layers_and_a_few_of_the_others(llava):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    block, batches, run = make_block(checkpoint, "decoder")
    batches = [*batches, torch.randn(20, 12, 256, generator=torch.Generator().manual_seed(1))]
    with load_block(block, checkpoint.source) as module, torch.inference_mode():
        outputs, linear_outputs, _, layers = make_layers(module, batches, run, {})
        found = run_float(module, [layers[:3], layers[3:]], run, batches)
    assert set(found.targets) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert len(found.rows) == 128 < sum(x.shape[:2].numel() for x in batches)
    for name, rows in linear_outputs.items():
        np.testing.assert_array_equal(found.probes[name], rows[found.rows])
        if name in found.targets:
            np.testing.assert_array_equal(found.targets[name], rows)
    for output, expected in zip(found.outputs, outputs, strict=True):
        np.testing.assert_array_equal(output, expected)
