"""Ranges of a whole block chosen together: against every combination, never worse than layer by layer, and repeatable."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from small_export import mixed_samples, open_small, plan_of
from torch import nn

from calibrate import joint_ranges, search
from calibrate.blocks import make_blocks
from calibrate.calibrated import CalibratedCheckpoint, CalibratedWriter, QuantizedLinear
from calibrate.cost import calibration_cost
from calibrate.fold import groups_of
from calibrate.group import OWN, Given, Rows, clipped_scale, quantize_group
from calibrate.job import Calibration
from calibrate.joint import FINE_CLIPS, Clip
from calibrate.joint_ranges import FoldedBlock, search_ranges, times_applied, weight_clips
from calibrate.method import EXPECTED, FAST, FULL, NEAREST, Variant
from calibrate.quantize import activation_scale, covering_scale, fake_quantize, weight_scale
from calibrate.scheme import W8A8, LinearScheme
from calibrate.search import BlockSearch, relative_error
from calibrate.searched import calibrate_searched
from calibrate.statistics import histogram_of

W4A4, W4A16 = LinearScheme(4, 4, 32), LinearScheme(4, None, 32)
ABSMAX = replace(EXPECTED, activation_ranges="absmax")
JOINT = replace(FAST, clips="joint")
FEW = (Clip(), Clip(0.98), Clip(fraction=0.7), Clip(fraction=0.5))


class Projector(nn.Module):
    """Two layers, the second after a GELU, and a residual that no layer's output says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear_2(nn.functional.gelu(self.linear_1(x)))


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Projector().requires_grad_(False)


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, tokens, 64) * torch.randn(64).exp() for n, tokens in ((2, 9), (3, 5))]


def block_of(module: nn.Module, inputs: list[torch.Tensor], scheme: LinearScheme) -> FoldedBlock:
    outputs = [run(module, x) for x in inputs]
    plan = dict.fromkeys(("linear_1", "linear_2"), scheme)
    weights = [torch.rand(x.shape[:2]) for x in inputs]
    return FoldedBlock(module, groups_of(module), plan, run, inputs, lambda y: relative_error(y, outputs, weights))


def rows_of(module: nn.Module, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    first = torch.cat([x.flatten(0, 1) for x in inputs])
    return {"linear_1": first, "linear_2": nn.functional.gelu(module.linear_1(first))}


def searched(block: FoldedBlock, variant: Variant = ABSMAX) -> joint_ranges.JointRanges:
    wanted = rows_of(block.module, block.inputs)
    return search_ranges(block, lambda group, seen: Rows(wanted[group.linears[0]], seen), variant, {})


def by_hand(block: FoldedBlock, given: dict[str, Given], own: dict[str, float]) -> float:
    """The error of a copy of the block, by modules that know nothing of the search. own: largest magnitudes of inputs."""
    rounded = Projector().requires_grad_(False)
    rounded.load_state_dict(block.module.state_dict())
    for name, scheme in block.plan.items():
        linear, clip = rounded.get_submodule(name), given[name].clip or Clip()
        width = scheme.group_size or linear.in_features
        amax = clip.weight_amax(linear.weight, scheme).reshape(len(linear.weight), -1).repeat_interleave(width, 1)
        scale = covering_scale(linear.weight.clamp(-amax, amax), scheme)
        steps = scale.float().reshape(len(linear.weight), -1).repeat_interleave(width, 1)
        linear.weight.copy_((linear.weight / steps).round().clamp(scheme.qmin, scheme.qmax) * steps)
        if scheme.activation_bits is not None:
            how = activation_scale(given[name].amax or own[name], scheme.activation_bits), scheme.activation_bits
            linear.register_forward_pre_hook(lambda _, args, how=how: (fake_quantize(args[0], *how),))
    return block.error([run(rounded, x) for x in block.inputs])


def own_amaxes(block: FoldedBlock, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest magnitudes of the inputs; the second layer's when the first is rounded with its own ranges."""
    rows, nearest = wanted["linear_1"], replace(ABSMAX, rounding="nearest", ridge=None)
    weights = {"linear_1": block.module.linear_1.weight}
    first = quantize_group(weights, block.plan, nearest, Rows(rows, rows))["linear_1"]
    if first.input_scale is not None:
        rows = fake_quantize(rows, first.input_scale, first.scheme.activation_bits)
    output = nn.functional.linear(rows, torch.from_numpy(first.dequantized()), block.module.linear_1.bias)
    return {"linear_1": float(wanted["linear_1"].abs().max()), "linear_2": float(nn.functional.gelu(output).abs().max())}


@pytest.mark.parametrize("scheme", [W4A4, W8A8, W4A16])
def test_two_layers_get_the_best_of_all_combinations(module, inputs, scheme, monkeypatch):
    monkeypatch.setattr(joint_ranges, "FINE_CLIPS", FEW)
    block, wanted = block_of(module, inputs, scheme), rows_of(module, inputs)
    found, own = searched(block), own_amaxes(block, wanted)
    chosen = dict.fromkeys(wanted, OWN)
    assert found.first_error == pytest.approx(by_hand(block, chosen, own), rel=1e-5)
    histograms = [histogram_of(rows) for rows in wanted.values()]
    amaxes = [[None, *(clip.activation_amax(histogram) for clip in FEW)] for histogram in histograms]
    tried = {"amax": amaxes} if scheme.activation_bits is not None else {}
    for kind, options in {**tried, "clip": [[None, *FEW]] * 2}.items():
        combinations = [
            {name: replace(chosen[name], **{kind: value}) for name, value in zip(wanted, values, strict=True)}
            for values in itertools.product(*options)
        ]
        chosen = min(combinations, key=lambda given: by_hand(block, given, own))
    assert found.error == pytest.approx(by_hand(block, chosen, own), rel=1e-5)
    assert found.error == pytest.approx(by_hand(block, dict(found.given), own), rel=1e-5)
    assert found.error <= found.first_error
    assert scheme.activation_bits is not None or all(given.amax is None for given in found.given.values())


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("variant", [EXPECTED, NEAREST, Variant(), replace(EXPECTED, weight_ranges="rounded")])
def test_joint_never_ends_worse_than_layer_by_layer(module, inputs, variant, tree, monkeypatch):
    if not tree:
        monkeypatch.setattr(joint_ranges, "MOST_COMBINATIONS", 0)
    block = block_of(module, inputs, W4A4)
    found = searched(block, variant)
    assert found.error < found.first_error
    assert list(found.given) == ["linear_1", "linear_2"]
    counted = times_applied(module, block.groups, block.plan, variant)
    most = sum(times * block.forwards_of(group.linears) for times, group in zip(counted, block.groups, strict=True))
    assert found.forwards == pytest.approx(most) if tree else 0.4 * most < found.forwards <= most + 1e-9


def test_clips_of_weights_that_are_all_the_same_are_tried_once():
    linears = {"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)}
    grouped = weight_clips(linears, {"a": W4A16}, NEAREST)  # of 32 values the largest 1 of 64 is the largest
    assert [clip.percentile for clip in grouped if clip.fraction == 1.0] == [1.0]
    assert len(weight_clips(linears, {"a": W4A16}, EXPECTED)) == len(grouped) - 1
    rows = weight_clips(linears, {"a": W4A16, "b": W8A8}, NEAREST)
    assert [clip.percentile for clip in rows if clip.fraction == 1.0] == [1.0, 0.98]
    assert len(rows) == len(FINE_CLIPS) - 3


@pytest.mark.parametrize("scheme", [W4A16, W8A8])
def test_a_clipped_range_covers_what_is_left(module, scheme):
    weight = module.linear_1.weight
    assert torch.equal(clipped_scale(weight, Clip(), scheme), covering_scale(weight, scheme))
    narrow = clipped_scale(weight, Clip(fraction=0.5), scheme)
    assert (narrow <= covering_scale(weight, scheme)).all()
    assert (narrow <= weight_scale(Clip(fraction=0.5).weight_amax(weight, scheme), scheme)).all()


@pytest.mark.parametrize("variant", [EXPECTED, Variant(), replace(EXPECTED, weight_ranges="rounded")])
def test_what_was_chosen_is_what_a_group_is_quantized_with(module, inputs, variant):
    rows = rows_of(module, inputs)["linear_1"]

    def quantized(given: Given) -> QuantizedLinear:
        weights, plan = {"linear_1": module.linear_1.weight}, {"linear_1": W8A8}
        return quantize_group(weights, plan, variant, Rows(rows, rows), given=given)["linear_1"]

    amax = float(rows.abs().max()) * 0.9
    own, narrow, both = quantized(OWN), quantized(Given(amax)), quantized(Given(amax, Clip(fraction=0.5)))
    assert narrow.input_scale == both.input_scale == activation_scale(amax, 8) != own.input_scale
    assert (both.scale < narrow.scale).all()


def calibrated(checkpoint, preset, folder, method) -> CalibratedCheckpoint:
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)
    job, writer = Calibration(blocks, checkpoint.source, plan_of(checkpoint, preset), samples), CalibratedWriter(folder)
    writer.finish(checkpoint.config_json, calibrate_searched(job, writer, lambda *_: None, method))
    return CalibratedCheckpoint(folder)


@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_a_checkpoint_has_better_blocks_the_same_bytes_twice_and_the_forwards_counted(llava, tmp_path, preset, monkeypatch):
    monkeypatch.setattr(joint_ranges, "FINE_CLIPS", FEW)
    checkpoint = open_small(llava(dtype="float32"))
    one, two = (calibrated(checkpoint, preset, tmp_path / name, JOINT) for name in ("one", "two"))
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes(), path.name
    blocks, samples, plan = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint), plan_of(checkpoint, preset)
    for block in one.summary["blocks"]:
        assert block["clips"]["error"] <= block["clips"]["first_error"], block["name"]
    assert sum(block["clips"]["error"] < 0.99 * block["clips"]["first_error"] for block in one.summary["blocks"]) > 2
    most, counted = calibration_cost(blocks, plan, samples, JOINT), one.summary["block_forwards"]
    assert 0.6 * most.forwards < counted <= most.forwards + 1  # descent may settle early
    layerwise = calibration_cost(blocks, plan, samples, FAST)
    assert most.flops > 3 * layerwise.flops
    assert layerwise.memory_bytes < most.memory_bytes


def test_where_every_group_keeps_its_own_ranges_the_bytes_are_those_of_layer_by_layer(llava, tmp_path, monkeypatch):
    checkpoint = open_small(llava(dtype="float32"))
    alone = calibrated(checkpoint, "int8", tmp_path / "alone", FAST)
    monkeypatch.setattr(joint_ranges, "FINE_CLIPS", (Clip(fraction=1e-3),))
    together = calibrated(checkpoint, "int8", tmp_path / "together", JOINT)
    chosen = [given for block in together.summary["blocks"] for given in block["clips"]["given"].values()]
    assert all(given == {"amax": None, "clip": None} for given in chosen)
    for path in alone.folder.glob("*.safetensors"):
        assert path.read_bytes() == (together.folder / path.name).read_bytes(), path.name


def test_layer_by_layer_searches_nothing_together(llava, tmp_path, monkeypatch):
    assert FAST.clips == FULL.clips == "layerwise"
    assert replace(JOINT, vision="none").for_vision().clips == "layerwise"
    monkeypatch.setattr(search, "search_ranges", None)
    found = calibrated(open_small(llava(dtype="float32")), "int8", tmp_path, FAST)
    assert all(block["clips"] is None for block in found.summary["blocks"])


@pytest.mark.parametrize("left_out", ["linear_1", "linear_2"])
def test_a_layer_that_is_not_planned_stays_float(module, inputs, left_out):
    plan = {name: W8A8 for name in ("linear_1", "linear_2") if name != left_out}
    found = BlockSearch(module, plan, run, replace(JOINT, foldings=("none",), objective="plain"))
    found.search(inputs, inputs)
    assert found.best is not None
    assert list(found.best.joint.given) == list(plan) == list(found.found())
    assert found.best.joint.error <= found.best.joint.first_error
