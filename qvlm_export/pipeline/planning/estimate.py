"""Seconds and memory of an export, before it begins: what is to be done by what this machine does in a second."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.blockwise.resume import MEMORY_BYTES
from qvlm_export.calibrate.calibrators.cost import Cost
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import Backend
from qvlm_export.engines.builder.rate import build_rate
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.pipeline.planning.machine import BUILT_BYTES, Machine

# Resident once torch, transformers and onnx are imported and the processor is loaded.
PROGRAM_BYTES = 700 * 2**20
CUDA_BYTES = 700 * 2**20  # of CUDA and its libraries on a GPU, before a tensor is made
# TensorRT-RTX 1.7 on one core: seconds for the start and for each planned linear, beside what a byte of INT4 takes by a rate
# that is measured; what is not INT4 takes this share of that. Fitted to tiny, 1B, 7B and 13B on two processors.
BUILD_SECONDS, BUILD_SECONDS_PER_LINEAR, BUILD_OTHER = 0.5, 0.02, 0.4
BUILD_MEASURED_BYTES = 2**28  # of a plan whose building takes so long that measuring pays
# Its memory in sizes of the plan, beside PROGRAM_BYTES (2.4 to 2.9: mapped weights count until somebody needs their pages).
BUILD_COPIES = 2.5
GRAPH_SECONDS_PER_GIB = 1.0  # beside packing and writing, by the same four sizes
CHECK_SECONDS_PER_GIB = 0.5  # of a plan that is read back, beside its hash
# Estimates of memory are right to a tenth or so: a machine is too small when even nine tenths are more than it has.
SURELY = 0.9
# Norms, activation functions, softmax, hooks and copies beside the products of a block: BLAS's operations in the time of one
# (fitted: what exports of 768, 2048 and 4096 wide models took with `fast` beyond what is counted otherwise).
ELEMENT_FLOPS = 1300.0


@dataclass(frozen=True)
class Estimate:
    """seconds: by stage. memory_bytes: the most resident, of the export itself and of the build process.

    floor_seconds: that calibration takes at least, for its products and factorizations alone, if nothing else runs here.
    """

    seconds: dict[str, float]
    floor_seconds: float
    memory_bytes: int
    build_memory_bytes: int

    def in_words(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        if self.build_memory_bytes:
            memory += f", the engine build {self.build_memory_bytes / 2**30:.1f} GiB"
        return f"estimated: {duration(sum(self.seconds.values()))} ({parts}); memory {memory}"


def estimate(
    cost: Cost,
    linears: Mapping[str, LinearScheme],
    parts: Mapping[str, Sizes],
    largest_bytes: int,
    machine: Machine,
    *,
    builds: bool,
) -> Estimate:
    """cost: of calibration; parts: of the weights; largest_bytes: of the largest tensor, in float16."""
    sizes = total_sizes(parts)
    seconds: dict[str, float] = {}
    factoring = cost.single_flops / machine.single_flops + cost.shared_flops / machine.shared_flops
    floor = cost.flops / machine.flops + factoring
    if linears:
        forwards = floor + ELEMENT_FLOPS * cost.elements / machine.shared_flops
        rounding = cost.rounded / (machine.rounded * machine.threads)
        fetched = (1 - machine.cached) * sizes.float16_bytes
        moving = fetched / machine.read_bytes + sizes.planned_bytes / machine.written_bytes
        # Each thread finds memory of its own.
        moving += min(machine.free_bytes, fetched + sizes.planned_bytes) / (machine.found_bytes * machine.threads)
        seconds["calibrate"] = (forwards + rounding) / machine.share + moving
    gib = sizes.planned_bytes / 2**30
    packing = 2 * sizes.int4_bytes / (machine.packed * machine.threads) + GRAPH_SECONDS_PER_GIB * gib
    seconds["graph"] = packing / machine.share + sizes.planned_bytes / machine.written_bytes
    if builds:
        laid_out = sizes.int4_bytes + BUILD_OTHER * (sizes.planned_bytes - sizes.int4_bytes)
        fixed = BUILD_SECONDS + BUILD_SECONDS_PER_LINEAR * len(linears)
        seconds["build"] = (fixed + laid_out / machine.built_bytes) / machine.share
    copies = 1 if builds else 1 + int(bool(linears))  # graphs and calibrated checkpoint are hashed while engines are built
    reading = CHECK_SECONDS_PER_GIB * gib if builds else 0.0
    seconds["check"] = (copies * sizes.planned_bytes / machine.hashed_bytes + reading) / machine.share
    memory = memory_needed(cost, largest_bytes)
    if builds:  # the check maps the plan that was built; the machine takes these pages back when it needs them
        memory = max(memory, PROGRAM_BYTES + max(part.planned_bytes for part in parts.values()))
    build = build_memory(parts) if builds else 0
    return Estimate({name: round(value, 1) for name, value in seconds.items()}, round(floor, 1), memory, build)


def build_bytes(backend: Backend, parts: Mapping[str, Sizes]) -> float:
    """Bytes of INT4 weights that the backend builds in a second; measured where more than a second hangs on it."""
    sizes = total_sizes(parts)
    if backend.module is None or sizes.planned_bytes < BUILD_MEASURED_BYTES:
        return BUILT_BYTES
    return build_rate(backend, int4=True) if sizes.int4_bytes else BUILD_OTHER * build_rate(backend, int4=False)


def build_memory(parts: Mapping[str, Sizes]) -> int:
    """Resident bytes of the process that builds the engines, one after another."""
    return PROGRAM_BYTES + int(BUILD_COPIES * max(part.planned_bytes for part in parts.values()))


def check_memory(calibrating_bytes: int, building_bytes: int) -> None:
    """Raises UserError when this machine has surely too little memory."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = (
        ("calibration", calibrating_bytes, "take fewer --samples, or --effort rtn"),
        ("the engine build", building_bytes, "export with --backend onnx here, and build on a larger machine"),
    )
    for what, needed, cure in wanted:
        if SURELY * needed > there:
            raise UserError(
                f"{what} needs about {needed / 2**30:.1f} GiB of memory and this machine has {there / 2**30:.1f} GiB; {cure}"
            )


def total_sizes(sizes: Mapping[str, Sizes]) -> Sizes:
    """Of all parts together."""
    return Sizes(*(sum(getattr(s, f) for s in sizes.values()) for f in ("float16_bytes", "planned_bytes", "int4_bytes")))


def largest_bytes(config: ModelConfig) -> int:
    """Of the largest tensor, in float16."""
    return max(2 * math.prod(shape) for shape in expected_shapes(config).values())


def activations_bytes(memory_gib: float | None, effort: str, cost: Cost, largest: int) -> int:
    """How many bytes of what flows between two blocks lie in memory, beside the disk.

    Raises UserError when --memory is less than everything else needs.
    """
    if memory_gib is None:
        return MEMORY_BYTES
    needed = memory_needed(cost, largest)
    if memory_gib * 2**30 < needed:
        raise UserError(
            f"--memory {memory_gib:g}: --effort {effort} needs about {needed / 2**30:.1f} GiB for this model and these "
            "samples; give more, or fewer --samples, or --effort rtn"
        )
    return int(memory_gib * 2**30 - needed) // 2  # of a block's inputs and of its outputs


def memory_needed(cost: Cost, largest_bytes: int) -> int:
    """Resident bytes of the export itself, without activations beyond those of the block being computed."""
    return PROGRAM_BYTES + max(cost.memory_bytes, 3 * largest_bytes)


def check_gpu_memory(needed_bytes: int) -> None:
    """Raises UserError when the GPU has less free memory than the largest block's calibration needs."""
    free, needed = torch.cuda.mem_get_info()[0], needed_bytes + CUDA_BYTES
    if free < needed:
        raise UserError(
            f"--device cuda: about {needed / 2**30:.1f} GiB of GPU memory are needed and {free / 2**30:.1f} GiB are free; "
            "give fewer --samples, --effort rtn, or --device cpu"
        )


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
