"""What this machine does in a second: measured in about two, for the estimates of the preflight."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import as_tensor, check_finite
from qvlm_export.calibrate.checkpoint.packing import pack_codes
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.quantizer import quantize_linear
from qvlm_export.engines.graph.int4_packing import transposed_nibbles
from qvlm_export.pipeline.planning.preflight import nearest_folder

TOKENS, WIDTH, OUT = 512, 4096, 2048
ROUNDED = 5120  # rows and columns of a matrix so large that its memory comes from the kernel and goes back to it
DISK_BYTES, PIECE_BYTES = 128 * 2**20, 2**22
LARGE_BYTES, LARGE_DISK_BYTES = 4 * 2**30, 2**30  # of weights that take minutes, and of what is then written to measure
PAGE_BYTES, PAGES_ASKED = 4096, 64
REPEATS, KEPT_UP_SECONDS = 2, 0.5
GPU_WIDTH = 8192
BUILT_BYTES = 2**30 / 12  # where nobody measures it: between what two processors did
_W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)


@dataclass(frozen=True)
class Machine:
    """Rates a second of processor time. flops: float32 products on all threads, as calibration computes them. single_flops:
    by BLAS on one thread, which factorizations go by, shared_flops: on each of all; on a GPU these three are the same.
    rounded, packed: weights, on one; the first from what was read to what is written. read_bytes: from the disk, of which
    the share `cached` need not be read. found_bytes: of memory that nobody uses, of which there are free_bytes, found for
    what is read and written: slow where the machine is virtual and its host must find it first. share: of the processor
    that this process gets, less than 1 beside others' work.
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
    cached: float = 0.0
    found_bytes: float = math.inf
    free_bytes: int = 0
    built_bytes: float = BUILT_BYTES


def measure_machine(folder: Path, weights: Sequence[Path], device: str = "cpu") -> Machine:
    """folder: where the export will write; a file without a name is written there. weights: the files that will be read.

    device: that calibration computes on.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator) for n in (TOKENS, OUT))
    flops = 2.0 * TOKENS * OUT * WIDTH

    def computed() -> None:
        matmul(x, weight.T)

    def by_blas() -> None:
        x @ weight.T

    def rounding() -> None:
        loaded = stored.copy()
        check_finite("", loaded)
        pack_codes(quantize_linear(as_tensor(loaded), _W4A16, None).codes, 4).tobytes()

    threads = torch.get_num_threads()
    taken, share = _kept_up(computed, threads)
    all_threads = flops / taken
    with one_thread():
        single = flops / _kept_up(by_blas)[0]
        shared = threads * single
        stored = torch.randn(ROUNDED, ROUNDED, generator=generator).half().numpy()
        rounded = stored.size / _seconds(rounding)
    nibbles = np.zeros((OUT, WIDTH // 2), np.uint8)
    packed = nibbles.size * 2 / _seconds(lambda: transposed_nibbles(nibbles))
    hashed = nibbles.nbytes / _seconds(lambda: hashlib.sha256(nibbles.tobytes()).digest())
    cached, free = _cached(weights), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    large = sum(path.stat().st_size for path in weights) > LARGE_BYTES
    written, found = _write_rates(nearest_folder(folder), LARGE_DISK_BYTES if large else DISK_BYTES)
    read = _read_rate(weights[-1])
    if device == "cuda":
        all_threads = single = shared = _gpu_flops()
    return Machine(all_threads, single, shared, rounded, packed, hashed, read, written, threads, share, cached, found, free)


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


def _cached(files: Sequence[Path]) -> float:
    """The share of the files' bytes that lie in memory, by asking for a few pages of each; 0 if nobody can tell."""
    held = total = 0.0
    for path in files:
        size = path.stat().st_size
        total += size
        with path.open("rb") as file:
            starts = [random.randrange(max(size, 1)) for _ in range(PAGES_ASKED)]  # asking for a page may fetch it
            held += size * sum(_is_cached(file.fileno(), start) for start in starts) / PAGES_ASKED
    return held / max(total, 1)


def _is_cached(descriptor: int, start: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(PAGE_BYTES)], start, os.RWF_NOWAIT) >= 0
    except OSError:  # it would have to wait, or the file system cannot say
        return False


def _read_rate(path: Path) -> float:
    """From the disk: what is read is forgotten first."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # not every file system forgets
            os.posix_fadvise(file.fileno(), 0, DISK_BYTES, os.POSIX_FADV_DONTNEED)
        began, count = time.perf_counter(), 0
        while count < DISK_BYTES and (piece := file.read(PIECE_BYTES)):
            count += len(piece)
        return max(count, 1) / (time.perf_counter() - began)


def _write_rates(folder: Path, count: int) -> tuple[float, float]:
    """Bytes a second written to the disk from memory in use, and of memory found for the first time they are written.

    count: of bytes; fewer where the disk is nearly full, as it may be when an export is resumed.
    """
    count = min(count, max(shutil.disk_usage(folder).free // 4, PIECE_BYTES))
    first, second = (_writing(folder, count) for _ in range(2))  # the second is given the memory of the first
    return count / second, count / max(first - second, 1e-9 * first)


def _writing(folder: Path, count: int) -> float:
    piece = bytes(PIECE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(count // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began
