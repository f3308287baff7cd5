"""Cost model of an export: how long each stage will take, and how much memory it will need.

The amounts of work, such as floating-point operations and bytes, are counted from the model and the calibration set and
divided by the rates that `machine.py` measures. Constants that cannot be measured quickly are fitted to whole exports.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.blockwise.resume import MEMORY_BYTES
from qvlm_export.calibrate.calibrators.block_cost import Cost
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import Backend
from qvlm_export.engines.builder.rate import build_rate
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.pipeline.preparation.machine import BUILT_BYTES, Machine

# Resident memory once torch, transformers and onnx are imported and the processor is loaded.
PROGRAM_BYTES = 700 * 2**20
CUDA_BYTES = 700 * 2**20  # taken on a GPU by CUDA and its libraries, before the first tensor is made
# Build time of TensorRT-RTX 1.7 on one core: seconds for the start and for each quantized linear, beside the time for the
# weights. INT4 weights take the measured time, others this share of the time of as many bytes of INT4. Fitted to models of
# four sizes (tiny, 1B, 7B and 13B) on two processors.
BUILD_SECONDS, BUILD_SECONDS_PER_LINEAR, BUILD_OTHER = 0.5, 0.02, 0.4
BUILD_MEASURED_BYTES = 2**28  # from this size of an export's weights on, builds take so long that measuring the rate pays
# Memory of the build beside PROGRAM_BYTES, in multiples of the plan's size (2.4 to 2.9 observed: mapped weights count as
# resident until the system needs their pages).
BUILD_COPIES = 2.5
GRAPH_SECONDS_PER_GIB = 1.0  # making the graphs, beside packing and writing; fitted to the same four models
CHECK_SECONDS_PER_GIB = 0.5  # reading a plan back, beside hashing it
# Memory estimates are right to about a tenth, so a machine is refused only when it has less than nine tenths of one.
SURELY = 0.9
# Time for one element of a block's activations in norms, activation functions, softmax, hooks and copies, as the number of
# BLAS operations that take as long. Fitted to the time that `fast` exports of models of width 768, 2048 and 4096 took beyond
# what is counted otherwise.
ELEMENT_FLOPS = 1300.0


@dataclass(frozen=True)
class Estimate:
    """The expected time and memory of an export.

    seconds: by stage. floor_seconds: the least that calibration takes, for its matrix products and factorizations alone, on
    an otherwise idle machine. memory_bytes, build_memory_bytes: the largest resident memory of the export process and of the
    build process; the latter is 0 when no engine is built.
    """

    seconds: dict[str, float]
    floor_seconds: float
    memory_bytes: int
    build_memory_bytes: int

    def in_words(self) -> str:
        """Returns the estimate as one line for people."""
        parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in self.seconds.items())
        memory = f"{self.memory_bytes / 2**30:.1f} GiB"
        if self.build_memory_bytes:
            memory += f", the engine build {self.build_memory_bytes / 2**30:.1f} GiB"
        return f"estimated: {format_duration(sum(self.seconds.values()))} ({parts}); memory {memory}"


def estimate(
    cost: Cost,
    linears: Mapping[str, LinearScheme],
    parts: Mapping[str, Sizes],
    largest_bytes: int,
    machine: Machine,
    *,
    builds: bool,
) -> Estimate:
    """Returns how long an export takes on `machine`, and how much memory it needs.

    cost: of calibration. linears: the quantized linears with their schemes. parts: sizes of the weights by part.
    largest_bytes: size of the largest tensor in float16. builds: whether engines are built.
    """
    sizes = total_sizes(parts)
    seconds: dict[str, float] = {}
    factoring = cost.single_flops / machine.single_flops + cost.shared_flops / machine.shared_flops
    floor = cost.flops / machine.flops + factoring
    if linears:
        forwards = floor + ELEMENT_FLOPS * cost.elements / machine.shared_flops
        rounding = cost.rounded / (machine.rounded * machine.threads)
        read_bytes = (1 - machine.cached_share) * sizes.float16_bytes
        transfers = read_bytes / machine.read_bytes + sizes.quantized_bytes / machine.written_bytes
        # Each thread makes the system provide memory of its own.
        transfers += min(machine.free_bytes, read_bytes + sizes.quantized_bytes) / (
            machine.allocated_bytes * machine.threads
        )
        seconds["calibrate"] = (forwards + rounding) / machine.cpu_share + transfers
    gib = sizes.quantized_bytes / 2**30
    packing = 2 * sizes.int4_bytes / (machine.packed * machine.threads) + GRAPH_SECONDS_PER_GIB * gib
    seconds["graph"] = packing / machine.cpu_share + sizes.quantized_bytes / machine.written_bytes
    if builds:
        weights_bytes = sizes.int4_bytes + BUILD_OTHER * (sizes.quantized_bytes - sizes.int4_bytes)
        fixed = BUILD_SECONDS + BUILD_SECONDS_PER_LINEAR * len(linears)
        seconds["build"] = (fixed + weights_bytes / machine.built_bytes) / machine.cpu_share
    copies = 1 if builds else 1 + int(bool(linears))  # graphs and calibrated checkpoint are hashed while engines are built
    reading = CHECK_SECONDS_PER_GIB * gib if builds else 0.0
    seconds["check"] = (copies * sizes.quantized_bytes / machine.hashed_bytes + reading) / machine.cpu_share
    memory = memory_needed(cost, largest_bytes)
    if builds:  # the check maps the plan into memory; the system reclaims its pages when it needs them
        memory = max(memory, PROGRAM_BYTES + max(part.quantized_bytes for part in parts.values()))
    build = build_memory(parts) if builds else 0
    return Estimate({name: round(value, 1) for name, value in seconds.items()}, round(floor, 1), memory, build)


def measure_build_rate(backend: Backend, parts: Mapping[str, Sizes]) -> float:
    """Returns how many bytes of INT4 weights the backend builds in a second.

    For small exports, and where no engines are built, that is a constant, as measuring would not pay.
    """
    sizes = total_sizes(parts)
    if backend.module is None or sizes.quantized_bytes < BUILD_MEASURED_BYTES:
        return BUILT_BYTES
    return build_rate(backend, int4=True) if sizes.int4_bytes else BUILD_OTHER * build_rate(backend, int4=False)


def build_memory(parts: Mapping[str, Sizes]) -> int:
    """Returns the resident bytes of the process that builds the engines, one after the other."""
    return PROGRAM_BYTES + int(BUILD_COPIES * max(part.quantized_bytes for part in parts.values()))


def check_memory(calibrating_bytes: int, building_bytes: int) -> None:
    """Raises UserError when this machine surely has too little memory for calibration or for the engine build."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    requirements = (
        ("calibration", calibrating_bytes, "take fewer --samples, or --effort rtn"),
        ("the engine build", building_bytes, "export with --backend onnx here, and build on a larger machine"),
    )
    for step, needed, cure in requirements:
        if SURELY * needed > installed:
            raise UserError(
                f"{step} needs about {needed / 2**30:.1f} GiB of memory and this machine has {installed / 2**30:.1f} GiB; "
                f"{cure}"
            )


def total_sizes(sizes: Mapping[str, Sizes]) -> Sizes:
    """Returns the sizes of all parts together."""
    return Sizes(*(sum(getattr(s, f) for s in sizes.values()) for f in ("float16_bytes", "quantized_bytes", "int4_bytes")))


def largest_bytes(config: ModelConfig) -> int:
    """Returns the size of the largest tensor in float16."""
    return max(2 * math.prod(shape) for shape in expected_shapes(config).values())


def activation_memory_bytes(memory_gib: float | None, effort: str, cost: Cost, largest: int) -> int:
    """Returns how many bytes of a block's inputs the activation cache may hold in memory, and as many of its outputs.

    What exceeds them goes to disk.
    memory_gib: of `--memory`. largest: size in bytes of the largest tensor in float16.
    Raises UserError when `memory_gib` is less than the export needs without the activation cache.
    """
    if memory_gib is None:
        return MEMORY_BYTES
    needed = memory_needed(cost, largest)
    if memory_gib * 2**30 < needed:
        raise UserError(
            f"--memory {memory_gib:g}: --effort {effort} needs about {needed / 2**30:.1f} GiB for this model and these "
            "samples; give more, or fewer --samples, or --effort rtn"
        )
    return int(memory_gib * 2**30 - needed) // 2  # half for the inputs of a block, half for its outputs


def memory_needed(cost: Cost, largest_bytes: int) -> int:
    """Returns the resident bytes of the export process without the activation cache."""
    return PROGRAM_BYTES + max(cost.memory_bytes, 3 * largest_bytes)


def check_gpu_memory(needed_bytes: int) -> None:
    """Raises UserError when the GPU has less free memory than the largest block's calibration needs."""
    free, needed = torch.cuda.mem_get_info()[0], needed_bytes + CUDA_BYTES
    if free < needed:
        raise UserError(
            f"--device cuda: about {needed / 2**30:.1f} GiB of GPU memory are needed and {free / 2**30:.1f} GiB are free; "
            "give fewer --samples, --effort rtn, or --device cpu"
        )


def format_duration(seconds: float) -> str:
    """Returns a duration as text, such as 40 s, 12 min or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
