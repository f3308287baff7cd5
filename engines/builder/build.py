"""Builds TensorRT engines in a child process, so that a crash of the parser does not end the export.

ONNX files with their shape profiles go in, plans (TensorRT engine files) and a report on each come out. The child process is
engines/builder/worker.py; the two exchange JSON.
"""

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

# input name -> smallest, most likely and largest shape, as in TensorRT's optimization profiles
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class BuildJob:
    """One engine to build: the path of its ONNX file, the path its plan is written to, and the shapes it must accept."""

    onnx: str
    plan: str
    profile: Profile


@dataclass(frozen=True)
class BuildReport:
    """A finished build.

    plan: path of the written file. seconds: duration of the build. plan_bytes: size of the file. weights_bytes: weight
    memory that TensorRT reports, None when it reports none. peak_bytes: largest resident memory of the build process so far.
    """

    plan: str
    seconds: float
    plan_bytes: int
    weights_bytes: int | None
    peak_bytes: int


def vision_profile(config: ModelConfig, limits: Limits) -> Profile:
    """Returns the shapes of pixel_values [images, 3, R, R], from one image to `limits.max_images`."""
    side = config.vision.image_size
    return {"pixel_values": ((1, 3, side, side), (1, 3, side, side), (limits.max_images, 3, side, side))}


def language_profile(config: ModelConfig, limits: Limits) -> Profile:
    """Returns the shapes of all inputs of the language graph: ids, positions, image embeddings and caches.

    One profile serves prefill and decode, because two profiles would store the weights twice.
    """
    text, batch, length = config.text, limits.max_batch, limits.max_length
    usual_length = min(length, config.most_image_tokens + 64)
    usual_rows, most_rows = config.vision.tokens_per_image, limits.max_images * config.vision.tokens_per_image
    if config.tiles is not None:
        usual_rows, most_rows = min(length, config.most_image_tokens), batch * length
    tokens = ((1, 1), (1, usual_length), (batch, length))
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
        "input_ids": tokens,
        "position_ids": tokens,
        "write_index": ((1,), (1,), (batch,)),
        "image_embeds": (
            (1, text.hidden_size),
            (usual_rows, text.hidden_size),
            (most_rows, text.hidden_size),
        ),
    }
    for i in range(text.num_layers):
        for part in ("key", "value"):
            cache = (text.num_kv_heads, length, text.head_dim)
            shapes[f"past_key_values.{i}.{part}"] = ((1, *cache), (1, *cache), (batch, *cache))
    return shapes


def build_engines(
    backend: Backend,
    jobs: list[BuildJob],
    progress: Callable[[str, float], None],
    finished: Callable[[BuildReport], None] = lambda _: None,
) -> list[BuildReport]:
    """Builds all jobs one after another and returns their reports, in the same order.

    progress(plan, fraction): called as a plan is built, with 1.0 once it is written. finished(report): called as soon as a
    plan is on disk.

    Raises UserError with TensorRT's own message when parsing or building fails, and when the process dies.
    """
    if not jobs:
        return []
    request = {"module": backend.module, "targets": backend.targets, "jobs": [asdict(job) for job in jobs]}
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
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        for line in process.stdout:
            message = _parse_message(line)
            if "progress" in message:
                progress(message["plan"], message["progress"])
            elif "report" in message:
                reports.append(BuildReport(**message["report"]))
                finished(reports[-1])
                progress(reports[-1].plan, 1.0)  # TensorRT announces six steps and counts five
            elif "error" in message:
                raise UserError(message["error"])
    if process.returncode != 0 or len(reports) != len(jobs):
        failed_file = Path(jobs[min(len(reports), len(jobs) - 1)].onnx).name
        raise UserError(
            f"{failed_file}: the {backend.name} build process ended with code {process.returncode}"
            + ("; it was killed, most likely for memory" if process.returncode == -9 else "; its words are above")
        )
    return reports


def _parse_message(line: str) -> dict[str, Any]:
    """Returns a JSON line of the worker as a dict; an empty one for anything else, which some library has printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
