"""Calibration on a device that is not the CPU: nothing is computed across devices, blocks come one ahead, results agree."""

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
from small_export import mixed_samples, open_small, plan_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from qvlm_export.calibrate.blockwise import offload
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
    error_directions,
    scale_output_hessian,
)
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs, quantize_linears

Llava = Callable[..., Path]
SMALL = {"text": {"num_hidden_layers": 1}, "vision": {"num_hidden_layers": 3}}


class SameThread:
    """An executor that computes at once: the pretence is only where it was entered."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> SameThread:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


def searched_briefly(*arguments: Any) -> dict[str, Any]:
    """Without the loop over columns, which takes long where it is only pretended."""
    return calibrate_search(*arguments, SearchConfig("search", LinearConfig(rounding="nearest")))


def on_both(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, calibrate: Any) -> list[CalibratedCheckpoint]:
    """The model calibrated on the CPU, and on the pretended GPU."""
    with sdpa_kernel(SDPBackend.MATH):  # as where it is pretended
        wanted = calibrated(model, folder / "cpu", torch.device("cpu"), calibrate)
    monkeypatch.setattr(offload, "ThreadPoolExecutor", SameThread)
    with PretendGpu() as gpu:
        found = calibrated(model, folder / "gpu", GPU, calibrate)
    assert gpu.on_gpu > 100
    return [wanted, found]


def calibrated(model: Path, folder: Path, device: torch.device, calibrate: Any) -> CalibratedCheckpoint:
    checkpoint = open_small(model)
    blocks, plan = make_blocks(checkpoint.hf_config), plan_of(checkpoint, "int4")
    job = CalibrationJob(blocks, checkpoint.source, plan, mixed_samples(checkpoint)[:2], device=device)
    writer = CalibratedWriter(folder)
    writer.finish(checkpoint.config_json, calibrate(job, writer, lambda *_: None))
    return CalibratedCheckpoint(folder)


def test_round_to_nearest_on_a_gpu_as_on_a_cpu(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found = on_both(llava(**SMALL), tmp_path, monkeypatch, calibrate_rtn)
    for name in wanted.schemes:
        one, other = wanted.linear(name), found.linear(name)
        assert np.array_equal(one.codes, other.codes)
        assert np.array_equal(one.scale, other.scale)
        assert one.input_scale == other.input_scale or one.input_scale == pytest.approx(other.input_scale, rel=2e-3)


def test_search_on_a_gpu_as_on_a_cpu(llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found = on_both(llava(**SMALL), tmp_path, monkeypatch, searched_briefly)
    assert wanted.summary == found.summary


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false")
def test_what_tokens_count_on_a_real_gpu(llava: Llava, tmp_path: Path) -> None:
    """The pretended GPU cannot go backwards."""
    model, weighted = llava(**SMALL), partial(calibrate_search, method=replace(FAST, token_weighting="logits"))
    wanted, found = (calibrated(model, tmp_path / name, torch.device(name), weighted) for name in ("cpu", "cuda"))
    for name in wanted.schemes:
        assert (wanted.linear(name).codes == found.linear(name).codes).mean() > 0.98, name


@pytest.mark.parametrize("rounding", ["gptq", "two-sided"])
def test_rounding_towards_the_output_on_a_gpu(rounding: Rounding) -> None:
    """The rest of what a search computes. Metrics stay in the memory of the host."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(8, 128, generator=generator), torch.randn(64, 128, generator=generator)
    metric = scale_output_hessian(add_gradients(empty_output_hessian(8), rows[:, :8], generator), torch.full((8,), 2.0))
    plan = {"a": LinearScheme(weight_bits=4, activation_bits=8, group_size=64)}
    given = plan, LinearConfig(rounding=rounding)
    wanted = quantize_linears({"a": weight}, *given, LayerInputs(rows, rows * 1.01), {"a": metric})["a"]
    with PretendGpu():
        there = LayerInputs(rows.to(GPU), rows.to(GPU) * 1.01)
        found = quantize_linears({"a": weight.to(GPU)}, *given, there, {"a": metric})["a"]
        error_directions(metric, GPU)
    assert np.array_equal(found.codes, wanted.codes)
    assert np.array_equal(found.scale, wanted.scale)


@dataclass(frozen=True)
class Watched:
    """A source that notes which tensors were read."""

    source: TensorSource
    loaded: list[str]

    def load(self, name: str) -> np.ndarray:
        self.loaded.append(name)
        return self.source.load(name)


@pytest.fixture
def watched(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelBlocks, Watched]:
    """Blocks and source of a small model; uploads are done when they are asked for."""
    monkeypatch.setattr(offload, "ThreadPoolExecutor", SameThread)
    checkpoint = open_small(llava(**SMALL))
    return make_blocks(checkpoint.hf_config), Watched(checkpoint.source, [])


def test_the_next_block_is_on_its_way_before_this_one_computes(watched: tuple[ModelBlocks, Watched]) -> None:
    blocks, source = watched
    order = blocks.all()
    with PretendGpu(), offload.open_block_loader(blocks, source, GPU) as resident:  # type: ignore[arg-type]
        for number, block in enumerate(order):
            with resident(block) as module:
                assert all(p.device == GPU for p in module.parameters())
                assert {n for b in order[: number + 2] for n in b.tensor_names()} == set(source.loaded)
            assert {p.device.type for p in module.parameters()} == {"meta"}
    assert len(source.loaded) == len(set(source.loaded))


def test_backwards_the_block_before_is_on_its_way(watched: tuple[ModelBlocks, Watched]) -> None:
    blocks, source = watched
    last, before = blocks.text_layers[-1], blocks.projector
    backwards = offload.open_block_loader(blocks, source, GPU, backwards=True)  # type: ignore[arg-type]
    with PretendGpu(), backwards as resident, resident(last):
        assert set(source.loaded) == {*last.tensor_names(), *before.tensor_names()}


def test_bad_weight_ahead_is_named_when_its_turn_comes(llava: Llava) -> None:
    checkpoint = open_small(llava(**SMALL))
    blocks = make_blocks(checkpoint.hf_config)
    first, second = blocks.vision_layers[:2]
    bad = second.tensor_names()[0]

    class Damaged:
        def load(self, name: str) -> np.ndarray:
            array = checkpoint.source.load(name)
            return np.full_like(array, np.nan) if name == bad else array

    with offload.open_block_loader(blocks, Damaged(), torch.device("meta")) as resident:  # type: ignore[arg-type]
        with resident(first):
            pass
        with pytest.raises(UserError, match=f"{bad}: holds NaN"), resident(second):
            pass
