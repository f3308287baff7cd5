"""The calibration record against the same numbers computed here a second time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from small_export import make_sample, schemes_of

from qvlm_export.calibrate.augmentation.prompts import label_block_inputs
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.block_search import BlockSearch
from qvlm_export.calibrate.calibrators.record import mark_partition
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter, QuantizedLinear
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import FAST, LinearConfig, SearchConfig
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step, record_outputs
from qvlm_export.calibrate.quantization.quantizer import fake_quantize, sqnr_db
from qvlm_export.calibrate.quantization.record import (
    LinearSqnr,
    RtnBaseline,
    compute_errors_by_label,
    make_linear_record,
    run_rtn_baseline,
)
from qvlm_export.calibrate.quantization.tokens import TokenLabel, mean_token_error, token_errors, weigh_by_output
from qvlm_export.calibrate.qvlm.entropy import entropy_nats, soft_code_distribution
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint

SIMPLE = SearchConfig(equalization="none", linear=LinearConfig())


def samples_with_answers(checkpoint: Checkpoint) -> list[Sample]:
    """Samples with one, no and two images, the last three tokens being the answer."""
    samples = [make_sample(checkpoint, words=w, images=n, seed=s) for s, (w, n) in enumerate([(9, 1), (6, 0), (12, 2)])]
    return [Sample(s.input_ids, s.pixel_values, len(s.input_ids) - 3) for s in samples]


def job_of(checkpoint: Checkpoint, preset: str, samples: list[Sample]) -> CalibrationJob:
    blocks, schemes = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, preset)
    return CalibrationJob(blocks, checkpoint.source, schemes, samples, strict=True)  # linears keep their schemes


def calibrated(checkpoint: Checkpoint, preset: str, folder: Path, method: Any) -> CalibratedCheckpoint:
    writer = CalibratedWriter(folder)
    job = job_of(checkpoint, preset, samples_with_answers(checkpoint))
    writer.finish(checkpoint.config_json, method(job, writer, lambda *_: None))
    return CalibratedCheckpoint(folder)


@pytest.fixture(scope="module")
def checkpoint(llava: Any) -> Checkpoint:
    return open_checkpoint(str(llava(dtype="float32")))


@pytest.fixture(scope="module")
def int4(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> CalibratedCheckpoint:
    """A searched checkpoint without equalization, so that its weights can be compared with the source."""
    folder = tmp_path_factory.mktemp("record")
    return calibrated(checkpoint, "int4", folder, lambda *arguments: calibrate_search(*arguments, config=SIMPLE))


def layers_of(checkpoint: CalibratedCheckpoint) -> list[dict[str, Any]]:
    return [layer for block in checkpoint.summary["blocks"] for layer in block["layers"]]


def linears_of(checkpoint: CalibratedCheckpoint) -> dict[str, dict[str, Any]]:
    return {name: linear for layer in layers_of(checkpoint) for name, linear in layer["linears"].items()}


def test_one_massive_token_does_not_decide_the_errors() -> None:
    """A plain sum of squares would give the error of the token that is 3,000 times larger, and nothing else."""
    torch.manual_seed(0)
    exact = torch.randn(1, 50, 8)
    exact[:, 0] *= 3000
    output = exact.clone()
    output[:, 1:] += 0.1 * torch.randn(1, 49, 8)
    error = mean_token_error([output], [exact])
    assert error == pytest.approx(float(token_errors(output, exact).mean()))
    assert 0.005 < error < 0.03
    output[:, 0] = 0  # the massive token is lost
    assert mean_token_error([output], [exact]) == pytest.approx(error + 1 / 50, rel=1e-3)
    (weights,) = weigh_by_output([exact])
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0, 0]) < 1e-5


def test_errors_by_label_equal_those_of_a_loop() -> None:
    torch.manual_seed(0)
    float_outputs = [torch.randn(1, 5, 3), torch.randn(2, 4, 3)]
    outputs = [x + 0.1 * torch.randn_like(x) for x in float_outputs]
    labels = [torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1])]
    sums = {0: [0.0, 0.0], 1: [0.0, 0.0], 2: [0.0, 0.0]}
    for output, exact, label in zip(outputs, float_outputs, labels, strict=True):
        for row in range(len(exact)):
            for token in range(exact.shape[1]):
                label_sums = sums[int(label[token if len(label) > 1 else 0])]
                error = (output[row, token] - exact[row, token]).square().sum() / exact[row, token].square().sum()
                label_sums[0] += float(error)
                label_sums[1] += 1
    errors = compute_errors_by_label(outputs, float_outputs, labels)
    assert errors == pytest.approx(
        {name: a / b for name, (a, b) in zip(("image", "prompt", "answer"), sums.values(), strict=True)}
    )


def test_the_rtn_baseline_is_what_calibrate_rtn_writes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Compared on the first block, whose inputs are the same; of so few samples all are compared."""
    samples = samples_with_answers(checkpoint)
    searched = calibrated(
        checkpoint, "int8", tmp_path / "searched", lambda *arguments: calibrate_search(*arguments, config=FAST)
    )
    rtn = calibrated(checkpoint, "int8", tmp_path / "rtn", calibrate_rtn)
    blocks, rtn_source = make_blocks(checkpoint.hf_config), DequantizedSource(rtn)
    first = blocks.vision_layers[0].prefix
    outputs: dict[str, list[torch.Tensor]] = {}
    plain_step, rtn_step = float_step(checkpoint.source), fake_quantized_step(rtn, rtn_source)
    for name, source, step in (("float", checkpoint.source, plain_step), ("rtn", rtn_source, rtn_step)):
        recording = record_outputs(step, lambda prefix, x, name=name: outputs.setdefault(f"{name} {prefix}", list(x)))
        run_vision_blocks(blocks, source, samples, recording)
    labels = [torch.zeros(1, dtype=torch.int64)] * 2
    expected = compute_errors_by_label(outputs[f"rtn {first}"], outputs[f"float {first}"], labels)
    compared = searched.summary["blocks"][0]["compared"]
    assert compared["inputs"] == 2
    assert compared["rtn"] == pytest.approx(expected, rel=1e-4)
    assert compared["searched"]["image"] > 0
    assert compared["searched"] == searched.summary["blocks"][0]["errors"]


def test_the_rtn_baseline_runs_few_inputs_spread_evenly() -> None:
    module = torch.nn.Linear(4, 4)
    pairs = [(torch.full((1, 2, 4), float(n)), torch.full((1, 2, 4), float(n))) for n in range(20)]
    run_inputs: list[float] = []

    def run(part: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        run_inputs.append(float(x[0, 0, 0]))
        return part.proj(x)

    assert run_rtn_baseline(module, {}, run, pairs) == RtnBaseline((), ())
    holder = torch.nn.Module()
    holder.proj = module
    with torch.no_grad():
        baseline = run_rtn_baseline(holder, {"proj": LinearScheme(4, None, 4)}, run, pairs)
    assert baseline.numbers == (0, 3, 6, 9, 12, 15, 18)
    assert run_inputs == [*baseline.numbers, *baseline.numbers]


def test_output_sqnr_compares_a_linear_with_its_float_output(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Compared on the first block, whose input is exact; of so few rows all are measured."""
    searched = calibrated(checkpoint, "int8", tmp_path, lambda *arguments: calibrate_search(*arguments, config=SIMPLE))
    blocks, inputs, block_outputs = make_blocks(checkpoint.hf_config), list[torch.Tensor](), list[torch.Tensor]()
    first = blocks.vision_layers[0]
    layer = first.module.get_submodule("self_attn.q_proj")
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).clone()))
    first.module.register_forward_hook(lambda _, __, output: block_outputs.append(output.flatten(0, -2).clone()))
    run_vision_blocks(blocks, checkpoint.source, samples_with_answers(checkpoint), float_step(checkpoint.source))
    rows, name = torch.cat(inputs), f"{first.prefix}.self_attn.q_proj"
    linear, weight = searched.linear(name), torch.from_numpy(checkpoint.source.load(f"{name}.weight"))
    float_output = rows @ weight.T
    output = fake_quantize(rows, linear.input_scale, 8) @ torch.from_numpy(linear.dequantized()).T
    weights = 1 / torch.cat(block_outputs).square().mean(-1)  # few tokens, so that all are probed
    signal, error = ((weights * part.square().sum(-1)).sum() for part in (float_output, output - float_output))
    db = 10 * math.log10(float(signal / error))
    assert linears_of(searched)[name]["sqnr_db"] == pytest.approx(db, abs=1e-3)


def test_a_label_without_tokens_is_left_out() -> None:
    x = torch.ones(1, 2, 1)
    assert compute_errors_by_label([x], [x], [torch.tensor([1, 2])]) == {"prompt": 0.0, "answer": 0.0}


def test_labels_are_in_the_order_of_the_inputs(checkpoint: Checkpoint) -> None:
    blocks, samples = make_blocks(checkpoint.hf_config), samples_with_answers(checkpoint)
    prompts = [[sample] for sample in samples]
    decoder = label_block_inputs(blocks.text_layers[1], blocks, prompts)
    for sample, labels in zip(samples, decoder, strict=True):
        expected = np.where(sample.input_ids == checkpoint.config.image_token_id, 0, 1)
        expected[-3:] = 2
        assert labels.tolist() == expected.tolist()
    for block in (blocks.vision_layers[0], blocks.projector):
        assert [x.tolist() for x in label_block_inputs(block, blocks, prompts)] == [[TokenLabel.IMAGE]] * 2


def test_every_block_has_errors_of_its_modalities(int4: CalibratedCheckpoint) -> None:
    for block in int4.summary["blocks"]:
        decoder = block["name"].startswith("language_model")
        assert list(block["errors"]) == (["image", "prompt", "answer"] if decoder else ["image"])
        values = block["errors"].values()
        assert 0 < min(values) <= block["error"] * 1.0001
        assert max(values) >= block["error"] * 0.9999  # the whole is a weighted mean of its parts
        if not decoder:
            assert block["errors"]["image"] == pytest.approx(block["error"], rel=1e-5)


def test_the_record_holds_every_quantized_linear_once_in_order(int4: CalibratedCheckpoint) -> None:
    assert set(linears_of(int4)) == set(int4.schemes)
    assert len(linears_of(int4)) == sum(len(layer["linears"]) for layer in layers_of(int4))
    shared = next(layer for layer in layers_of(int4) if len(layer["linears"]) == 3)
    assert [name.rpartition(".")[2] for name in shared["linears"]] == ["q_proj", "k_proj", "v_proj"]


def test_records_of_linears_agree_with_the_checkpoint(int4: CalibratedCheckpoint, checkpoint: Checkpoint) -> None:
    for name, record in linears_of(int4).items():
        linear, weight = int4.linear(name), checkpoint.source.load(f"{name}.weight").astype(np.float64)
        error = linear.dequantized() - weight
        assert record["weight_sqnr_db"] == pytest.approx(10 * math.log10((weight**2).sum() / (error**2).sum()), rel=1e-5)
        stored = linear.codes.size * linear.scheme.weight_bits + 8 * linear.scale.nbytes
        assert record["bits_per_weight"] == pytest.approx(stored / linear.codes.size)
        assert record["input_scale"] == linear.input_scale
        assert record["scheme"].split(" ")[0] == linear.scheme.name
        assert (record["range_coverage"] is None) == (linear.scheme.activation_bits is None)
    assert {record["scheme"] for record in linears_of(int4).values()} == {"W8A8", "W4A16 g128"}


def test_coverage_and_entropy_are_those_of_the_inputs(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows recorded during the search give the same coverage and entropy as the histograms of the record."""
    recorded: list[dict[str, torch.Tensor]] = []
    quantize_shared_input = BlockSearch._quantize_shared_input

    def record_rows(self: BlockSearch, block: Any, shared: Any, rows: LayerInputs, inputs: Any) -> None:
        recorded.append({shared.linears[0]: rows.quantized_rows.clone()})
        quantize_shared_input(self, block, shared, rows, inputs)

    monkeypatch.setattr(BlockSearch, "_quantize_shared_input", record_rows)
    job = job_of(checkpoint, "int8", samples_with_answers(checkpoint))

    class NullWriter(CalibratedWriter):
        def __init__(self) -> None: ...
        def write_shard(self, *_: object) -> None: ...

    summary = calibrate_search(job, NullWriter(), lambda *_: None, SIMPLE)
    layers = [layer for block in summary["blocks"] for layer in block["layers"]]
    for layer, rows in zip(layers, recorded, strict=True):
        ((first, x),) = rows.items()
        name, record = next(iter(layer["linears"].items()))
        assert name.endswith(first)
        assert record["range_coverage"] == pytest.approx(127 * record["input_scale"] / float(x.abs().max()))
        assert layer["bits"] == 8
        assert layer["entropy"] == pytest.approx(entropy_nats(soft_code_distribution(x, record["input_scale"], 8)), abs=0.01)
    assert any(linear["range_coverage"] < 0.99 for layer in layers for linear in layer["linears"].values())


def test_largest_inputs_are_recorded_by_kind_of_token(int4: CalibratedCheckpoint, checkpoint: Checkpoint) -> None:
    """Compared on the first linears of the first decoder layer, which come right after a norm."""
    blocks, inputs = make_blocks(checkpoint.hf_config), list[torch.Tensor]()
    samples = samples_with_answers(checkpoint)
    first = blocks.text_layers[0]
    layer = first.module.get_submodule("self_attn.q_proj")
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].clone()))
    source = DequantizedSource(int4)
    step = fake_quantized_step(int4, source)
    run_decoder_blocks(blocks, source, samples, run_vision_blocks(blocks, source, samples, step), step)
    amax = [0.0, 0.0, 0.0]
    for rows, labels in zip(inputs, label_block_inputs(first, blocks, [[s] for s in samples]), strict=True):
        for row, label in zip(rows, labels, strict=True):
            amax[int(label)] = max(amax[int(label)], float(row.abs().max()))
    record = next(x for x in layers_of(int4) if f"{first.prefix}.self_attn.q_proj" in x["linears"])
    assert record["largest"] == pytest.approx(dict(zip(("image", "prompt", "answer"), amax, strict=True)), rel=1e-4)
    tower = layers_of(int4)[0]
    assert list(tower["largest"]) == ["image"]


def test_block_starts_follow_the_papers_rule() -> None:
    """Layers of more entropy than the median are joined to those before, but never across blocks in memory."""
    entropies = {"a": [1.0, 3.0, 3.0], "b": [3.0, 1.0]}
    blocks = [
        {"name": name, "layers": [{"linears": {f"{name}.{k}": {}}, "bits": 8, "entropy": e} for k, e in enumerate(values)]}
        for name, values in entropies.items()
    ]
    blocks[0]["layers"][1]["entropy"] = 3.5
    marked, thresholds = mark_partition(blocks)
    assert thresholds == {"8": median([1.0, 3.5, 3.0, 3.0, 1.0])}
    assert [[layer["starts_block"] for layer in block["layers"]] for block in marked] == [[True, False, False], [True, True]]


def test_every_block_in_memory_starts_a_searched_block(int4: CalibratedCheckpoint) -> None:
    assert all(block["layers"][0]["starts_block"] for block in int4.summary["blocks"])
    assert set(int4.summary["entropy_thresholds"]) == {"4", "8"}


def test_sqnr_of_a_zero_and_of_an_exact_weight_is_none() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    assert sqnr_db(weight, weight) is None
    assert sqnr_db(torch.zeros(1, 2), weight) is None
    assert sqnr_db(weight, weight * 0.9) == pytest.approx(20.0, abs=1e-5)


def test_coverage_of_an_input_that_is_all_zero_is_none() -> None:
    linear = QuantizedLinear(LinearScheme(8, 8, None), np.ones((2, 4), np.int8), np.ones(2, np.float32), 2.0**-14)
    record = make_linear_record(linear, LinearSqnr(None, None), 0.0)
    assert (record["range_coverage"], record["sqnr_db"], record["bits_per_weight"]) == (None, None, 8 + 8)
    json.dumps(record, allow_nan=False)


def test_the_record_is_json_without_infinities(int4: CalibratedCheckpoint) -> None:
    json.dumps(int4.summary, allow_nan=False)


def test_an_image_with_nan_is_refused_by_block_and_sample(checkpoint: Checkpoint, tmp_path: Path) -> None:
    samples = samples_with_answers(checkpoint)
    samples[2].pixel_values[1, 0, 0, 0] = np.nan
    job = job_of(checkpoint, "int4", samples)
    with pytest.raises(
        UserError, match=r"^vision_tower\.vision_model\.encoder\.layers\.0: activations of sample 3 are not finite"
    ):
        calibrate_search(job, CalibratedWriter(tmp_path / "c"), lambda *_: None, SIMPLE)
