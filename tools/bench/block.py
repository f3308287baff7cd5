"""Benchmark of the calibration search on one decoder block of a real geometry, against a bound by operation count.

    python -m tools.bench.block --like 1b --samples 8 --out docs/bench_block.json

The block has random weights, as `tools/families/make_random_llava.py` makes them, and is calibrated with `--effort fast` (or
full) on prompts of random text that are as long as a prompt with an image. No other part of the model is computed. The lower
bound divides the operations that `calibrate/calibrators/cost.py` counts by the rates of plain matrix products, which are
measured before and after the search. The times are processor seconds, summed over all threads, because other load on the
machine affects them least; wall seconds are reported, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.cost import estimate_calibration_cost
from qvlm_export.calibrate.calibrators.efforts import EFFORTS
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.checkpoint.files import write_json
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.checkpoints.model_config import model_config
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.pipeline.preparation.recipe import assign_schemes, recipe_of_preset
from tools.families.make_random_llava import GEOMETRIES, make_config, random_tensor

CONFIGS = {effort.name: effort.config for effort in EFFORTS.values() if isinstance(effort.config, SearchConfig)}
WIDTH, REPEATS = 2048, 8


class RandomTensors:
    """A TensorSource of random float16 tensors, drawn when they are loaded, each from its own seed.

    shapes: of all tensors of the model. names: the tensors that iteration yields.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], names: list[str]) -> None:
        self._shapes, self._names = shapes, names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, _: str) -> np.dtype:
        return np.dtype(np.float16)

    def files(self) -> list[Path]:
        return []

    def load(self, name: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(list(self._shapes).index(name))
        return random_tensor(name, self._shapes[name], generator).numpy()


def product_rates(threads: int) -> tuple[float, float]:
    """FLOP per processor second of calibration's `matmul` on all threads, and of torch.matmul on one thread.

    The second rate bounds the factorizations.
    """
    all_threads = product_rate(threads, matmul)
    with one_thread():
        return all_threads, product_rate(1, torch.matmul)


def product_rate(threads: int, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    """Float32 operations that `multiply` does in one second in which each of `threads` threads is busy."""
    x = torch.randn(WIDTH, WIDTH)
    multiply(x, x)
    began = time.process_time()
    for _ in range(REPEATS):
        multiply(x, x)
    return REPEATS * 2.0 * WIDTH**3 * threads / (time.process_time() - began)


def one_block(like: str) -> tuple[ModelBlocks, RandomTensors]:
    """The first decoder block of a geometry, without the rest of the model, and its random weights."""
    config = make_config(replace(GEOMETRIES[like], layers=1), image_token=32000)
    blocks = make_blocks(config)
    blocks = replace(blocks, vision_layers=(), features=(0,), text_layers=blocks.text_layers[:1])
    return blocks, RandomTensors(expected_shapes(model_config(config, like)), blocks.text_layers[0].tensor_names())


def bench(like: str, effort: str, samples: int, tokens: int) -> dict[str, Any]:
    """Calibrates one block on `samples` prompts of `tokens` tokens each; returns one row of the JSON."""
    blocks, source = one_block(like)
    shapes = {name: source.shape(f"{name}.weight") for name in blocks.text_layers[0].linear_names()}
    schemes = assign_schemes(recipe_of_preset("int4"), shapes)
    rng = np.random.default_rng(0)
    no_images = np.zeros((0, 3, 1, 1), np.float32)
    prompts = [Sample(rng.integers(5, 30000, tokens), no_images, tokens) for _ in range(samples)]
    cost, threads = estimate_calibration_cost(blocks, schemes, prompts, CONFIGS[effort]), torch.get_num_threads()
    rates_before = product_rates(threads)
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        job = CalibrationJob(blocks, source, schemes, prompts)
        summary = calibrate_search(job, CalibratedWriter(Path(folder)), lambda *_: None, CONFIGS[effort])
    wall, processor = time.monotonic() - wall, time.process_time() - processor
    rates, single_rates = zip(rates_before, product_rates(threads), strict=True)
    # In processor time: a product keeps all threads busy; a factorization, or each of its pieces, keeps one.
    floor = threads * cost.flops / np.mean(rates) + (cost.single_flops + cost.shared_flops) / np.mean(single_rates)
    return {
        "like": like,
        "effort": effort,
        "samples": samples,
        "tokens": tokens,
        "threads": threads,
        "error": summary["blocks"][-1]["error"],
        "flops": cost.flops,
        "single_flops": cost.single_flops,
        "shared_flops": cost.shared_flops,
        "gflops": [round(rate / 1e9, 1) for rate in rates],
        "single_gflops": [round(rate / 1e9, 1) for rate in single_rates],
        "cpu_seconds": round(processor, 1),
        "floor_cpu_seconds": round(float(floor), 1),
        "ratio": round(processor / float(floor), 2),
        "wall_seconds": round(wall, 1),
        "estimated_memory_bytes": cost.memory_bytes,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_before_bytes": 1024 * peak_before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=GEOMETRIES, required=True)
    parser.add_argument("--effort", choices=CONFIGS, default="fast")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    row = bench(args.like, args.effort, args.samples, args.tokens)
    print(json.dumps(row))
    if args.out:
        rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
        key = ("like", "effort", "samples")
        write_json(args.out, [r for r in rows if [r[k] for k in key] != [row[k] for k in key]] + [row])


if __name__ == "__main__":
    main()
