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

from qvlm_export.calibrate.blockwise.activation_cache import Activations, shapes_only, store, stored
from qvlm_export.calibrate.checkpoint.calibrated import write_json
from qvlm_export.calibrate.errors import UserError

MEMORY_BYTES = 2 * 2**30  # of activations, when nobody says
MEASURED = ".safetensors"
Named = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Entry:
    """A finished block. outputs: described as `Activations` does. record: for the calibration record."""

    name: str
    shard: str
    outputs: list[dict[str, Any]]
    record: dict[str, Any]


class Work:
    """Finished blocks in the order they were computed. Made once a calibration; reads what an earlier one left.

    narrow: outputs are kept in 16 bits. memory_bytes: beyond so many the outputs of a block lie on disk only.
    """

    def __init__(self, folder: Path, *, narrow: bool = False, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._narrow, self._memory_bytes = folder / "blocks", narrow, memory_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self.entries = _read_entries(self._folder)
        self._by_name = {entry.name: number for number, entry in enumerate(self.entries)}

    def remembered(self, name: str, compute: Callable[[], Named]) -> Named:
        """What `compute` returns, or returned when an earlier run called it for this `name`."""
        recalled = self.recalled(name)
        return self.remember(name, compute()) if recalled is None else recalled

    def recalled(self, name: str) -> Named | None:
        """What was remembered for this `name`, None when nothing was."""
        path = self._measured(name)
        if not path.exists():
            return None
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: is damaged ({error}); delete {self._folder.parent} and begin anew") from error
        found: Named = {}
        for key in sorted(stored):
            found.setdefault(key.rpartition("/")[0], []).append(stored[key])
        return found

    def remember(self, name: str, measured: Named) -> Named:
        """Keeps it on disk for a run to come; returns it."""
        path = self._measured(name)
        temporary = path.with_name(path.name + ".tmp")
        flat = {f"{key}/{n:08}": tensor for key, tensors in measured.items() for n, tensor in enumerate(tensors)}
        save_file({key: tensor.contiguous() for key, tensor in flat.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return measured

    def forget(self, name: str) -> None:
        """The opposite."""
        self._measured(name).unlink(missing_ok=True)

    def forget_all(self, start: str) -> None:
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
        return stored(described, path) if path.exists() else shapes_only(described)

    def keep(self, outputs: Iterable[torch.Tensor]) -> Activations:
        """Keeps what the block being computed returns; hands back what is to be gone on with."""
        path = self._activations(len(self.entries))
        return store(outputs, path, narrow=self._narrow, memory_bytes=self._memory_bytes)

    def finish(self, entry: Entry, needed: Collection[str] = ()) -> None:
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


def count_finished(folder: Path) -> int:
    """How many blocks of a work folder are finished."""
    return len(_read_entries(folder / "blocks"))


def holds_work(folder: Path) -> bool:
    """Whether a work folder holds anything that would have to be computed again."""
    return count_finished(folder) > 0 or any((folder / "blocks").glob(f"*{MEASURED}"))


def _read_entries(folder: Path) -> list[Entry]:
    entries: list[Entry] = []
    while (path := folder / f"{len(entries):04}.json").exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entry = Entry(*(content[key] for key in ("name", "shard", "outputs", "record")))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error!r}); delete {folder.parent} and begin anew") from error
        entries.append(entry)
    return entries
