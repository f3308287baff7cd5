"""The cost of Q-VLM before it runs, against what is counted at run time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_export import mixed_samples, open_small, schemes_of

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators import block_cost, qvlm_cost
from qvlm_export.calibrate.calibrators.cost import (
    activation_cache_bytes,
    estimate_calibration_cost,
    is_narrow,
    sensitivity_bytes,
)
from qvlm_export.calibrate.calibrators.qvlm_cost import count_calls, count_qvlm, list_depths
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.numerics import matmul
from qvlm_export.calibrate.quantization.config import FAST
from qvlm_export.calibrate.quantization.record import RtnBaseline
from qvlm_export.calibrate.qvlm import block_search, clip_candidates
from qvlm_export.calibrate.qvlm.calibrator import calibrate_qvlm
from qvlm_export.calibrate.qvlm.config import QVLM

QUICK = replace(QVLM, vision_epochs=1, vision_samples=2)
NOT_TUNED = replace(QVLM, vision_epochs=0)
LAYERWISE = replace(NOT_TUNED, partition="layers")


def everything(_name):
    return True


def some_linears(name):
    """One linear of an MLP, part of a shared input, and one block of the tower."""
    return "layers.1.mlp.down_proj" in name or "layers.0.self_attn.v_proj" in name or "encoder.layers.1." in name


def calibrate(llava, folder, config, preset, chosen):
    checkpoint = open_small(llava(vision={"num_hidden_layers": 3}))  # of which two are used
    schemes = {name: scheme for name, scheme in schemes_of(checkpoint, preset).items() if chosen(name)}
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)[:3]
    job = CalibrationJob(blocks, checkpoint.source, schemes, samples)
    return calibrate_qvlm(job, CalibratedWriter(folder), lambda *_: None, config), (blocks, schemes, samples, config)


@pytest.mark.parametrize(
    ("config", "preset", "chosen"),
    [
        (QUICK, "sim-w4a4", everything),
        (LAYERWISE, "int4", everything),
        (QUICK, "int8", some_linears),
    ],
)
def test_estimated_forwards_equal_those_of_the_calibration(llava, tmp_path, config, preset, chosen):
    summary, arguments = calibrate(llava, tmp_path, config, preset, chosen)
    depths = {block["name"]: [search["layers"] for search in block["joint_searches"]] for block in summary["blocks"]}
    exact, most = count_qvlm(*arguments, depths=depths), estimate_calibration_cost(*arguments)
    assert exact.forwards == pytest.approx(summary["block_forwards"], abs=1)
    assert most.forwards >= exact.forwards
    assert most.flops >= exact.flops
    assert most.memory_bytes >= exact.memory_bytes
    if config is LAYERWISE:  # of which there is one partition only
        assert most == exact


def test_estimated_operations_are_those_of_the_products(llava, tmp_path, monkeypatch):
    """Counted at the linears, without attention and without the comparison with round-to-nearest, which no count has."""
    counted, apply_linear = [], matmul.apply_linear

    def count(x, weight, bias=None):
        counted.append(2.0 * x.numel() * len(weight))
        return apply_linear(x, weight, bias)

    for module in (matmul, clip_candidates):  # of float linears, and of those that are searched
        monkeypatch.setattr(module, "apply_linear", count)
    for module in (block_cost, qvlm_cost):
        monkeypatch.setattr(module, "attention_flops", lambda *_: 0.0)
    monkeypatch.setattr(block_search, "run_rtn_baseline", lambda *_: RtnBaseline((), ()))
    summary, arguments = calibrate(llava, tmp_path, NOT_TUNED, "int8", some_linears)
    depths = {block["name"]: [search["layers"] for search in block["joint_searches"]] for block in summary["blocks"]}
    # The projector leaves out the class token, which the count has.
    assert sum(counted) == pytest.approx(count_qvlm(*arguments, depths=depths).flops, rel=1e-3)


def test_calls_of_a_block_of_three_and_a_single_layer():
    """As in the paper: 5 + 25 + 125 layer forwards for three layers. Float inputs have nothing to search."""
    assert count_calls([True, True, True, True], [3, 1]) == ([10, 50, 250, 10], [2, 10, 50, 2, 1])
    assert count_calls([False, False], [2]) == ([5, 25], [1, 5, 1])
    assert count_calls([False, True], [2]) == ([1 + 5, 5 + 25], [2, 1 + 5, 1])


def test_partitions_are_all_there_are():
    assert set(list_depths(3, 2)) == {(1, 1, 1), (1, 2), (2, 1)}
    assert len(list(list_depths(4, 3))) == 7


def test_bytes_between_blocks_are_those_of_two_runs(llava):
    checkpoint = open_small(llava())
    blocks, samples = make_blocks(checkpoint.hf_config), mixed_samples(checkpoint)
    for count in (1, 2000):
        assert is_narrow(blocks, samples * count, QVLM) == is_narrow(blocks, samples * count, FAST) == (count > 1)
    assert activation_cache_bytes(blocks, samples, QVLM) == activation_cache_bytes(blocks, samples, FAST)
    assert sensitivity_bytes(blocks, samples, QVLM) > sensitivity_bytes(blocks, samples[:1], QVLM) > 0
    assert sensitivity_bytes(blocks, samples, NOT_TUNED) == 0
