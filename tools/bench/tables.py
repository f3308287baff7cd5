"""Tables of the methods benchmark: docs/methods.md to read, docs/bench_methods.json for programs.

Used by `python -m tools.bench.methods --docs docs`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.data import CALIBRATION_SAMPLES, QUESTIONS
from tools.peers.rows import ALL

WHOLES = ("fast", "full")  # the rows that have ablations, in which one setting is changed
METRICS = ("kl", "sqnr_db", "top1", "exact_match", "seconds", "peak_bytes")

HEAD = """# Quantization methods compared

`python -m tools.bench.methods --docs docs` runs the cells that are missing and writes this page. (`python -m
tools.peers.make_envs build/peers` first makes the environments of the peers, the released tools compared with.)

**Task of the tiny models.** Every row is calibrated on the same 64 questions and evaluated against the float32 checkpoint,
on the answer tokens of 1,000 questions about scenes that neither training nor calibration saw. Entries are KL divergence in
nats a token / SQNR of the logits in dB: medians over {seeds} calibration seeds, or over the number of seeds in brackets.
KL's standard error is 15 to 30 %, so smaller differences mean nothing. Rows that are close to each other are also evaluated
on more questions (`--questions 10000`), with the same calibration.

**Quantization.** All linears except lm_head, symmetric. Weights of 3 and 4 bits have scales for groups of 64, weights of
6 and 8 bits a scale per output channel; activations have one static scale per tensor. All rows are fake-quantized in
torch in float32.

**Cost.** One thread. Seconds are CPU seconds without loading; memory is the peak of the process during calibration, torch
and the model included. Seconds are comparable only if they were measured together: another day's may be those of another
processor, and where two threads share a core, other work on it makes them up to twice as many. The last bits of results
differ between processors and change the KL of one seed by up to a factor of two, as a value that lies between two codes is
rounded the other way.

**Peers** run as released, each in its own environment with the same torch. A line shows the recipe that did best in that
column. modelopt multiplies the inputs of *every* linear by smoothing factors at run time, also where they cannot be
folded into the preceding layer (after GELU, across grouped heads); the factors of ours and of llmcompressor are folded
and cost nothing. A recipe "by hand" is not one that the package offers in one pass.

**Models.** `smol` ([smol.md](smol.md)) was trained on English and is scored on all text, as its section says. `tiny` is the
model that ships; equalization undoes its planted outliers. `tiny-hard` (`python -m
tools.tiny.plant_hard_outliers`, then `--model-dir build/tiny-hard`) computes the same function with outliers that
equalization cannot undo: after GELU, in the residual stream of a few tokens, and in sheared value heads.

What the tables show, and why: [study.md](study.md).
"""


@dataclass(frozen=True)
class Section:
    """Lines of the page on models that are scored in another way, their records and the medians of these."""

    text: Sequence[str] = ()
    records: Sequence[Mapping[str, Any]] = ()
    cells: Sequence[Median] = ()


@dataclass(frozen=True)
class Median:
    """Median metrics of one row, column and model over the calibration seeds."""

    model: str
    row: str
    line: str
    column: str
    seeds: int
    values: Mapping[str, float]
    measured: str  # date of the newest seed


def medians(
    records: Sequence[Mapping[str, Any]], lines: Mapping[str, str], metrics: Sequence[str] = METRICS
) -> list[Median]:
    """Medians of every metric over the seeds.

    lines: row -> the line of the summary table to which it belongs; other rows are left out. metrics: keys of the records.
    """
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
            len(runs),
            {m: statistics.median(r[m] for r in runs) for m in metrics},
            max(r["measured"] for r in runs),
        )
        for (model, row, column), runs in cells.items()
    ]


def without_ablations(cells: Sequence[Median]) -> list[Median]:
    """The cells that are not of ablations, which have tables of their own."""
    return [cell for cell in cells if not cell.row.startswith(tuple(f"{whole}: " for whole in WHOLES))]


def best_of(cells: Sequence[Median], model: str, line: str, column: str) -> Median | None:
    """The cell of a line with the smallest median KL, among those with the most seeds; None if there is none."""
    candidates = [c for c in cells if (c.model, c.line, c.column) == (model, line, column)]
    most = max((c.seeds for c in candidates), default=0)
    return min((c for c in candidates if c.seeds == most), key=lambda c: c.values["kl"], default=None)


def number(value: float) -> str:
    """Two significant digits; in scientific notation below 0.01."""
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:.2g}"


def summary_table(cells: Sequence[Median], model: str, lines: Sequence[str], seeds: int) -> list[str]:
    """Lines of a Markdown table: KL / SQNR of the best row of each line, one column for each scheme."""
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
    """Markdown tables, one for each scheme: KL / SQNR over the size of the calibration set.

    They have the rows that were calibrated on another number of samples than the default, and are empty if there are none.
    """
    counts = sorted({r.get("samples", CALIBRATION_SAMPLES) for r in records})
    if len(counts) < 2:
        return []
    cells = {n: medians([r for r in records if r.get("samples", CALIBRATION_SAMPLES) == n], lines) for n in counts}
    by_size = {n: {(c.row, c.column): c for c in of_size} for n, of_size in cells.items()}
    pairs = list(dict.fromkeys(pair for n in counts if n != CALIBRATION_SAMPLES for pair in by_size[n]))
    text: list[str] = []
    for column in (c for c in ALL if any(c == measured for _, measured in pairs)):
        text += ["", f"| {column} | {' | '.join(f'{n} samples' for n in counts)} |", "|---" * (len(counts) + 1) + "|"]
        for row in (row for row in lines if (row, column) in pairs):
            medians_of_row = [by_size[n].get((row, column)) for n in counts]
            entries = [f"{number(c.values['kl'])} / {c.values['sqnr_db']:.1f}" if c else "–" for c in medians_of_row]
            text.append(f"| {row} | {' | '.join(entries)} |")
    return text


def ablation_table(records: Sequence[Mapping[str, Any]], model: str, whole: str) -> list[str]:
    """Lines of a Markdown table: KL / SQNR of the row `whole` and of its ablations, on the seeds that all of them have.

    It is empty if there are no ablations.
    """
    cells: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        if record["model"] == model and (record["row"] == whole or record["row"].startswith(f"{whole}: ")):
            cells.setdefault(record["row"], {}).setdefault(record["column"], {})[record["seed"]] = record
    ablations = [row for row in cells if row != whole]
    columns = [column for column in ALL if any(column in cells[row] for row in ablations)]
    if not columns or whole not in cells:
        return []
    seeds = {c: set.intersection(*(set(cells[row][c]) for row in (whole, *ablations) if c in cells[row])) for c in columns}
    heads = [f"{column}, seed {' '.join(map(str, sorted(seeds[column])))}" for column in columns]
    table = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for row in (whole, *ablations):
        entries = []
        for column in columns:
            runs = [cells[row][column][seed] for seed in sorted(seeds[column])] if column in cells[row] else []
            kl, db = (statistics.median(r[m] for r in runs) if runs else 0.0 for m in ("kl", "sqnr_db"))
            entries.append(f"{number(kl)} / {db:.1f}" if runs else "–")
        table.append(f"| {row.removeprefix(f'{whole}: ')} | {' | '.join(entries)} |")
    return table


def detail_table(cells: Sequence[Median], model: str, column: str) -> list[str]:
    """Lines of a Markdown table: every row of a scheme with all metrics, in the order of KL."""
    table = [
        "| row | seeds | KL, nats | SQNR, dB | top-1, % | exact match, % | seconds | peak, MiB | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    of_column = [c for c in cells if (c.model, c.column) == (model, column)]
    for cell in sorted(of_column, key=lambda c: c.values["kl"]):
        v = cell.values
        table.append(
            f"| {cell.row} | {cell.seeds} | {number(v['kl'])} | {v['sqnr_db']:.1f} | {100 * v['top1']:.2f} | "
            f"{100 * v['exact_match']:.1f} | {v['seconds']:.0f} | {v['peak_bytes'] / 2**20:.0f} | {cell.measured} |"
        )
    return table


def without_prefix(records: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> list[str]:
    """Lines that say which models have rows of ours that were measured when these had no prefix; empty if none has."""
    ours = [r for r in records if r["row"] in lines and "qvlm-export" in r["versions"]]
    models = dict.fromkeys(f"`{r['model']}`" for r in ours if "prefix" not in r["settings"])
    if not models:
        return []
    return [
        "",
        "**Earlier version.** Our rows are calibrated and run behind the prefix of the chat template, as exports are by",
        "default, and leave inputs float that 8 bits cannot hold. Those in `bench_results.jsonl` that have no `prefix`",
        f"among their settings were measured before that, without both. They are of {' and '.join(models)}.",
        "Those of `qvlm` are without the visual-encoder optimization, too. Tables of one part changed compare such",
        "ablations with `fast` and `full` as they were measured last: a row there also holds what changed in between.",
    ]


def write_tables(
    records: Sequence[Mapping[str, Any]], lines: Mapping[str, str], folder: Path, first: Section | None = None
) -> None:
    """Writes methods.md and bench_methods.json.

    records: of the tiny models. lines: row -> its line of the summary table, in the order of the table. first: the section
    of other models, before those of the tiny ones.
    """
    first = first or Section()
    usual_questions = [record for record in records if record.get("questions", QUESTIONS) == QUESTIONS]
    usual_samples = [record for record in records if record.get("samples", CALIBRATION_SAMPLES) == CALIBRATION_SAMPLES]
    larger = [record for record in usual_samples if record not in usual_questions]
    records = [record for record in usual_samples if record in usual_questions]
    cells = medians(records, lines)
    main_cells = without_ablations(cells)
    models = list(dict.fromkeys(c.model for c in cells))
    seeds = max((c.seeds for c in cells), default=0)
    text = [*HEAD.format(seeds=seeds).splitlines(), *without_prefix(records, lines), "", *first.text]
    for model in models:
        exact = next(r["exact_match"] for r in records if r["model"] == model and r["row"] == "float32")
        text += ["", f"## {model}", "", f"The float32 checkpoint answers {100 * exact:.1f} % of the questions exactly.", ""]
        text += summary_table(main_cells, model, list(dict.fromkeys(lines.values())), seeds)
        for questions in sorted({r["questions"] for r in larger if r["model"] == model}):
            of_size = without_ablations(medians([r for r in larger if r["questions"] == questions], lines))
            text += ["", f"### {model}, judged on {questions:,} questions", ""]
            text += summary_table(of_size, model, list(dict.fromkeys(lines.values())), seeds)
        if tables := samples_tables([r for r in usual_questions if r["model"] == model], lines):
            text += ["", f"### {model}, calibrated on fewer samples", *tables]
        for questions in sorted({r.get("questions", QUESTIONS) for r in usual_samples if r["model"] == model}):
            known = [r for r in usual_samples if r["row"] in lines]  # not of settings that are gone
            of_questions = [r for r in known if r.get("questions", QUESTIONS) == questions]
            for whole in WHOLES:
                if ablation := ablation_table(of_questions, model, whole):
                    head = f"### {model}, one part of `{whole}` changed, judged on {questions:,} questions"
                    text += ["", head, "", *ablation]
        for column in ALL:
            if any((c.model, c.column) == (model, column) for c in main_cells):
                text += ["", f"### {model}, {column}", "", *detail_table(main_cells, model, column)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "methods.md").write_text(re.sub(r"\n{3,}", "\n\n", "\n".join(text)) + "\n")
    write_json([r for r in (*records, *first.records) if r["row"] in lines], [*first.cells, *cells], folder)


def write_json(records: Sequence[Mapping[str, Any]], cells: Sequence[Median], folder: Path) -> None:
    """Writes bench_methods.json: the medians, the settings of each row, and the versions of all packages."""
    versions = {package: version for record in records for package, version in record["versions"].items()}
    settings = {f"{r['model']}, {r['row']}, {r['column']}": r["settings"] for r in records}
    content = {"versions": versions, "settings": settings, "medians": [vars(c) | {"values": dict(c.values)} for c in cells]}
    (folder / "bench_methods.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
