"""What is checked before any work: the output path, the disk, and how much will be written."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibrate.errors import UserError
from calibrate.scheme import LinearScheme

PLAN_OVERHEAD_BYTES = 8 * 2**20  # kernels and program text of a TensorRT-RTX plan, whatever the model's size


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights: as float16, and as planned."""

    float16_bytes: int
    planned_bytes: int

    @property
    def compression(self) -> float:
        return self.float16_bytes / self.planned_bytes


def estimate_sizes(shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, LinearScheme]) -> Sizes:
    """Sizes of the tensors `shapes` (name -> shape) when the linears of `plan` are quantized."""
    float16 = planned = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        float16 += 2 * count
        scheme = plan.get(name.removesuffix(".weight"))
        if scheme is None:
            planned += 2 * count
        else:
            scale_bytes = 2 if scheme.weight_bits == 4 else 4
            planned += count * scheme.weight_bits // 8 + scale_bytes * math.prod(scheme.scale_shape((shape[0], shape[1])))
    return Sizes(float16, planned)


def disk_needed(sizes: Sizes, calibrates: bool, builds: bool) -> int:
    """Bytes that an export has on disk at its peak: calibrated checkpoint, ONNX data, plans."""
    copies = 1 + int(calibrates) + int(builds)
    return copies * sizes.planned_bytes + (2 * PLAN_OVERHEAD_BYTES if builds else 0)


def check_out(out: Path) -> None:
    """Raises UserError when `out` is not a .plan path in a folder that can be written."""
    if out.suffix != ".plan":
        raise UserError(f"--out {out}: must end in .plan; the other files are named after it")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be written ({error.strerror}); choose another") from error


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raises UserError when the disk of `folder` has too little room."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {needed_bytes / 2**30:.1f} GiB are needed on this disk and {free / 2**30:.1f} GiB are free; "
            "free some, or write --out to another disk"
        )
