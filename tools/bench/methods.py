"""Compares quantization methods on the tiny LLaVA: ours and released peers, by bits, over three calibration seeds.

    python tools/peers/make_envs.py build/peers               # once: the peers, each in its own environment
    python -m tools.bench.methods                             # all that is missing, then docs/methods.md
    python -m tools.bench.methods --rows fast "modelopt*" --columns W8A8 --seeds 0
    python -m tools.bench.methods --model-dir build/tiny-hard # the same on another model; its tables are added
    python -m tools.bench.methods --questions 10000 --rows fast full "llmcompressor: awq + gptq" --columns W3A16
    python -m tools.bench.methods --samples 8 --rows rtn fast full --columns W8A8 W4A16

Every cell is one line of build/bench/results.jsonl, so a killed run goes on where it was; the last line of a cell counts.
Each cell calibrates with one thread and says what it cost in processor seconds, which other work does not lengthen.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.engines.check.metrics import measure
from tools.bench import ours
from tools.bench.data import (
    CALIBRATION_SAMPLES,
    QUESTIONS,
    SEEDS,
    answer_spans,
    calibration_file,
    evaluation_file,
    load_samples,
    make_data,
)
from tools.bench.tables import write_tables
from tools.peers.rows import ALL, PeerRow
from tools.peers.rows import ROWS as PEER_ROWS

TOOLS = Path(__file__).resolve().parents[1]
TINY = TOOLS.parent / "qvlm_export" / "tiny"


@dataclass(frozen=True)
class Cell:
    """What is measured once. model: name of its folder. questions: to judge on. samples: to calibrate on."""

    model: str
    row: str
    column: str
    seed: int
    questions: int = QUESTIONS
    samples: int = CALIBRATION_SAMPLES

    @staticmethod
    def of(record: Mapping[str, Any]) -> Cell:
        """The cell that a line of the results is of."""
        return Cell(**{own.name: record[own.name] for own in fields(Cell) if own.name in record})


class Results:
    """The cells measured so far, in a file that is only ever added to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[Cell, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("}"):  # a killed run may have left half a line
                    self._keep(json.loads(line))

    def _keep(self, record: dict[str, Any]) -> None:
        cell = Cell.of(record)
        self._records.pop(cell, None)  # the newest comes last
        self._records[cell] = record

    def get(self, cell: Cell, model_hash: str) -> dict[str, Any] | None:
        """The cell's record, None when there is none for this very model."""
        record = self._records.get(cell)
        return record if record is not None and record["model_hash"] == model_hash else None

    def add(self, cell: Cell, record: Mapping[str, Any]) -> None:
        whole = {**vars(cell), **record}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The first newline ends what a killed run may have left.
        broken = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write(("\n" if broken else "") + json.dumps(whole) + "\n")
        self._keep(whole)

    def current(self) -> list[dict[str, Any]]:
        """All cells of each model as it was when last measured."""
        newest = {record["model"]: record["model_hash"] for record in self._records.values()}
        return [record for record in self._records.values() if record["model_hash"] == newest[record["model"]]]


def score(reference: np.ndarray, logits: np.ndarray, samples: Sequence[Sample]) -> dict[str, float]:
    """What the table shows. Logits [answer tokens of all samples, vocab].

    exact_match: share of questions whose every answer token is the most likely one, which is what greedy decoding needs.
    """
    sums = measure(reference, logits)
    best, right, at = logits.argmax(axis=-1), [], 0
    for sample, (first, last) in zip(samples, answer_spans(samples), strict=True):
        right.append(bool((best[at : at + last - first] == sample.input_ids[sample.answer_start :]).all()))
        at += last - first
    return {
        "kl": sums.mean_kl,
        "sqnr_db": sums.sqnr_db,
        "top1": sums.agreement,
        "exact_match": sum(right) / len(right),
        "not_finite": sums.not_finite,
    }


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and the model that is measured. samples: to judge on; calibrated: how many to calibrate on."""

    model: Path
    work: Path
    envs: Path
    model_hash: str
    results: Results
    reference: np.ndarray
    samples: Sequence[Sample]
    calibrated: int

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def evaluation(self) -> Path:
        return evaluation_file(self.data, len(self.samples))

    def keep(self, cell: Cell, npy: Path) -> None:
        """Scores a finished cell's files into the results."""
        cost = json.loads(npy.with_suffix(".json").read_text())
        found = score(self.reference, np.load(npy), self.samples)
        self.results.add(cell, {"model_hash": self.model_hash, **found, **cost, "measured": time.strftime("%Y-%m-%d")})
        print(f"  {cell.row:34} {cell.column:6} seed {cell.seed}: {found['kl']:.3g} nats, {found['sqnr_db']:.1f} dB, "
              f"{cost['seconds']:.0f} s", flush=True)  # fmt: skip


def open_bench(model: Path, work: Path, envs: Path, counts: tuple[int, int] = (QUESTIONS, CALIBRATION_SAMPLES)) -> Bench:
    """Makes data and reference logits where they are missing. counts: of questions, and of samples to calibrate on."""
    questions, calibrated = counts
    model_hash = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]
    make_data(model, work / "data", questions, calibrated)
    samples = load_samples(evaluation_file(work / "data", questions))
    stored = work / f"reference-{model_hash}-{questions}.npy"
    if not stored.exists():
        np.save(stored, ours.reference_logits(model, samples))
    reference = np.load(stored)
    bench = Bench(model, work, envs, model_hash, Results(work / "results.jsonl"), reference, samples, calibrated)
    float_cell = Cell(model.name, "float32", "float32", 0, questions)
    if bench.results.get(float_cell, model_hash) is None:
        found = score(reference, reference, samples)
        bench.results.add(float_cell, {"model_hash": model_hash, "kl": 0.0, "exact_match": found["exact_match"]})
    return bench


def environment() -> dict[str, str]:
    """One thread, and nothing is fetched."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_peer(bench: Bench, row: PeerRow, cells: Sequence[Cell]) -> None:
    """One process a cell. A cell that fails is named and left out; the next run tries it again."""
    python = bench.envs / row.peer / "bin" / "python"
    if not python.exists():
        print(f"  {row.name}: {python} is not there; run tools/peers/make_envs.py")
        return
    for cell in cells:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "cell.npy"
            given = {
                "--model": bench.model, "--calibration": calibration_file(bench.data, cell.seed, cell.samples),
                "--evaluation": bench.evaluation, "--column": cell.column, "--row": row.recipe, "--out": out,
            }  # fmt: skip
            program = TOOLS / "peers" / f"peer_{row.peer}.py"
            command = [str(python), str(program), *(str(part) for pair in given.items() for part in pair)]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
            if done.returncode == 0:
                bench.keep(cell, out)
            else:
                print(f"  {cell.row} {cell.column} seed {cell.seed} failed: {done.stderr.strip().splitlines()[-1:]}")


def run_ours(bench: Bench, row: ours.OurRow, cells: Sequence[Cell]) -> None:
    """One process for all cells of the row; each is kept as soon as it is written."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "tools.bench.ours", "--row", row.name, "--model", str(bench.model),
            "--data", str(bench.data), "--evaluation", str(bench.evaluation), "--out", scratch,
            "--samples", str(cells[0].samples), "--cells", *(f"{c.column}/{c.seed}" for c in cells),
        ]  # fmt: skip
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for cell, line in zip(cells, process.stdout, strict=False):
                bench.keep(cell, Path(line.split(" ", 1)[1].strip()))
        if process.returncode:
            print(f"  {row.name} failed with exit code {process.returncode}")


def wanted(
    bench: Bench, row: ours.OurRow | PeerRow, columns: Sequence[str], seeds: Sequence[int], extra: bool, redo: bool
) -> Iterator[Cell]:
    """The cells of a row that are to be run."""
    applies = row.columns if extra else row.main
    for column in columns:
        for seed in seeds:
            cell = Cell(bench.model.name, row.name, column, seed, len(bench.samples), bench.calibrated)
            if column in applies and (redo or bench.results.get(cell, bench.model_hash) is None):
                yield cell


def main() -> None:
    args = parse_args()
    rows = [r for r in (*ours.ROWS, *PEER_ROWS) if any(fnmatch.fnmatch(r.name, pattern) for pattern in args.rows)]
    if not rows:
        raise SystemExit(f"no row is called {' or '.join(args.rows)}")
    bench = open_bench(args.model_dir, args.work, args.envs, (args.questions, args.samples))
    for row in rows:
        if cells := list(wanted(bench, row, args.columns, args.seeds, args.extra, args.redo)):
            print(f"{row.name}: {len(cells)} cells", flush=True)
            (run_peer if isinstance(row, PeerRow) else run_ours)(bench, row, cells)  # type: ignore[operator]
    if args.docs:
        lines = {row.name: row.line for row in (*ours.ROWS, *PEER_ROWS)}
        write_tables(bench.results.current(), lines, args.docs)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=TINY)
    parser.add_argument("--rows", nargs="+", default=["*"], help="names, or patterns as in file names")
    parser.add_argument("--columns", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--extra", action="store_true", help="also ablations and the peers' weaker recipes")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="to judge on; tables of another number are added")
    parser.add_argument("--samples", type=int, default=CALIBRATION_SAMPLES, help="to calibrate on; another table, too")
    parser.add_argument("--redo", action="store_true", help="run cells again that are there already")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--envs", type=Path, default=Path("build/peers"))
    parser.add_argument("--docs", type=Path, help="write methods.md and bench_methods.json into this folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
