"""Benchmark of quantization methods: ours and released peers, by bits, over three calibration seeds.

    python -m tools.peers.make_envs build/peers               # once: makes an environment for each peer
    python -m tools.bench.methods                             # runs all cells that are missing
    python -m tools.bench.methods --docs docs                 # the same, then writes docs/methods.md
    python -m tools.bench.methods --rows fast "modelopt*" --columns W8A8 --seeds 0
    python -m tools.bench.methods --model-dir build/tiny-hard # the same on another model, in tables of its own
    python -m tools.bench.methods --questions 10000 --rows fast full "llmcompressor: awq + gptq" --columns W3A16
    python -m tools.bench.methods --samples 8 --rows rtn fast full --columns W8A8 W4A16
    python -m tools.bench.methods --model-dir build/smol --data build/smol-data --rows rtn fast "modelopt*" --seeds 0
    python -m tools.bench.methods --model-dir build/smol --data build/smol-data --validation --extra --rows "fast: *"

A cell is one row (a method), one column (a scheme) and one calibration seed. Each result is appended to
build/bench/results.jsonl, so a run that was killed continues where it stopped; if a cell has several lines, the last one
counts. Each cell calibrates on one thread and reports processor seconds; other work on the same core lengthens them.

Without --data, the model is a tiny one, which is scored on answers to questions about scenes. With --data, it is the trained
one of `make smol`, and the folder that of `tools/smol/make_data.py`: it is scored on every token of text (trained.py).
With --validation it is calibrated on the set of seed 0 and scored on that of seed 1: settings are chosen there, not on the
test set.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.numerics.memory import HUGE_PAGES
from qvlm_export.engines.check.metrics import measure
from tools.bench import ours
from tools.bench.cells import trained
from tools.bench.cells.results import Cell, Results
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
from tools.bench.runtime import machine
from tools.bench.tables import write_tables
from tools.peers.common import HIDDEN, LOGITS
from tools.peers.rows import ALL, PeerRow
from tools.peers.rows import ROWS as PEER_ROWS
from tools.smol.scores import open_evaluation_set

TOOLS = Path(__file__).resolve().parents[1]
TINY = TOOLS.parent / "qvlm_export" / "tiny"
VALIDATION_SEED = 1
Metrics = dict[str, Any]


def score(reference: np.ndarray, logits: np.ndarray, samples: Sequence[Sample]) -> Metrics:
    """The metrics of the tables: mean KL in nats, SQNR of the logits in dB, top-1 agreement, exact match.

    reference and logits: [answer tokens of all samples, vocab]. exact_match is the share of questions whose every answer
    token has the largest logit, which is when greedy decoding gives the right answer.
    """
    sums = measure(reference, logits)
    top_tokens, correct, start = logits.argmax(axis=-1), [], 0
    for sample, (first, last) in zip(samples, answer_spans(samples), strict=True):
        end = start + last - first
        correct.append(bool((top_tokens[start:end] == sample.input_ids[sample.answer_start :]).all()))
        start = end
    return {
        "kl": sums.mean_kl,
        "sqnr_db": sums.sqnr_db,
        "top1": sums.agreement,
        "exact_match": sum(correct) / len(correct),
        "not_finite": sums.not_finite,
    }


@dataclass(frozen=True)
class Bench:
    """The model that is measured, the folders, and the evaluation set.

    data: folder of the calibration sets. evaluation: file of the evaluation set. questions, calibration_size: the sizes of
    both in samples. score: the metrics of what a cell stores. states: what that is: LOGITS or HIDDEN.
    """

    model: Path
    envs: Path
    model_hash: str
    results: Results
    data: Path
    evaluation: Path
    questions: int
    calibration_size: int
    score: Callable[[np.ndarray], Metrics]
    states: str = LOGITS

    def add_cell(self, cell: Cell, npy: Path) -> None:
        """Scores what a finished cell has stored (an .npy file, with its cost in a .json beside it) and adds the result."""
        cost = json.loads(npy.with_suffix(".json").read_text())
        scores = self.score(np.load(npy))
        self.add(cell, {**scores, **cost, "processor": machine()["processor"], "measured": time.strftime("%Y-%m-%d")})
        print(f"  {cell.row:34} {cell.column:6} seed {cell.seed}: {scores['kl']:.3g} nats, "
              f"top-1 {100 * scores['top1']:.2f} %, {cost['seconds']:.0f} s", flush=True)  # fmt: skip

    def add(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Adds the record of a cell to the results."""
        self.results.add(cell, {"model_hash": self.model_hash, **record})

    def add_float(self, metrics: Callable[[], Metrics]) -> None:
        """Adds what the float model itself scores, unless it is there."""
        cell = Cell(self.model.name, "float32", "float32", 0, self.questions)
        if self.results.get(cell, self.model_hash) is None:
            self.add(cell, metrics())


def hash_weights(model: Path) -> str:
    """Hash of the checkpoint's weights, which tells models of the same name apart."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]


def open_tiny(model: Path, work: Path, envs: Path, questions: int, calibration_size: int) -> Bench:
    """The benchmark of a tiny model; makes the data and the reference logits where they are missing."""
    model_hash, data = hash_weights(model), work / "data"
    make_data(model, data, questions, calibration_size)
    evaluation = evaluation_file(data, questions)
    samples = load_samples(evaluation)
    reference_file = work / f"reference-{model_hash}-{questions}.npy"
    if not reference_file.exists():
        np.save(reference_file, ours.reference_logits(model, samples))
    reference, results = np.load(reference_file), Results(work / "results.jsonl")

    def score_logits(logits: np.ndarray) -> Metrics:
        return score(reference, logits, samples)

    bench = Bench(model, envs, model_hash, results, data, evaluation, questions, calibration_size, score_logits)
    bench.add_float(lambda: {"kl": 0.0, "exact_match": score_logits(reference)["exact_match"]})
    return bench


def open_trained(model: Path, data: Path, work: Path, envs: Path, *, validation: bool = False) -> Bench:
    """The benchmark of the trained model. data: folder that tools/smol/make_data.py has written."""
    name = calibration_file(data, VALIDATION_SEED, CALIBRATION_SAMPLES).stem if validation else "test"
    found, results = open_evaluation_set(model, data, name), Results(work / "results.jsonl")

    def score_hidden(hidden: np.ndarray) -> Metrics:
        return trained.cell_metrics(found.score(hidden))

    model_hash, size = hash_weights(model), CALIBRATION_SAMPLES
    bench = Bench(
        model, envs, model_hash, results, data, data / f"{name}.npz", len(found.kinds), size, score_hidden, HIDDEN
    )  # fmt: skip
    bench.add_float(lambda: score_hidden(found.reference))
    return bench


def environment() -> dict[str, str]:
    """Environment variables of the measured processes: one thread, and no downloads."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_peer(bench: Bench, row: PeerRow, cells: Sequence[Cell]) -> None:
    """Runs each cell of a peer in its own process. A cell that fails is reported and left for the next run."""
    python = bench.envs / row.peer / "bin" / "python"
    if not python.exists():
        print(f"  {row.name}: {python} is not there; run python -m tools.peers.make_envs")
        return
    for cell in cells:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "cell.npy"
            options = {
                "--model": bench.model, "--calibration": calibration_file(bench.data, cell.seed, cell.samples),
                "--evaluation": bench.evaluation, "--column": cell.column, "--row": row.recipe, "--out": out,
                "--states": bench.states,
            }  # fmt: skip
            program = TOOLS / "peers" / f"peer_{row.peer}.py"
            command = [str(python), str(program), *(str(part) for pair in options.items() for part in pair)]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
            if done.returncode == 0:
                bench.add_cell(cell, out)
            else:
                print(f"  {cell.row} {cell.column} seed {cell.seed} failed: {done.stderr.strip().splitlines()[-1:]}")


def run_ours(bench: Bench, row: ours.OurRow, cells: Sequence[Cell]) -> None:
    """Runs all cells of a row in one process; each result is stored as soon as the process has printed its cell."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "tools.bench.ours", "--row", row.name, "--model", str(bench.model),
            "--data", str(bench.data), "--evaluation", str(bench.evaluation), "--out", scratch,
            "--samples", str(cells[0].samples), "--states", bench.states,
            "--cells", *(f"{c.column}/{c.seed}" for c in cells),
        ]  # fmt: skip
        variables = {**HUGE_PAGES, **environment()}  # as the commands set them
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for cell, line in zip(cells, process.stdout, strict=False):
                bench.add_cell(cell, Path(line.split(" ", 1)[1].strip()))
        if process.returncode:
            print(f"  {row.name} failed with exit code {process.returncode}")


def cells_to_run(
    bench: Bench, row: ours.OurRow | PeerRow, columns: Sequence[str], seeds: Sequence[int], extra: bool, redo: bool
) -> Iterator[Cell]:
    """The cells of a row that have no result yet, or all with `redo`; with `extra` also those of ablations."""
    applies = row.columns if extra else row.main
    for column in columns:
        for seed in seeds:
            cell = Cell(bench.model.name, row.name, column, seed, bench.questions, bench.calibration_size)
            if column in applies and (redo or bench.results.get(cell, bench.model_hash) is None):
                yield cell


def main() -> None:
    args = parse_args()
    rows = [r for r in (*ours.ROWS, *PEER_ROWS) if any(fnmatch.fnmatch(r.name, pattern) for pattern in args.rows)]
    if not rows:
        raise SystemExit(f"no row is called {' or '.join(args.rows)}")
    if args.data:
        bench = open_trained(args.model_dir, args.data, args.work, args.envs, validation=args.validation)
    else:
        bench = open_tiny(args.model_dir, args.work, args.envs, args.questions, args.samples)
    for row in rows:
        if cells := list(cells_to_run(bench, row, args.columns, args.seeds, args.extra, args.redo)):
            print(f"{row.name}: {len(cells)} cells", flush=True)
            (run_peer if isinstance(row, PeerRow) else run_ours)(bench, row, cells)  # type: ignore[operator]
    if args.docs:
        lines = {row.name: row.line for row in (*ours.ROWS, *PEER_ROWS)}
        records = bench.results.current()
        tiny = [record for record in records if not trained.is_trained(record)]
        write_tables(tiny, lines, args.docs, trained.make_section(records, lines))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=TINY)
    parser.add_argument("--data", type=Path, help="folder of tools/smol/make_data.py, for the model of make smol")
    parser.add_argument("--validation", action="store_true", help="with --data: score on the calibration set of seed 1")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names, or patterns as in file names")
    parser.add_argument("--columns", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--extra", action="store_true", help="also run ablations and the peers' weaker recipes")
    parser.add_argument(
        "--questions", type=int, default=QUESTIONS, help="size of the evaluation set; each has its own tables"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=CALIBRATION_SAMPLES,
        help="size of the calibration set; each has its own table",
    )
    parser.add_argument("--redo", action="store_true", help="run cells that have a result again")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--envs", type=Path, default=Path("build/peers"))
    parser.add_argument("--docs", type=Path, help="write methods.md and bench_methods.json into this folder")
    args = parser.parse_args()
    if args.data and (args.questions, args.samples) != (QUESTIONS, CALIBRATION_SAMPLES):
        parser.error("--data has sets of fixed sizes, so it goes without --questions and --samples")
    if args.validation:
        if not args.data:
            parser.error("--validation needs --data")
        args.seeds = [0]
    return args


if __name__ == "__main__":
    main()
