"""The benchmark's cells as tables: docs/methods.md for people, docs/bench_methods.json for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.data import CALIBRATION_SAMPLES, QUESTIONS
from tools.peers.rows import ALL

WHOLES = ("fast", "full")  # the rows that ablations change one thing of
METRICS = ("kl", "sqnr_db", "top1", "exact_match", "seconds", "peak_bytes")

HEAD = """# Quantization methods compared

`python -m tools.bench.methods --docs docs` runs what is missing and writes this page (`python tools/peers/make_envs.py
build/peers` first makes the peers' environments). Every row calibrates on the same 64 questions and is judged on the answer
tokens of 1,000 questions about scenes that neither training nor calibration saw, against the float32 checkpoint: KL in nats
a token / SQNR of the logits in dB. Medians over {seeds} calibration seeds, or over the number in brackets. KL's standard
error is 15 to 30 %, so differences below that are none; a table of rows that are close to each other is judged on more
questions (`--questions 10000`), calibrated as before.

All linears but lm_head, symmetric; weights of 3 and 4 bits in groups of 64, of 6 and 8 bits a scale per output channel;
activations one static scale per tensor. Everything is simulated in torch in float32. One thread; seconds are the
processor's and leave out loading; memory is the peak of the process while it calibrates, torch and the model included.
Seconds of one day can be compared with each other; on another day it may have been another processor. Last bits that differ
between processors move the KL of one seed by up to a factor of two, as a code on the edge falls to the other side.

Peers run as released, each in its own environment with the same torch: a line shows the recipe that did best in that
column. modelopt multiplies the inputs of *every* linear by smoothing factors at run time, also where they cannot be folded
into the layer before (after GELU, across grouped heads); ours and llmcompressor's are folded and cost nothing. A recipe
"by hand" is not one that the package offers in one pass.

`tiny` is the model that ships; its planted outliers are undone by folding. `tiny-hard` (`python -m
tools.tiny.plant_hard_outliers`, then `--model-dir build/tiny-hard`) computes the same with outliers that folding cannot
undo:
after GELU, in the residual stream of a few tokens, and sheared value heads.

What the tables show, and why: [study.md](study.md).
"""


@dataclass(frozen=True)
class Median:
    """One row, column and model over its seeds."""

    model: str
    row: str
    line: str
    column: str
    seeds: int
    values: Mapping[str, float]
    measured: str  # the day, of the newest seed


def medians(records: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> list[Median]:
    """Medians over seeds of every metric, for the rows in `lines` (row -> the line it belongs to)."""
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if record["row"] in lines:
            cells.setdefault((record["model"], record["row"], record["column"]), []).append(record)
    return [
        Median(
            model,
            row,
            lines[row],
            column,
            len(found),
            {m: statistics.median(r[m] for r in found) for m in METRICS},
            max(r["measured"] for r in found),
        )
        for (model, row, column), found in cells.items()
    ]


def unchanged(cells: Sequence[Median]) -> list[Median]:
    """Without the rows that are another with one thing changed, which have tables of their own."""
    return [cell for cell in cells if not cell.row.startswith(tuple(f"{whole}: " for whole in WHOLES))]


def best_of(cells: Sequence[Median], model: str, line: str, column: str) -> Median | None:
    """The row of a line with the least median KL; rows that were run on fewer seeds than another do not count."""
    fitting = [c for c in cells if (c.model, c.line, c.column) == (model, line, column)]
    most = max((c.seeds for c in fitting), default=0)
    return min((c for c in fitting if c.seeds == most), key=lambda c: c.values["kl"], default=None)


def number(value: float) -> str:
    """Three digits, as short as they can be written."""
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:.2g}"


def summary_table(cells: Sequence[Median], model: str, lines: Sequence[str], seeds: int) -> list[str]:
    """KL / SQNR of the best row of each line."""
    table = [f"| | {' | '.join(ALL)} |", "|---" * (len(ALL) + 1) + "|"]
    for line in lines:
        entries = []
        for column in ALL:
            cell = best_of(cells, model, line, column)
            if cell is None:
                entries.append("–")
                continue
            fewer = "" if cell.seeds == seeds else f" ({cell.seeds})"
            entries.append(f"{number(cell.values['kl'])} / {round(cell.values['sqnr_db'])}{fewer}")
        if set(entries) != {"–"}:
            table.append(f"| {line} | {' | '.join(entries)} |")
    return table


def samples_tables(records: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> list[str]:
    """KL / SQNR by the number of samples, of rows that were calibrated on more than one number of them: a table a column."""
    counts = sorted({r.get("samples", CALIBRATION_SAMPLES) for r in records})
    if len(counts) < 2:
        return []
    cells = {n: medians([r for r in records if r.get("samples", CALIBRATION_SAMPLES) == n], lines) for n in counts}
    usual = {n: {(c.row, c.column): c for c in found} for n, found in cells.items()}
    pairs = list(dict.fromkeys(pair for n in counts if n != CALIBRATION_SAMPLES for pair in usual[n]))
    text: list[str] = []
    for column in (c for c in ALL if any(c == own for _, own in pairs)):
        text += ["", f"| {column} | {' | '.join(f'{n} samples' for n in counts)} |", "|---" * (len(counts) + 1) + "|"]
        for row in (row for row in lines if (row, column) in pairs):
            found = [usual[n].get((row, column)) for n in counts]
            entries = [f"{number(c.values['kl'])} / {c.values['sqnr_db']:.1f}" if c else "–" for c in found]
            text.append(f"| {row} | {' | '.join(entries)} |")
    return text


def ablation_table(records: Sequence[Mapping[str, Any]], model: str, whole: str) -> list[str]:
    """KL / SQNR of the row `whole` and of every row that is it with one thing changed, on the seeds that both have."""
    cells: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        if record["model"] == model and (record["row"] == whole or record["row"].startswith(f"{whole}: ")):
            cells.setdefault(record["row"], {}).setdefault(record["column"], {})[record["seed"]] = record
    changed = [row for row in cells if row != whole]
    columns = [column for column in ALL if any(column in cells[row] for row in changed)]
    if not columns or whole not in cells:
        return []
    seeds = {c: set.intersection(*(set(cells[row][c]) for row in (whole, *changed) if c in cells[row])) for c in columns}
    heads = [f"{column}, seed {' '.join(map(str, sorted(seeds[column])))}" for column in columns]
    table = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for row in (whole, *changed):
        entries = []
        for column in columns:
            found = [cells[row][column][seed] for seed in sorted(seeds[column])] if column in cells[row] else []
            kl, db = (statistics.median(r[m] for r in found) if found else 0.0 for m in ("kl", "sqnr_db"))
            entries.append(f"{number(kl)} / {db:.1f}" if found else "–")
        table.append(f"| {row.removeprefix(f'{whole}: ')} | {' | '.join(entries)} |")
    return table


def detail_table(cells: Sequence[Median], model: str, column: str) -> list[str]:
    """Every row of a column with everything that was measured, best first."""
    table = [
        "| row | seeds | KL, nats | SQNR, dB | top-1, % | exact match, % | seconds | peak, MiB | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    fitting = [c for c in cells if (c.model, c.column) == (model, column)]
    for cell in sorted(fitting, key=lambda c: c.values["kl"]):
        v = cell.values
        table.append(
            f"| {cell.row} | {cell.seeds} | {number(v['kl'])} | {v['sqnr_db']:.1f} | {100 * v['top1']:.2f} | "
            f"{100 * v['exact_match']:.1f} | {v['seconds']:.0f} | {v['peak_bytes'] / 2**20:.0f} | {cell.measured} |"
        )
    return table


def write_tables(records: Sequence[Mapping[str, Any]], lines: Mapping[str, str], folder: Path) -> None:
    """Writes methods.md and bench_methods.json. lines: row -> the line of the first table it belongs to, in order."""
    every = [record for record in records if record.get("questions", QUESTIONS) == QUESTIONS]
    usual = [record for record in records if record.get("samples", CALIBRATION_SAMPLES) == CALIBRATION_SAMPLES]
    larger = [record for record in usual if record not in every]
    records = [record for record in usual if record in every]
    cells = medians(records, lines)
    whole = unchanged(cells)
    models = list(dict.fromkeys(c.model for c in cells))
    seeds = max((c.seeds for c in cells), default=0)
    text = HEAD.format(seeds=seeds).splitlines()
    for model in models:
        exact = next(r["exact_match"] for r in records if r["model"] == model and r["row"] == "float32")
        text += ["", f"## {model}", "", f"The float32 checkpoint answers {100 * exact:.1f} % of the questions exactly.", ""]
        text += summary_table(whole, model, list(dict.fromkeys(lines.values())), seeds)
        for questions in sorted({r["questions"] for r in larger if r["model"] == model}):
            again = unchanged(medians([r for r in larger if r["questions"] == questions], lines))
            text += ["", f"### {model}, judged on {questions:,} questions", ""]
            text += summary_table(again, model, list(dict.fromkeys(lines.values())), seeds)
        if tables := samples_tables([r for r in every if r["model"] == model], lines):
            text += ["", f"### {model}, calibrated on fewer samples", *tables]
        for questions in sorted({r.get("questions", QUESTIONS) for r in usual if r["model"] == model}):
            judged = [r for r in usual if r.get("questions", QUESTIONS) == questions]
            for changed in WHOLES:
                if ablation := ablation_table(judged, model, changed):
                    head = f"### {model}, one part of `{changed}` changed, judged on {questions:,} questions"
                    text += ["", head, "", *ablation]
        for column in ALL:
            if any((c.model, c.column) == (model, column) for c in whole):
                text += ["", f"### {model}, {column}", "", *detail_table(whole, model, column)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "methods.md").write_text("\n".join(text) + "\n")
    versions = {p: v for r in records if r["row"] in lines for p, v in r["versions"].items()}
    settings = {f"{r['row']}, {r['column']}": r["settings"] for r in records if r["row"] in lines}
    content = {"versions": versions, "settings": settings, "medians": [vars(c) | {"values": dict(c.values)} for c in cells]}
    (folder / "bench_methods.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
