"""The cells of the methods benchmark that were measured, in a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tools.bench.data import CALIBRATION_SAMPLES, QUESTIONS


@dataclass(frozen=True)
class Cell:
    """One measurement.

    model: name of its folder. questions: size of the evaluation set. samples: size of the calibration set.
    """

    model: str
    row: str
    column: str
    seed: int
    questions: int = QUESTIONS
    samples: int = CALIBRATION_SAMPLES

    @staticmethod
    def of(record: Mapping[str, Any]) -> Cell:
        """The cell to which a record of the results belongs."""
        return Cell(**{field.name: record[field.name] for field in fields(Cell) if field.name in record})


class Results:
    """The results of all cells measured so far, in a JSONL file that is only appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Cell, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("}"):  # a killed run may have left half a line
                    self._store(json.loads(line))

    def _store(self, record: dict[str, Any]) -> None:
        cell = Cell.of(record)
        self._records.pop(cell, None)  # reinserted below, so that the newest comes last
        self._records[cell] = record

    def get(self, cell: Cell, model_hash: str) -> dict[str, Any] | None:
        """The record of the cell, or None if there is none for a model with this hash."""
        record = self._records.get(cell)
        return record if record is not None and record["model_hash"] == model_hash else None

    def add(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Appends the record of a cell; it replaces an earlier one."""
        full_record = {**vars(cell), **record}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # If a killed run has left half a line, it is ended here.
        broken = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write(("\n" if broken else "") + json.dumps(full_record) + "\n")
        self._store(full_record)

    def current(self) -> list[dict[str, Any]]:
        """The records that belong to the newest hash of each model."""
        newest = {record["model"]: record["model_hash"] for record in self._records.values()}
        return [record for record in self._records.values() if record["model_hash"] == newest[record["model"]]]
