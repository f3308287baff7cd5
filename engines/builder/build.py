"""Builds engines in a process of its own, because a parser crash must not take the export with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import Backend
from qvlm_export.engines.config import Limits, ModelConfig

# input name -> smallest, most likely, largest shape
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class BuildJob:
    """One engine: its ONNX file, where the plan goes, and the shapes it must accept."""

    onnx: str
    plan: str
    profile: Profile


@dataclass(frozen=True)
class BuildReport:
    """seconds and peak_bytes (resident) of the build; weights_bytes as TensorRT counts them, None when it did not say."""

    plan: str
    seconds: float
    plan_bytes: int
    weights_bytes: int | None
    peak_bytes: int


def vision_profile(config: ModelConfig, limits: Limits) -> Profile:
    side = config.vision.image_size
    return {"pixel_values": ((1, 3, side, side), (1, 3, side, side), (limits.max_images, 3, side, side))}


def language_profile(config: ModelConfig, limits: Limits) -> Profile:
    """One profile for prefill and decode: two would store the weights twice."""
    text, b, length = config.text, limits.max_batch, limits.max_length
    usual = min(length, config.most_image_tokens + 64)
    usual_rows, most_rows = config.vision.tokens_per_image, limits.max_images * config.vision.tokens_per_image
    if config.tiles is not None:
        usual_rows, most_rows = min(length, config.most_image_tokens), b * length
    tokens = ((1, 1), (1, usual), (b, length))
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
        "input_ids": tokens,
        "position_ids": tokens,
        "write_index": ((1,), (1,), (b,)),
        "image_embeds": (
            (1, text.hidden_size),
            (usual_rows, text.hidden_size),
            (most_rows, text.hidden_size),
        ),
    }
    for i in range(text.num_layers):
        for part in ("key", "value"):
            cache = (text.num_kv_heads, length, text.head_dim)
            shapes[f"past_key_values.{i}.{part}"] = ((1, *cache), (1, *cache), (b, *cache))
    return shapes


def build_engines(
    backend: Backend,
    jobs: list[BuildJob],
    progress: Callable[[str, float], None],
    finished: Callable[[BuildReport], None] = lambda _: None,
) -> list[BuildReport]:
    """Builds all jobs one after another; progress(plan, fraction of this plan done), 1.0 once it is written.

    finished: called with each plan's report as soon as the plan is on disk.

    Raises UserError with TensorRT's own words when parsing or building fails, or when the process dies.
    """
    if not jobs:
        return []
    order = {"module": backend.module, "targets": backend.targets, "jobs": [asdict(job) for job in jobs]}
    command = [
        sys.executable,
        "-P",
        "-m",
        "qvlm_export.engines.builder.worker",
    ]  # -P: import nothing from the working directory
    reports: list[BuildReport] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the build process has no pipes")
        process.stdin.write(json.dumps(order))
        process.stdin.close()
        for line in process.stdout:
            message = _message(line)
            if "progress" in message:
                progress(message["plan"], message["progress"])
            elif "report" in message:
                reports.append(BuildReport(**message["report"]))
                finished(reports[-1])
                progress(reports[-1].plan, 1.0)  # TensorRT announces six steps and counts five
            elif "error" in message:
                raise UserError(message["error"])
    if process.returncode != 0 or len(reports) != len(jobs):
        failed = Path(jobs[min(len(reports), len(jobs) - 1)].onnx).name
        raise UserError(
            f"{failed}: the {backend.name} build process ended with code {process.returncode}"
            + ("; it was killed, most likely for memory" if process.returncode == -9 else "; its words are above")
        )
    return reports


def _message(line: str) -> dict[str, Any]:
    """One JSON line of the worker; anything else that a library prints is passed over."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
