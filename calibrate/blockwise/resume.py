"""The work folder of a calibration: what a killed run goes on from. torch.

For every finished block an entry: the shard with its tensors, its record, and its outputs, which are the inputs of the block
behind it. The entry is written when all of that is on disk, so what has an entry is complete. What is measured before the
first block is kept beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qvlm_export.calibrate.blockwise.activation_cache import (
    CachedActivations,
    cache_activations,
    open_cached_activations,
    zeros_of_cached_shapes,
)
from qvlm_export.calibrate.checkpoint.calibrated import write_json
from qvlm_export.calibrate.errors import UserError

MEMORY_BYTES = 2 * 2**30  # of activations, when nobody says
MEASURED = ".safetensors"
NamedTensors = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class FinishedBlock:
    """A finished block. outputs: described as `CachedActivations` does. record: for the calibration record."""

    name: str
    shard: str
    outputs: list[dict[str, Any]]
    record: dict[str, Any]


class CalibrationWork:
    """Finished blocks in the order they were computed. Made once a calibration; reads what an earlier one left.

    narrow: outputs are kept in 16 bits. memory_bytes: beyond so many the outputs of a block lie on disk only.
    """

    def __init__(self, folder: Path, *, narrow: bool = False, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._narrow, self._memory_bytes = folder / "blocks", narrow, memory_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self.entries = _read_entries(self._folder)
        self._by_name = {entry.name: number for number, entry in enumerate(self.entries)}

    def load_or_compute(self, name: str, compute: Callable[[], NamedTensors]) -> NamedTensors:
        """What `compute` returns, or returned when an earlier run called it for this `name`."""
        recalled = self.load(name)
        return self.save(name, compute()) if recalled is None else recalled

    def load(self, name: str) -> NamedTensors | None:
        """What was remembered for this `name`, None when nothing was."""
        path = self._measured(name)
        if not path.exists():
            return None
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: is damaged ({error}); delete {self._folder.parent} and begin anew") from error
        found: NamedTensors = {}
        for key in sorted(stored):
            found.setdefault(key.rpartition("/")[0], []).append(stored[key])
        return found

    def save(self, name: str, measured: NamedTensors) -> NamedTensors:
        """Keeps it on disk for a run to come; returns it."""
        path = self._measured(name)
        temporary = path.with_name(path.name + ".tmp")
        flat = {f"{key}/{n:08}": tensor for key, tensors in measured.items() for n, tensor in enumerate(tensors)}
        save_file({key: tensor.contiguous() for key, tensor in flat.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return measured

    def delete(self, name: str) -> None:
        """The opposite."""
        self._measured(name).unlink(missing_ok=True)

    def delete_all(self, start: str) -> None:
        """The opposite, of all names that start so."""
        for path in self._folder.glob(f"{start}*{MEASURED}"):
            path.unlink()

    def _measured(self, name: str) -> Path:
        return self._folder / f"{name}{MEASURED}"

    def outputs(self, name: str) -> Sequence[torch.Tensor] | None:
        """What the finished block `name` returned, None when it is not finished. Zeros where nobody needs them any more."""
        number = self._by_name.get(name)
        if number is None:
            return None
        described, path = self.entries[number].outputs, self._activations(number)
        return open_cached_activations(described, path) if path.exists() else zeros_of_cached_shapes(described)

    def store_outputs(self, outputs: Iterable[torch.Tensor]) -> CachedActivations:
        """Keeps what the block being computed returns; hands back what is to be gone on with."""
        path = self._activations(len(self.entries))
        return cache_activations(outputs, path, narrow=self._narrow, memory_bytes=self._memory_bytes)

    def finish(self, entry: FinishedBlock, needed: Collection[str] = ()) -> None:
        """Notes a finished block, whose shard and outputs are written. Outputs of earlier blocks go, but those `needed`."""
        number = len(self.entries)
        write_json(self._folder / f"{number:04}.json", {"number": number, **vars(entry)})
        self._by_name[entry.name] = number
        self.entries.append(entry)
        for earlier in range(number):
            if self.entries[earlier].name not in needed:
                self._activations(earlier).unlink(missing_ok=True)

    def _activations(self, number: int) -> Path:
        return self._folder / f"{number:04}.activations"


def count_finished_blocks(folder: Path) -> int:
    """How many blocks of a work folder are finished."""
    return len(_read_entries(folder / "blocks"))


def holds_work(folder: Path) -> bool:
    """Whether a work folder holds anything that would have to be computed again."""
    return count_finished_blocks(folder) > 0 or any((folder / "blocks").glob(f"*{MEASURED}"))


def _read_entries(folder: Path) -> list[FinishedBlock]:
    entries: list[FinishedBlock] = []
    while (path := folder / f"{len(entries):04}.json").exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entry = FinishedBlock(*(content[key] for key in ("name", "shard", "outputs", "record")))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error!r}); delete {folder.parent} and begin anew") from error
        entries.append(entry)
    return entries
