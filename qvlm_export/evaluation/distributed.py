"""Several processes that share the questions of one set: torchrun starts them, torch.distributed (gloo) joins them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

from qvlm_export.evaluation.tasks.task import Answer

# The slowest part may take this much longer than the fastest before the run is given up.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """rank: of this process, from 0. size: how many there are."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """As torchrun says in the environment; one process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return World(int(os.environ["RANK"]), size) if size > 1 else World()


def use_own_gpu() -> None:
    """Gives each process of a machine a GPU of its own where there are several; nothing without torchrun.

    By the environment, which torch, TensorRT and ONNX Runtime all heed, so before any of them touches CUDA.
    """
    if world().size == 1:
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(os.environ.get("LOCAL_RANK", "0")) % len(visible)]


def gather(answers: dict[str, Answer]) -> dict[str, Answer] | None:
    """The answers of all processes in the first one, None in the others. Waits for all of them."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        here = World(dist.get_rank(), dist.get_world_size())
        parts: list[dict[str, Answer]] | None = [{} for _ in range(here.size)] if here.rank == 0 else None
        dist.gather_object(answers, parts)
    finally:
        dist.destroy_process_group()
    if parts is None:
        return None
    return {one: answer for part in parts for one, answer in part.items()}
