"""Visual-encoder optimization: its objective against its definition, its gradients, and what it keeps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_export import mixed_samples, schemes_of
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import load_block, make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.quantizer import quantize_linear
from qvlm_export.calibrate.qvlm import vision_optimization
from qvlm_export.calibrate.qvlm.config import QVLM
from qvlm_export.calibrate.qvlm.entropy import entropy_nats, soft_code_distribution
from qvlm_export.calibrate.qvlm.vision_optimization import (
    _Batches,
    _compute_terms,
    _evaluate,
    _make_student,
    _tune,
    optimize_vision,
    select_vision_samples,
)
from qvlm_export.checkpoints.checkpoint import open_checkpoint

W4A4, W4A16, W8A8 = LinearScheme(4, 4, 64), LinearScheme(4, None, 64), LinearScheme(8, 8, None)
SHARES = {"self_attn.q_proj": 0.5, "self_attn.out_proj": 0.0, "mlp.fc1": 0.25, "mlp.fc2": 0.25}
QUICK = replace(QVLM, vision_epochs=4, vision_batch=2)


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_checkpoint(str(llava(dtype="float32")))


@pytest.fixture
def tower_layer(checkpoint):
    """A layer of the tower with its weights, and batches of its inputs, outputs and token weights."""
    block, generator = make_blocks(checkpoint.hf_config).vision_layers[1], torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 9, 128, generator=generator) for n in (1, 2, 1)]
    weights = [torch.rand(len(x), 9, generator=generator) for x in inputs]
    with load_block(block, checkpoint.source) as module, torch.no_grad():
        yield module, _Batches(inputs, [run(module, x) for x in inputs], weights, 2)


def run(module, x):
    return module(x, attention_mask=None)


def schemes_for(module, scheme):
    return {name: scheme for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def fake_quantized(module, batch, scheme, inputs):
    """The output of the block if every linear of it is rounded; `inputs` gets the inputs of the linears by name."""
    handles = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            linear = quantize_linear(part.weight, scheme, None)

            def hook(layer, args, _, name=name, linear=linear):
                x = inputs[name] = args[0]
                if scheme.activation_bits is not None:
                    top = 2 ** (scheme.activation_bits - 1) - 1
                    step = x.abs().max() / top
                    x = (x / step).round() * step
                return x @ torch.from_numpy(linear.dequantized()).T + layer.bias

            handles.append(part.register_forward_hook(hook))
    output = run(module, batch)
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("scheme", [W4A4, W4A16, W8A8], ids=lambda s: s.name)
def test_terms_are_those_of_the_definition(tower_layer, scheme):
    module, batches = tower_layer
    student, inputs = _make_student(module, schemes_for(module, scheme), SHARES), {}
    x, y, weights = batches.select([0, 1])
    terms = _compute_terms(student, run(student, x), y, weights).tolist()
    output = fake_quantized(module, x, scheme, inputs)
    squares, energies = (output - y).square().sum(-1), y.square().sum(-1)
    assert terms[0] == pytest.approx(float((weights * squares).sum() / (weights * energies).sum()), rel=1e-4)
    assert terms[2] == pytest.approx(float(squares.sum() / energies.sum()), rel=1e-4)
    bits, entropy = scheme.activation_bits or scheme.weight_bits, 0.0
    for name, share in SHARES.items():
        values = inputs[name].flatten()[:: max(1, inputs[name].numel() // vision_optimization.ENTROPY_VALUES)]
        step = float(inputs[name].abs().max()) / (2 ** (bits - 1) - 1)
        entropy += share * entropy_nats(soft_code_distribution(values, step, bits))
    assert terms[1] == pytest.approx(entropy, rel=1e-4)


def test_the_gradient_of_the_entropy_is_its_slope(tower_layer):
    """The first norm's gain reaches the entropy of q/k/v without any rounding in between."""
    module, batches = tower_layer
    student = _make_student(module, schemes_for(module, W8A8), {**dict.fromkeys(SHARES, 0.0), "self_attn.q_proj": 1.0})
    x, y, weights = batches.select([0, 1, 2])
    gain = student.layer_norm1.weight.requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(_compute_terms(student, run(student, x), y, weights)[1], gain)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(2)) * 1e-3
    values = []
    for sign in (1, -1):
        gain.data += sign * direction
        values.append(float(_compute_terms(student, run(student, x), y, weights)[1]))
        gain.data -= sign * direction
    assert values[0] - values[1] == pytest.approx(2 * float(slope @ direction), rel=0.02)


def test_tuning_lowers_the_objective_and_rounds_to_what_is_stored(tower_layer):
    module, batches = tower_layer
    student = _make_student(module, schemes_for(module, W4A16), SHARES)
    dtypes = {name: np.dtype("float16") for name, p in module.named_parameters() if p.ndim == 1}
    tuned = _tune(student, run, batches, QUICK, dtypes)
    assert tuned.after.task < tuned.before.task
    assert set(tuned.tensors) == set(dtypes)
    for name, tensor in tuned.tensors.items():
        assert torch.equal(tensor, tensor.half().float())
        assert torch.equal(tensor, student.get_parameter(name))
        assert not torch.equal(tensor, module.get_parameter(name))
    assert _evaluate(student, run, batches).tolist() == [tuned.after.task, tuned.after.entropy, tuned.after.error]
    assert (tuned.forwards, tuned.backwards) == ((4 + QUICK.vision_epochs) * 4, QUICK.vision_epochs * 4)


def test_a_block_whose_objective_does_not_fall_stays_as_it_was(tower_layer):
    module, batches = tower_layer
    student = _make_student(module, schemes_for(module, W8A8), SHARES)
    dtypes = {name: np.dtype("float32") for name, p in module.named_parameters() if p.ndim == 1}
    tuned = _tune(student, run, batches, replace(QUICK, vision_rate=3.0), dtypes)
    assert tuned.after.task > tuned.before.task
    assert tuned.tensors == {}
    assert all(torch.equal(student.get_parameter(name), module.get_parameter(name)) for name in dtypes)


def test_a_large_entropy_weight_lowers_the_entropy(tower_layer):
    module, batches = tower_layer
    dtypes = {name: np.dtype("float32") for name, p in module.named_parameters() if p.ndim == 1}
    found = []
    for weight in (0.0, 1e4):
        student = _make_student(module, schemes_for(module, W4A4), SHARES)
        found.append(_tune(student, run, batches, replace(QUICK, entropy_weight=weight), dtypes))
    assert found[0].before == found[1].before
    assert found[1].after.entropy < min(found[0].after.entropy, found[0].before.entropy)
    assert found[0].after.error < found[1].after.error


def test_samples_are_spread_over_those_with_pictures(checkpoint):
    samples = mixed_samples(checkpoint) * 10  # the second of four has no picture
    chosen = select_vision_samples(samples, replace(QVLM, vision_samples=6))
    assert len(chosen) == 6 == len(set(chosen))
    assert all(len(samples[n].pixel_values) for n in chosen)
    assert max(chosen) - min(chosen) > 30
    assert len(select_vision_samples(samples, replace(QVLM, vision_samples=100))) == 30
    assert select_vision_samples(samples, replace(QVLM, vision_epochs=0)) == []


def test_a_sample_that_overflows_is_named_by_its_number_in_the_calibration_set(checkpoint):
    samples = mixed_samples(checkpoint)
    samples[2].pixel_values[1] = 1e38
    blocks, schemes = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, "int8")
    job = CalibrationJob(blocks, checkpoint.source, schemes, samples)
    with pytest.raises(UserError, match=r"^vision_tower\S+: activations of sample 3 are not finite"):
        optimize_vision(job, QUICK)


def test_recipes_with_float_parts_tune_only_what_is_quantized(checkpoint):
    samples = [Sample(s.input_ids, s.pixel_values, len(s.input_ids) - 2) for s in mixed_samples(checkpoint)[:1]]
    schemes = {n: s for n, s in schemes_of(checkpoint, "int8").items() if "layers.1.self_attn.k_proj" in n}
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples)
    found = optimize_vision(job, QUICK)
    assert [name.rpartition(".")[2] for name in found.blocks] == ["1"]
    before = next(iter(found.blocks.values())).before
    assert before.task > 0
    assert 0 < before.entropy < 8 * math.log(2)
