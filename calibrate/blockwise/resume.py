"""Resumable calibration: the work folder from which a run that was killed continues.

Every finished block has an entry with the name of its shard, its record, and the shapes of its outputs, which are the inputs
of the next block. An entry is written once all of these are on disk, so a block with an entry is complete. Tensors that are
measured before the first block, such as sensitivities, are files of their own beside the entries.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qvlm_export.calibrate.blockwise.activation_cache import (
    CachedActivations,
    cache_activations,
    open_cached_activations,
    zeros_of_cached_shapes,
)
from qvlm_export.calibrate.checkpoint.files import clear_leftovers, read_json, write_json
from qvlm_export.calibrate.checkpoint.schema import LARGEST, Bytes, FileName, check_schema, schema_of
from qvlm_export.calibrate.errors import UserError

MEMORY_BYTES = 2 * 2**30  # of activations, by default
TENSORS_SUFFIX = ".safetensors"
# Several tensors under each name.
NamedTensors = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class FinishedBlock:
    """The entry of a finished block.

    outputs: as `CachedActivations.describe` returns them. record: for the calibration record.
    """

    name: str
    shard: str
    outputs: list[dict[str, Any]]
    record: dict[str, Any]


@dataclass(frozen=True)
class _StoredOutput:
    """The description of one output, as JSON holds it."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"]
    offset: Bytes


@dataclass(frozen=True)
class _StoredEntry:
    """An entry as JSON holds it, with the number of the block; what an entry is checked against when it is read."""

    number: Bytes
    name: str
    shard: FileName
    outputs: tuple[_StoredOutput, ...]
    record: Mapping[str, Any]


_ENTRY_SCHEMA = TypeAdapter(schema_of(_StoredEntry, {"shape": (0, LARGEST)}))


class CalibrationWork:
    """The work folder of one calibration, with what an interrupted run left in it.

    entries: the finished blocks in the order they were computed. narrow: whether outputs are stored in 16 bits a value
    instead of 32. memory_bytes: how much of a block's outputs stays in memory; the rest is on disk only. Raises UserError
    when an entry is damaged.
    """

    def __init__(self, folder: Path, *, narrow: bool = False, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder, self._narrow, self._memory_bytes = folder / "blocks", narrow, memory_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._saving = self._folder / "saving"
        clear_leftovers(self._folder)
        shutil.rmtree(self._saving, ignore_errors=True)
        self.entries = _read_entries(self._folder)
        self._by_name = {entry.name: number for number, entry in enumerate(self.entries)}

    def load_or_compute(self, name: str, compute: Callable[[], NamedTensors]) -> NamedTensors:
        """The tensors saved under `name`; where there are none, what `compute` returns, which is then saved."""
        saved = self.load(name)
        return self.save(name, compute()) if saved is None else saved

    def load(self, name: str) -> NamedTensors | None:
        """The tensors saved under `name`, or None; UserError when their file is damaged."""
        path = self._tensors_path(name)
        if not path.exists():
            return None
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: is damaged ({error}); delete {self._folder.parent} and start over") from error
        tensors: NamedTensors = {}
        for key in sorted(stored):
            tensors.setdefault(key.rpartition("/")[0], []).append(stored[key])
        return tensors

    def save(self, name: str, tensors: NamedTensors) -> NamedTensors:
        """Saves the tensors under `name`, for a later run to load, and returns them."""
        flat = {f"{key}/{n:08}": tensor for key, parts in tensors.items() for n, tensor in enumerate(parts)}
        # The library writes through a hidden file beside this one, which a kill leaves here, for the next run to clear.
        temporary = self._saving / self._tensors_path(name).name
        temporary.parent.mkdir(exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in flat.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self._tensors_path(name))
        return tensors

    def delete(self, name: str) -> None:
        """Deletes the tensors saved under `name`, if there are any."""
        self._tensors_path(name).unlink(missing_ok=True)

    def delete_all(self, prefix: str) -> None:
        """Deletes the tensors saved under all names that start with `prefix`."""
        for path in self._folder.glob(f"{prefix}*{TENSORS_SUFFIX}"):
            path.unlink()

    def _tensors_path(self, name: str) -> Path:
        return self._folder / f"{name}{TENSORS_SUFFIX}"

    def load_outputs(self, name: str) -> Sequence[torch.Tensor] | None:
        """The outputs of the finished block `name`, or zeros if no later block needs them; None when it is not finished."""
        number = self._by_name.get(name)
        if number is None:
            return None
        description, path = self.entries[number].outputs, self._activations_path(number)
        return open_cached_activations(description, path) if path.exists() else zeros_of_cached_shapes(description)

    def store_outputs(self, outputs: Iterable[torch.Tensor]) -> CachedActivations:
        """Stores the outputs of the block that computes; returns them as the next block has to read them."""
        path = self._activations_path(len(self.entries))
        return cache_activations(outputs, path, narrow=self._narrow, memory_bytes=self._memory_bytes)

    def finish(self, entry: FinishedBlock, needed: Collection[str] = ()) -> None:
        """Writes the entry of a block whose shard and outputs are written, and deletes the outputs of earlier blocks.

        needed: names of the blocks whose outputs stay.
        """
        number = len(self.entries)
        write_json(self._folder / f"{number:04}.json", {"number": number, **vars(entry)})
        self._by_name[entry.name] = number
        self.entries.append(entry)
        for earlier in range(number):
            if self.entries[earlier].name not in needed:
                self._activations_path(earlier).unlink(missing_ok=True)

    def _activations_path(self, number: int) -> Path:
        return self._folder / f"{number:04}.activations"


def count_finished_blocks(folder: Path) -> int:
    """How many blocks are finished in a work folder; UserError when an entry is damaged."""
    return len(_read_entries(folder / "blocks"))


def holds_work(folder: Path) -> bool:
    """Whether a work folder holds a finished block or saved tensors, which would have to be computed again without it."""
    return count_finished_blocks(folder) > 0 or any((folder / "blocks").glob(f"*{TENSORS_SUFFIX}"))


def _read_entries(folder: Path) -> list[FinishedBlock]:
    entries: list[FinishedBlock] = []
    while (path := folder / f"{len(entries):04}.json").exists():
        remedy = f"delete {folder.parent} and start over"
        content = read_json(path, "readable: it is damaged", remedy)
        check_schema(_ENTRY_SCHEMA, content, path, "the entry", remedy)
        entries.append(FinishedBlock(*(content[key] for key in ("name", "shard", "outputs", "record"))))
    return entries
