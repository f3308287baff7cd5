"""Micro-benchmarks of this machine, for the cost model in `estimate.py`: about two seconds in all.

Matrix products, rounding, packing, hashing, and reading and writing files are timed on small samples of the real work; the
result is a rate for each.
"""

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
from qvlm_export.engines.graph.int4_packing import transpose_nibbles
from qvlm_export.pipeline.preparation.preflight import nearest_folder

TOKENS, WIDTH, OUT = 512, 4096, 2048
ROUNDED = 5120  # rows and columns; so large that malloc takes the memory from the kernel and returns it each time
DISK_BYTES, PIECE_BYTES = 128 * 2**20, 2**22
LARGE_BYTES, LARGE_DISK_BYTES = 4 * 2**30, 2**30  # weights above the first size take minutes; then this much is written
PAGE_BYTES, PAGES_PROBED = 4096, 64
REPEATS, SUSTAINED_SECONDS = 2, 0.5
GPU_WIDTH = 8192
BUILT_BYTES = 2**30 / 12  # used where it is not measured; between the rates of two processors
_W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)


@dataclass(frozen=True)
class Machine:
    """The rates of this machine, each for one second of CPU time.

    flops: float32 operations of matrix products on all threads, as calibration computes them. single_flops: of BLAS on one
    thread, the speed of factorizations. shared_flops: of BLAS on every thread separately, in sum. On a GPU, these three are
    the same.
    rounded, packed: weights on one thread; `rounded` covers everything between reading float16 weights and writing codes.
    hashed_bytes, read_bytes, written_bytes: bytes hashed, read from disk and written to disk.
    threads: number of threads. cpu_share: the share of the CPU that this process gets; below 1 when others use it, too.
    cached_share: the share of the weight files that lies in the page cache and need not be read from disk.
    allocated_bytes: bytes of unused memory that the system provides when they are first touched; slow on a virtual machine
    whose host must find the memory first. free_bytes: how much unused memory there is.
    built_bytes: bytes of INT4 weights that TensorRT builds into a plan.
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
    cpu_share: float = 1.0
    cached_share: float = 0.0
    allocated_bytes: float = math.inf
    free_bytes: int = 0
    built_bytes: float = BUILT_BYTES


def measure_machine(folder: Path, weights: Sequence[Path], device: str = "cpu", download_bytes: int = 0) -> Machine:
    """Measures the rates of this machine.

    folder: where the export will write; a nameless temporary file is written to its disk. weights: the weight files that
    will be read, of which `download_bytes` are not downloaded yet. device: where calibration computes, "cpu" or "cuda".
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator) for n in (TOKENS, OUT))
    flops = 2.0 * TOKENS * OUT * WIDTH

    def multiply() -> None:
        matmul(x, weight.T)

    def multiply_by_blas() -> None:
        x @ weight.T

    def round_weight() -> None:
        loaded = stored.copy()
        check_finite("", loaded)
        pack_codes(quantize_linear(as_tensor(loaded), _W4A16, None).codes, 4).tobytes()

    threads = torch.get_num_threads()
    seconds, cpu_share = _measure_sustained(multiply, threads)
    all_threads = flops / seconds
    with one_thread():
        single = flops / _measure_sustained(multiply_by_blas)[0]
        shared = threads * single
        stored = torch.randn(ROUNDED, ROUNDED, generator=generator).half().numpy()
        rounded = stored.size / _measure_seconds(round_weight)
    nibbles = np.zeros((OUT, WIDTH // 2), np.uint8)
    packed = nibbles.size * 2 / _measure_seconds(lambda: transpose_nibbles(nibbles))
    hashed = nibbles.nbytes / _measure_seconds(lambda: hashlib.sha256(nibbles.tobytes()).digest())
    present = [path for path in weights if path.exists()]
    cached_share, free = _measure_cached_share(present), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    large = download_bytes + sum(path.stat().st_size for path in present) > LARGE_BYTES
    written, allocated = _measure_write_rates(nearest_folder(folder), LARGE_DISK_BYTES if large else DISK_BYTES)
    read = _measure_read_rate(present[-1]) if present else written
    if device == "cuda":
        all_threads = single = shared = _measure_gpu_flops()
    return Machine(
        all_threads,
        single,
        shared,
        rounded,
        packed,
        hashed,
        read,
        written,
        threads,
        cpu_share,
        cached_share,
        allocated,
        free,
    )


def _measure_seconds(work: Callable[[], object]) -> float:
    """Returns the CPU time of the fastest of a few calls, after one call to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _measure_sustained(work: Callable[[], object], threads: int = 1) -> tuple[float, float]:
    """Returns the CPU seconds of one call on each thread, and CPU time over wall time.

    Both are means over SUSTAINED_SECONDS, as a processor runs faster for a moment than for hours.
    """
    work()
    wall, processor, calls = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < SUSTAINED_SECONDS:
        work()
        calls += 1
    busy = (time.process_time() - processor) / threads
    return busy / calls, min(1.0, busy / (time.perf_counter() - wall))


def _measure_gpu_flops() -> float:
    """Returns the float32 operations of matrix products that the GPU does in a second."""
    x = torch.randn(GPU_WIDTH, GPU_WIDTH, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        x @ x
    torch.cuda.synchronize()
    return REPEATS * 2.0 * GPU_WIDTH**3 / (time.perf_counter() - start)


def _measure_cached_share(files: Sequence[Path]) -> float:
    """Returns the share of the files' bytes that lie in the page cache, by probing a few random pages of each.

    A file on a file system that cannot tell counts as not cached.
    """
    cached = total = 0.0
    for path in files:
        size = path.stat().st_size
        total += size
        with path.open("rb") as file:
            # A probe may bring its page into the cache, so the next measurement must probe other pages.
            starts = [random.randrange(max(size, 1)) for _ in range(PAGES_PROBED)]
            cached += size * sum(_is_cached(file.fileno(), start) for start in starts) / PAGES_PROBED
    return cached / max(total, 1)


def _is_cached(descriptor: int, start: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(PAGE_BYTES)], start, os.RWF_NOWAIT) >= 0
    except OSError:  # the read would have to wait for the disk, or the file system cannot tell
        return False


def _measure_read_rate(path: Path) -> float:
    """Returns how many bytes a second are read from disk; what is read is dropped from the page cache first."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # not every file system can drop pages
            os.posix_fadvise(file.fileno(), 0, DISK_BYTES, os.POSIX_FADV_DONTNEED)
        start, count = time.perf_counter(), 0
        while count < DISK_BYTES and (piece := file.read(PIECE_BYTES)):
            count += len(piece)
        return max(count, 1) / (time.perf_counter() - start)


def _measure_write_rates(folder: Path, count: int) -> tuple[float, float]:
    """Returns how many bytes a second are written to disk, and how many a second the system provides as fresh memory.

    count: number of bytes to write. Fewer are written where the disk is nearly full, as it may be when an export resumes.
    """
    count = min(count, max(shutil.disk_usage(folder).free // 4, PIECE_BYTES))
    # The first write also makes the system provide memory for the page cache; the second one gets the same memory again.
    first, second = (_measure_writing(folder, count) for _ in range(2))
    return count / second, count / max(first - second, 1e-9 * first)


def _measure_writing(folder: Path, count: int) -> float:
    """Returns the seconds that writing and syncing `count` bytes takes."""
    piece = bytes(PIECE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(count // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - start
