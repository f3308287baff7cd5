"""Offloading to a pretended GPU: no operation mixes devices, blocks are prefetched one ahead, results match the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend_gpu import GPU, PretendGpu
from small_export import mixed_samples, open_small, schemes_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from qvlm_export.calibrate.blockwise import block_loader
from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import FAST, LinearConfig, Rounding, SearchConfig
from qvlm_export.calibrate.rounding.output_hessian import (
    add_gradients,
    empty_output_hessian,
    scale_output_hessian,
)
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs, quantize_linears

Llava = Callable[..., Path]
SMALL = {"text": {"num_hidden_layers": 1}, "vision": {"num_hidden_layers": 3}}


class SameThread:
    """An executor that computes at once on this thread, as the pretended GPU is active only where it was entered."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> SameThread:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def calibrate_search_with_rtn(*arguments: Any) -> dict[str, Any]:
    """Rounds to nearest, as GPTQ's loop over columns takes long on the pretended GPU."""
    return calibrate_search(*arguments, SearchConfig("search", LinearConfig(rounding="nearest")))


def calibrate_on_both(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, calibrate: Any
) -> list[CalibratedCheckpoint]:
    """The model calibrated on the CPU, and on the pretended GPU."""
    with sdpa_kernel(SDPBackend.MATH):  # which the pretended GPU uses, too
        on_cpu = calibrate_model(model, folder / "cpu", torch.device("cpu"), calibrate)
    monkeypatch.setattr(block_loader, "ThreadPoolExecutor", SameThread)
    with PretendGpu() as gpu:
        on_gpu = calibrate_model(model, folder / "gpu", GPU, calibrate)
    assert gpu.on_gpu > 100
    return [on_cpu, on_gpu]


def calibrate_model(model: Path, folder: Path, device: torch.device, calibrate: Any) -> CalibratedCheckpoint:
    checkpoint = open_small(model)
    blocks, schemes = make_blocks(checkpoint.hf_config), schemes_of(checkpoint, "int4")
    job = CalibrationJob(blocks, checkpoint.source, schemes, mixed_samples(checkpoint)[:2], device=device)
    writer = CalibratedWriter(folder)
    writer.finish(checkpoint.config_json, calibrate(job, writer, lambda *_: None))
    return CalibratedCheckpoint(folder)


def test_rtn_on_a_gpu_gives_the_results_of_the_cpu(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, on_gpu = calibrate_on_both(llava(**SMALL), tmp_path, monkeypatch, calibrate_rtn)
    for name in on_cpu.schemes:
        expected, linear = on_cpu.linear(name), on_gpu.linear(name)
        assert np.array_equal(expected.codes, linear.codes)
        assert np.array_equal(expected.scale, linear.scale)
        assert expected.input_scale == linear.input_scale or expected.input_scale == pytest.approx(
            linear.input_scale, rel=2e-3
        )


def test_search_on_a_gpu_gives_the_results_of_the_cpu(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, on_gpu = calibrate_on_both(llava(**SMALL), tmp_path, monkeypatch, calibrate_search_with_rtn)
    assert on_cpu.summary == on_gpu.summary


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false")
def test_token_weighted_search_on_a_real_gpu_agrees_with_the_cpu(llava: Llava, tmp_path: Path) -> None:
    """The pretended GPU cannot compute gradients."""
    model, calibrate = llava(**SMALL), partial(calibrate_search, config=replace(FAST, token_weighting="logits"))
    on_cpu, on_gpu = (calibrate_model(model, tmp_path / name, torch.device(name), calibrate) for name in ("cpu", "cuda"))
    for name in on_cpu.schemes:
        assert (on_cpu.linear(name).codes == on_gpu.linear(name).codes).mean() > 0.98, name


@pytest.mark.parametrize("rounding", ["gptq", "kronecker"])
def test_gptq_and_kronecker_rounding_on_a_gpu_give_the_results_of_the_cpu(rounding: Rounding) -> None:
    """The rest of what a search computes. Output Hessians stay in host memory."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(8, 128, generator=generator), torch.randn(64, 128, generator=generator)
    hessian = scale_output_hessian(add_gradients(empty_output_hessian(8), rows[:, :8], generator), torch.full((8,), 2.0))
    schemes = {"a": LinearScheme(weight_bits=4, activation_bits=8, group_size=64)}
    options = schemes, LinearConfig(rounding=rounding)
    on_cpu = quantize_linears({"a": weight}, *options, LayerInputs(rows, rows * 1.01), {"a": hessian})["a"]
    with PretendGpu():
        gpu_inputs = LayerInputs(rows.to(GPU), rows.to(GPU) * 1.01)
        on_gpu = quantize_linears({"a": weight.to(GPU)}, *options, gpu_inputs, {"a": hessian})["a"]
    assert np.array_equal(on_gpu.codes, on_cpu.codes)
    assert np.array_equal(on_gpu.scale, on_cpu.scale)


@dataclass(frozen=True)
class RecordingSource:
    """A tensor source that records which tensors were read."""

    source: TensorSource
    loaded: list[str]

    def load(self, name: str) -> np.ndarray:
        self.loaded.append(name)
        return self.source.load(name)


@pytest.fixture
def blocks_and_source(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelBlocks, RecordingSource]:
    """Blocks and source of a small model; uploads are done at once when they are submitted."""
    monkeypatch.setattr(block_loader, "ThreadPoolExecutor", SameThread)
    checkpoint = open_small(llava(**SMALL))
    return make_blocks(checkpoint.hf_config), RecordingSource(checkpoint.source, [])


def test_the_next_block_is_prefetched_before_this_one_computes(
    blocks_and_source: tuple[ModelBlocks, RecordingSource],
) -> None:
    blocks, source = blocks_and_source
    order = blocks.all()
    with PretendGpu(), block_loader.open_block_loader(blocks, source, GPU) as load:  # type: ignore[arg-type]
        for number, block in enumerate(order):
            with load(block) as module:
                assert all(p.device == GPU for p in module.parameters())
                assert {n for b in order[: number + 2] for n in b.tensor_names()} == set(source.loaded)
            assert {p.device.type for p in module.parameters()} == {"meta"}
    assert len(source.loaded) == len(set(source.loaded))


def test_backwards_the_preceding_block_is_prefetched(blocks_and_source: tuple[ModelBlocks, RecordingSource]) -> None:
    blocks, source = blocks_and_source
    last, preceding = blocks.text_layers[-1], blocks.projector
    loader = block_loader.open_block_loader(blocks, source, GPU, backwards=True)  # type: ignore[arg-type]
    with PretendGpu(), loader as load, load(last):
        assert set(source.loaded) == {*last.tensor_names(), *preceding.tensor_names()}


def test_a_damaged_prefetched_weight_is_named_when_its_block_is_loaded(llava: Llava) -> None:
    checkpoint = open_small(llava(**SMALL))
    blocks = make_blocks(checkpoint.hf_config)
    first, second = blocks.vision_layers[:2]
    bad = second.tensor_names()[0]

    class DamagedSource:
        def load(self, name: str) -> np.ndarray:
            array = checkpoint.source.load(name)
            return np.full_like(array, np.nan) if name == bad else array

    with block_loader.open_block_loader(blocks, DamagedSource(), torch.device("meta")) as load:  # type: ignore[arg-type]
        with load(first):
            pass
        with pytest.raises(UserError, match=f"{bad}: holds NaN"), load(second):
            pass
