"""Data-parallel evaluation under torchrun: processes share the questions of a task, and torch.distributed gathers answers.

Uses the gloo backend, so that it works without GPUs, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

from qvlm_export.evaluation.tasks.task import Answer

# How long the fastest process waits for the slowest one before the run fails.
GATHER_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """The processes of a run. rank: the number of this process, from 0. size: the number of processes."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """Returns this process's rank and the number of processes, from torchrun's environment; a single process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return World(int(os.environ["RANK"]), size) if size > 1 else World()


def use_own_gpu() -> None:
    """Restricts each process of a machine to a GPU of its own if there are several; does nothing without torchrun.

    Sets CUDA_VISIBLE_DEVICES, which torch, TensorRT and ONNX Runtime all respect, so call it before any of them uses CUDA.
    """
    if world().size == 1:
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(os.environ.get("LOCAL_RANK", "0")) % len(visible)]


def gather(answers: dict[str, Answer]) -> dict[str, Answer] | None:
    """Waits for all processes; returns the answers of all of them, by question id, in the first, and None in the others."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=GATHER_TIMEOUT)
    try:
        process = World(dist.get_rank(), dist.get_world_size())
        parts: list[dict[str, Answer]] | None = [{} for _ in range(process.size)] if process.rank == 0 else None
        dist.gather_object(answers, parts)
    finally:
        dist.destroy_process_group()
    if parts is None:
        return None
    return {question_id: answer for part in parts for question_id, answer in part.items()}
