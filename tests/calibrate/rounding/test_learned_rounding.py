"""Learned rounding: starts as what it is given, gets closer to the float block, never ends worse on what it held back."""

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


def rounded(module: TwoLayers, scheme: LinearScheme) -> dict[str, QuantizedLinear]:
    return {name: quantize_linear(getattr(module, name).weight, scheme, 2.5) for name in ("first", "second")}


def samples(seed: int, count: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 10, 64, generator=generator)]


def hard_error(module: TwoLayers, linears: dict[str, QuantizedLinear], floats: dict[str, torch.Tensor], x, y) -> float:
    """Computed here from the stored integers alone."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        found = linears[name]
        if found.input_scale is not None:
            value = fake_quantize(value, found.input_scale, int(found.scheme.activation_bits or 8))
        return value @ torch.from_numpy(found.dequantized()).T + floats.get(f"{name}.bias", getattr(module, name).bias)

    gain, bias = floats.get("norm.weight", module.norm.weight), floats.get("norm.bias", module.norm.bias)
    hidden = nn.functional.gelu(linear("first", nn.functional.layer_norm(x, (64,), gain, bias)))
    return float((x + linear("second", hidden) - y).square().sum() / y.square().sum())


@pytest.mark.parametrize("scheme", [W4A16, W8A8, W4A4, W6A6], ids=lambda s: s.name)
def test_a_learned_linear_starts_as_what_it_was_given(scheme):
    module, x = TwoLayers(), samples(1)[0]
    linear = rounded(module, scheme)["first"]
    learned = LearnedLinear(module.first, linear)
    value = x if linear.input_scale is None else fake_quantize(x, linear.input_scale, int(scheme.activation_bits or 8))
    wanted = value @ torch.from_numpy(linear.dequantized()).T + module.first.bias
    assert torch.allclose(learned(x), wanted, atol=1e-5)
    same = learned.quantized()
    assert np.array_equal(same.codes, linear.codes)
    assert np.array_equal(same.scale, linear.scale)
    assert same.input_scale == linear.input_scale


@pytest.mark.parametrize("scheme", [W4A16, W4A4], ids=lambda s: s.name)
def test_learning_brings_unseen_inputs_closer_to_the_float_block(scheme):
    module, found = TwoLayers(), rounded(TwoLayers(), scheme)
    inputs = samples(1, 64)
    wanted = [module(x) for x in inputs]
    learned = learn_block(module, found, run, make_learning_batches(inputs, wanted), steps=120, seed=0)
    unseen = samples(2)[0]
    before = hard_error(module, found, {}, unseen, module(unseen))
    after = hard_error(module, dict(learned.linears), dict(learned.floats), unseen, module(unseen))
    assert after < 0.8 * before
    assert learned.error_after < learned.error_before
    assert learned.backwards == 120 * 56  # of 64 samples 8 are held back, the rest fit into one step
    for linear in learned.linears.values():
        assert linear.codes.min() >= linear.scheme.qmin
        assert linear.codes.max() <= linear.scheme.qmax


def test_what_is_kept_has_the_error_that_is_reported():
    module, found = TwoLayers(), rounded(TwoLayers(), W4A4)
    inputs = samples(3, 16)
    wanted = [module(x) for x in inputs]
    learned = learn_block(module, found, run, make_learning_batches(inputs, wanted), steps=40, seed=0)
    held = torch.tensor([7, 15])
    error = hard_error(module, dict(learned.linears), dict(learned.floats), inputs[0][held], wanted[0][held])
    assert error == pytest.approx(learned.error_after, rel=1e-3)


def test_prompts_about_one_picture_teach_or_decide_together():
    module, found = TwoLayers(), rounded(TwoLayers(), W4A4)
    inputs = samples(3, 16)
    wanted = [module(x) for x in inputs]
    pictures = torch.arange(16) // 2 + 5  # 5, 5, 6, 6, 7, 7, ...
    learned = learn_block(module, found, run, make_learning_batches(inputs, wanted, groups=[pictures]), steps=40, seed=0)
    held = torch.tensor([14, 15])  # of eight groups the last
    error = hard_error(module, dict(learned.linears), dict(learned.floats), inputs[0][held], wanted[0][held])
    assert error == pytest.approx(learned.error_after, rel=1e-3)
    assert learned.backwards == 40 * 14


def test_few_groups_hold_back_their_last():
    """Whatever their numbers are."""
    module, found = TwoLayers(), rounded(TwoLayers(), W4A4)
    inputs = samples(3, 6)
    wanted = [module(x) for x in inputs]
    pictures = torch.tensor([0, 0, 2, 2, 3, 3])
    learned = learn_block(module, found, run, make_learning_batches(inputs, wanted, groups=[pictures]), steps=40, seed=0)
    held = torch.tensor([4, 5])
    error = hard_error(module, dict(learned.linears), dict(learned.floats), inputs[0][held], wanted[0][held])
    assert error == pytest.approx(learned.error_after, rel=1e-3)
    assert learned.backwards == 40 * 4


class Reading(nn.Module):
    """Three linears that read one norm, as attention does."""

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


def test_linears_that_read_one_input_keep_one_range():
    """And others learn their own: k has other bits."""
    module, names = Reading(), [f"self_attn.{name}_proj" for name in "qkv"]
    schemes = dict(zip(names, (W4A4, LinearScheme(4, 6, 64), W4A4), strict=True))
    found = {name: quantize_linear(module.get_submodule(name).weight, scheme, 3.5) for name, scheme in schemes.items()}
    inputs = samples(1, 64)
    learned = learn_block(module, found, run, make_learning_batches(inputs, [module(x) for x in inputs]), steps=40, seed=0)
    q, k, v = (learned.linears[name].input_scale for name in names)
    assert q == v != k
    assert q != found[names[0]].input_scale
    assert learned.error_after < learned.error_before


def test_targets_that_cannot_be_learned_leave_the_start():
    module, found = TwoLayers(), rounded(TwoLayers(), W4A16)
    inputs = samples(4, 16)
    noise = [module(x) + 10 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) for x in inputs]
    held = torch.tensor([7, 15])
    noise[0][held] = module(inputs[0][held])  # only what is held back makes sense: every step away is worse there
    learned = learn_block(module, found, run, make_learning_batches(inputs, noise), steps=40, seed=0)
    assert learned.error_after <= learned.error_before
    if learned.error_after == learned.error_before:
        for name, linear in learned.linears.items():
            assert np.array_equal(linear.codes, found[name].codes)


def test_same_seed_same_codes_and_another_seed_others():
    module, found = TwoLayers(), rounded(TwoLayers(), W4A16)
    inputs = [x for length in (1, 2) for x in samples(length, 120)]
    wanted = [module(x) for x in inputs]
    one, two, other = (
        learn_block(module, found, run, make_learning_batches(inputs, wanted), steps=80, seed=s) for s in (0, 0, 1)
    )
    assert all(np.array_equal(one.linears[n].codes, two.linears[n].codes) for n in one.linears)
    assert any(not np.array_equal(one.linears[n].codes, other.linears[n].codes) for n in one.linears)
