"""What this machine does in a second: measured in about two, for the estimates of the preflight."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from calibrate.packing import pack_codes
from calibrate.products import product
from calibrate.quantize import quantize_linear
from calibrate.scheme import LinearScheme
from calibrate.threads import one_thread
from engines.packing import transposed_nibbles
from qvlm_export.preflight import nearest_folder

TOKENS, WIDTH, OUT = 512, 4096, 2048
DISK_BYTES = 128 * 2**20
REPEATS, KEPT_UP_SECONDS = 2, 0.5
GPU_WIDTH = 8192
BUILT_BYTES = 2**30 / 12  # where nobody measures it: between what two processors did
_W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)


@dataclass(frozen=True)
class Machine:
    """Rates a second of processor time. flops: float32 products on all threads, as calibration computes them. single_flops:
    by BLAS on one thread, which factorizations go by, shared_flops: on each of all; on a GPU these three are the same.
    rounded, packed: weights, on one. share: of the processor that this process gets, less than 1 beside others' work.
    built_bytes: of INT4 weights that TensorRT lays out in a plan.
    """

    flops: float
    single_flops: float
    shared_flops: float
    rounded: float
    packed: float
    hashed_bytes: float
    read_bytes: float
    written_bytes: float
    threads: int
    share: float = 1.0
    built_bytes: float = BUILT_BYTES


def measure_machine(folder: Path, weights: Path, device: str = "cpu") -> Machine:
    """folder: where the export will write; a file without a name is written there. weights: a file that will be read.

    device: that calibration computes on.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator) for n in (TOKENS, OUT))
    flops = 2.0 * TOKENS * OUT * WIDTH

    def computed() -> None:
        product(x, weight.T)

    def by_blas() -> None:
        x @ weight.T

    def rounding() -> None:
        pack_codes(quantize_linear(half, _W4A16, None).codes, 4)

    threads = torch.get_num_threads()
    taken, share = _kept_up(computed, threads)
    all_threads = flops / taken
    with one_thread():
        single = flops / _kept_up(by_blas)[0]
        shared = threads * single
        half = weight.half()
        rounded = half.numel() / _seconds(rounding)
    stored = np.zeros((OUT, WIDTH // 2), np.uint8)
    packed = stored.size * 2 / _seconds(lambda: transposed_nibbles(stored))
    hashed = stored.nbytes / _seconds(lambda: hashlib.sha256(stored.tobytes()).digest())
    read, written = _read_rate(weights), _write_rate(nearest_folder(folder))
    if device == "cuda":
        all_threads = single = shared = _gpu_flops()
    return Machine(all_threads, single, shared, rounded, packed, hashed, read, written, threads, share)


def _seconds(work: Callable[[], object]) -> float:
    """Of processor time, in the fastest of a few calls, the first not counted."""
    work()
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def _kept_up(work: Callable[[], object], threads: int = 1) -> tuple[float, float]:
    """Processor seconds of a call on each thread, the mean of half a second's: a processor is faster for a moment than for
    hours. And processor time over the time that passed."""
    work()
    wall, processor, calls = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < KEPT_UP_SECONDS:
        work()
        calls += 1
    busy = (time.process_time() - processor) / threads
    return busy / calls, min(1.0, busy / (time.perf_counter() - wall))


def _gpu_flops() -> float:
    x = torch.randn(GPU_WIDTH, GPU_WIDTH, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        x @ x
    torch.cuda.synchronize()
    return REPEATS * 2.0 * GPU_WIDTH**3 / (time.perf_counter() - began)


def _read_rate(path: Path) -> float:
    began, count = time.perf_counter(), 0
    with path.open("rb") as file:
        while count < DISK_BYTES and (piece := file.read(2**22)):
            count += len(piece)
    return max(count, 1) / (time.perf_counter() - began)


def _write_rate(folder: Path) -> float:
    piece = bytes(2**22)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(DISK_BYTES // 2 // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BYTES / 2 / (time.perf_counter() - began)
