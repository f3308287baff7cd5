"""Learned rounding starts from the given codes, approaches the float block, and never ends worse on held-out samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qvlm_export.calibrate.checkpoint.calibrated import QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.quantizer import fake_quantize, quantize_linear
from qvlm_export.calibrate.rounding.learned_rounding import LearnedLinear, learn_block, make_learning_batches

W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
W4A4 = LinearScheme(weight_bits=4, activation_bits=4, group_size=64)
W6A6 = LinearScheme(weight_bits=6, activation_bits=6, group_size=None)


class TwoLayers(nn.Module):
    """A block with a nonlinearity between two linears and a norm before them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(64)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.gelu(self.first(self.norm(x))))


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def quantize_rtn(module: TwoLayers, scheme: LinearScheme) -> dict[str, QuantizedLinear]:
    return {name: quantize_linear(getattr(module, name).weight, scheme, 2.5) for name in ("first", "second")}


def samples(seed: int, count: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 10, 64, generator=generator)]


def stored_error(module: TwoLayers, linears: dict[str, QuantizedLinear], floats: dict[str, torch.Tensor], x, y) -> float:
    """Relative squared error of the block's output, computed from the stored integers alone."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        quantized = linears[name]
        if quantized.input_scale is not None:
            value = fake_quantize(value, quantized.input_scale, int(quantized.scheme.activation_bits or 8))
        return value @ torch.from_numpy(quantized.dequantized()).T + floats.get(f"{name}.bias", getattr(module, name).bias)

    gain, bias = floats.get("norm.weight", module.norm.weight), floats.get("norm.bias", module.norm.bias)
    hidden = nn.functional.gelu(linear("first", nn.functional.layer_norm(x, (64,), gain, bias)))
    return float((x + linear("second", hidden) - y).square().sum() / y.square().sum())


@pytest.mark.parametrize("scheme", [W4A16, W8A8, W4A4, W6A6], ids=lambda s: s.name)
def test_a_learned_linear_starts_as_the_given_quantized_linear(scheme):
    module, x = TwoLayers(), samples(1)[0]
    linear = quantize_rtn(module, scheme)["first"]
    learned = LearnedLinear(module.first, linear)
    value = x if linear.input_scale is None else fake_quantize(x, linear.input_scale, int(scheme.activation_bits or 8))
    expected = value @ torch.from_numpy(linear.dequantized()).T + module.first.bias
    assert torch.allclose(learned(x), expected, atol=1e-5)
    same = learned.to_quantized()
    assert np.array_equal(same.codes, linear.codes)
    assert np.array_equal(same.scale, linear.scale)
    assert same.input_scale == linear.input_scale


@pytest.mark.parametrize("scheme", [W4A16, W4A4], ids=lambda s: s.name)
def test_learning_lowers_the_error_on_inputs_not_trained_on(scheme):
    module, quantized = TwoLayers(), quantize_rtn(TwoLayers(), scheme)
    inputs = samples(1, 64)
    targets = [module(x) for x in inputs]
    learned = learn_block(module, quantized, run, make_learning_batches(inputs, targets), steps=120, seed=0)
    test_inputs = samples(2)[0]
    before = stored_error(module, quantized, {}, test_inputs, module(test_inputs))
    after = stored_error(module, dict(learned.linears), dict(learned.floats), test_inputs, module(test_inputs))
    assert after < 0.8 * before
    assert learned.error_after < learned.error_before
    assert learned.backwards == 120 * 56  # of 64 samples 8 are held out, the others fit into one step
    for linear in learned.linears.values():
        assert linear.codes.min() >= linear.scheme.qmin
        assert linear.codes.max() <= linear.scheme.qmax


def test_the_reported_error_is_that_of_the_returned_linears():
    module, quantized = TwoLayers(), quantize_rtn(TwoLayers(), W4A4)
    inputs = samples(3, 16)
    targets = [module(x) for x in inputs]
    learned = learn_block(module, quantized, run, make_learning_batches(inputs, targets), steps=40, seed=0)
    held_out = torch.tensor([7, 15])
    error = stored_error(module, dict(learned.linears), dict(learned.floats), inputs[0][held_out], targets[0][held_out])
    assert error == pytest.approx(learned.error_after, rel=1e-3)


def test_all_prompts_about_a_held_out_image_are_held_out():
    module, quantized = TwoLayers(), quantize_rtn(TwoLayers(), W4A4)
    inputs = samples(3, 16)
    targets = [module(x) for x in inputs]
    image_ids = torch.arange(16) // 2 + 5  # 5, 5, 6, 6, 7, 7, ...
    learned = learn_block(
        module, quantized, run, make_learning_batches(inputs, targets, image_ids=[image_ids]), steps=40, seed=0
    )
    held_out = torch.tensor([14, 15])  # the last of eight images
    error = stored_error(module, dict(learned.linears), dict(learned.floats), inputs[0][held_out], targets[0][held_out])
    assert error == pytest.approx(learned.error_after, rel=1e-3)
    assert learned.backwards == 40 * 14


def test_the_last_of_few_images_is_held_out():
    """It is the one with the largest number, whatever the numbers are."""
    module, quantized = TwoLayers(), quantize_rtn(TwoLayers(), W4A4)
    inputs = samples(3, 6)
    targets = [module(x) for x in inputs]
    image_ids = torch.tensor([0, 0, 2, 2, 3, 3])
    learned = learn_block(
        module, quantized, run, make_learning_batches(inputs, targets, image_ids=[image_ids]), steps=40, seed=0
    )
    held_out = torch.tensor([4, 5])
    error = stored_error(module, dict(learned.linears), dict(learned.floats), inputs[0][held_out], targets[0][held_out])
    assert error == pytest.approx(learned.error_after, rel=1e-3)
    assert learned.backwards == 40 * 4


class SharedInputBlock(nn.Module):
    """Three linears that read the output of one norm, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_layernorm, self.self_attn = nn.LayerNorm(64), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, nn.Linear(64, 32))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.input_layernorm(x)
        return torch.cat([getattr(self.self_attn, name)(read) for name in ("q_proj", "k_proj", "v_proj")], -1)


def test_linears_that_share_an_input_keep_one_input_scale():
    """A linear that reads the input in other bits, here k, learns its own scale."""
    module, names = SharedInputBlock(), [f"self_attn.{name}_proj" for name in "qkv"]
    schemes = dict(zip(names, (W4A4, LinearScheme(4, 6, 64), W4A4), strict=True))
    quantized = {name: quantize_linear(module.get_submodule(name).weight, scheme, 3.5) for name, scheme in schemes.items()}
    inputs = samples(1, 64)
    learned = learn_block(
        module, quantized, run, make_learning_batches(inputs, [module(x) for x in inputs]), steps=40, seed=0
    )
    q, k, v = (learned.linears[name].input_scale for name in names)
    assert q == v != k
    assert q != quantized[names[0]].input_scale
    assert learned.error_after < learned.error_before


def test_targets_that_cannot_be_learned_do_not_raise_the_held_out_error():
    module, quantized = TwoLayers(), quantize_rtn(TwoLayers(), W4A16)
    inputs = samples(4, 16)
    noise = [module(x) + 10 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in inputs]
    held_out = torch.tensor([7, 15])
    noise[0][held_out] = module(inputs[0][held_out])  # only held-out targets make sense, so every step is worse there
    learned = learn_block(module, quantized, run, make_learning_batches(inputs, noise), steps=40, seed=0)
    assert learned.error_after <= learned.error_before
    if learned.error_after == learned.error_before:
        for name, linear in learned.linears.items():
            assert np.array_equal(linear.codes, quantized[name].codes)


def test_the_same_seed_gives_the_same_codes_and_another_seed_others():
    module, quantized = TwoLayers(), quantize_rtn(TwoLayers(), W4A16)
    inputs = [x for length in (1, 2) for x in samples(length, 120)]
    targets = [module(x) for x in inputs]
    one, two, other = (
        learn_block(module, quantized, run, make_learning_batches(inputs, targets), steps=80, seed=s) for s in (0, 0, 1)
    )
    assert all(np.array_equal(one.linears[n].codes, two.linears[n].codes) for n in one.linears)
    assert any(not np.array_equal(one.linears[n].codes, other.linears[n].codes) for n in one.linears)
