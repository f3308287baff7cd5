"""The trained model in the methods benchmark: metrics of a cell, and its section of docs/methods.md.

A cell stores hidden states at lm_head's input, as logits of all tokens would take gigabytes. They are scored on every token
of text behind the picture, through the float head (tools/smol/scores.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tools.bench.tables import Median, Section, best_of, medians, without_ablations
from tools.peers.rows import ALL, BY_HAND, COMPRESSOR, RELEASED, ROUND
from tools.smol.scores import KINDS, Score

PEERS = (RELEASED, BY_HAND, COMPRESSOR, ROUND)
# Lines of the summary table that peers are compared with, and their rows.
OURS = {"ours, fast": "fast", "ours, full": "full", "fast, strict": "fast: strict"}
COUNTS = ("prefix", "fallbacks")  # in the settings of our rows
METRICS = (
    "kl", "kl_error", "top1", "perplexity", "kl_answer", *(f"kl_{kind}" for kind in KINDS), *COUNTS, "seconds", "peak_bytes",
)  # fmt: skip

TEXT = """## {model}

`make smol` makes this LLaVA and `tools/smol/make_data.py` its data ([smol.md](smol.md)): 157 M parameters, and a decoder
that was trained on English. A calibration set has 64 samples, the test set {samples}: questions about drawn scenes,
photographs, English, and texts of 400 to 700 tokens. Scored are all tokens of text behind the picture (or the template,
without one), {tokens:,} in prompts and answers, against the float model: mean KL divergence in nats a token / top-1
agreement in percent / perplexity. {seeds}

```
python -m tools.bench.methods --model-dir build/{model} --data build/{model}-data --docs docs
```

`--rows`, `--columns` and `--seeds` choose cells. Measured on one thread; processor: {processors}. Our rows are calibrated
and run behind the prefix of the chat template, as exports are by default; the peers have no prefix. Tower and projector have
the scheme of the column, too; exports to `int4` have W8A8 there.
"""

VALIDATION = """## {model}, validation

Settings are chosen here, not on the test set: calibrated on the samples of seed 0, scored on the {samples} of seed 1
(`--validation`; ablations with `--extra`).
"""


def cell_metrics(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Any]:
    """What is recorded of a cell: the means over all tokens of text, and under "kinds" those by kind of sample and tokens.

    kl, kl_error: in nats. top1: a share, as that of the tiny models.
    """
    text = scores["all"]["text"]
    kinds = {kind: {tokens: asdict(score) for tokens, score in parts.items()} for kind, parts in scores.items()}
    return {
        "kl": text.kl,
        "kl_error": text.kl_error,
        "top1": text.top1 / 100,
        "perplexity": text.perplexity,
        "float_perplexity": text.float_perplexity,
        "kinds": kinds,
    }


def is_trained(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a trained model: only those have a perplexity."""
    return "perplexity" in record


def make_section(records: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> Section:
    """The text and the medians of all trained models. lines: row -> its line of the summary table."""
    records = [record for record in records if is_trained(record)]
    quantized = [_flatten(record) for record in records if record["row"] in lines]
    exact = [record for record in records if record["row"] == "float32"]
    text: list[str] = []
    of_tests: list[Median] = []
    for record in sorted(exact, key=lambda record: (record["model"], -record["questions"])):
        of_set = [r for r in quantized if (r["model"], r["questions"]) == (record["model"], record["questions"])]
        cells = medians(of_set, lines, METRICS)
        if any((other["model"], other["questions"] > record["questions"]) == (record["model"], True) for other in exact):
            text += _validation_lines(record, cells)
        else:
            of_tests += cells
            text += _model_lines(record, of_set, cells, lines)
    return Section(text, records, of_tests)


def _flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with all METRICS at its top; peers have no prefix and no fallbacks."""
    kinds, settings = record["kinds"], record["settings"]
    by_kind = {f"kl_{kind}": kinds[kind]["text"]["kl"] for kind in KINDS}
    counts = {count: settings.get(count, 0) for count in COUNTS}
    return {**record, **by_kind, **counts, "kl_answer": kinds["all"]["answer"]["kl"]}


def _model_lines(
    exact: Mapping[str, Any], records: Sequence[Mapping[str, Any]], cells: Sequence[Median], lines: Mapping[str, str]
) -> list[str]:
    """The section of one model, in Markdown. exact: the record of the float model."""
    seeds = max((cell.seeds for cell in cells), default=0)
    said = (
        "One calibration seed so far."
        if seeds < 2
        else f"Medians over {seeds} calibration seeds, or as many as in brackets."
    )
    processors = " or ".join(sorted({record["processor"] for record in records}))
    values = {"model": exact["model"], "samples": exact["questions"], "seeds": said, "processors": processors}
    text = TEXT.format(tokens=exact["kinds"]["all"]["text"]["tokens"], **values).splitlines()
    text += ["", *summary_table(exact, cells, list(dict.fromkeys(lines.values())), seeds), *fallback_notes(records)]
    for column in ALL:
        if of_column := [cell for cell in cells if cell.column == column]:
            text += ["", f"### {exact['model']}, {column}", "", *detail_table(of_column)]
    return [*text, ""]


def _validation_lines(exact: Mapping[str, Any], cells: Sequence[Median]) -> list[str]:
    """The section of what was chosen on the smaller set, in Markdown. exact: the record of the float model on it."""
    text = VALIDATION.format(samples=exact["questions"], model=exact["model"]).splitlines()
    for column in ALL:
        if of_column := [cell for cell in cells if cell.column == column]:
            text += ["", f"### {exact['model']}, {column}, validation", "", *detail_table(of_column)]
    return [*text, ""]


def summary_table(exact: Mapping[str, Any], cells: Sequence[Median], lines: Sequence[str], seeds: int) -> list[str]:
    """Lines of a Markdown table: KL / top-1 / perplexity of the best row of each line, and how much `fast` is ahead.

    `fast: strict` is shown, too, as all its linears have the scheme of the column, like those of the peers.
    """
    model, main_cells = exact["model"], [*without_ablations(cells), *(c for c in cells if c.row == OURS["fast, strict"])]
    columns = [column for column in ALL if any(cell.column == column for cell in main_cells)]
    best = {(line, column): best_of(main_cells, model, line, column) for line in lines for column in columns}
    table = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    table.append("| float | " + " | ".join([f"0 / 100 / {exact['perplexity']:.1f}"] * len(columns)) + " |")
    ordered = sorted(lines, key=lambda line: line in OURS or line.startswith("ours"))  # stable; ours come behind the peers
    for line in ordered:
        entries = [_entry(best[line, column], seeds) for column in columns]
        if set(entries) != {"–"}:
            table.append(f"| {line} | {' | '.join(entries)} |")
    for line, row in OURS.items():
        ratios = []
        for column in columns:
            own, peers = best.get((line, column)), [cell for peer in PEERS if (cell := best.get((peer, column)))]
            least = min((cell.values["kl"] for cell in peers), default=None)
            ratios.append("–" if own is None or least is None else f"{least / own.values['kl']:.2g}")
        if set(ratios) != {"–"}:
            table.append(f"| KL of the best peer / KL of `{row}` | {' | '.join(ratios)} |")
    return table


def _entry(cell: Median | None, seeds: int) -> str:
    """One entry of the summary table; the number of seeds is in brackets where it is not that of the table."""
    if cell is None:
        return "–"
    v, fewer = cell.values, "" if cell.seeds == seeds else f" ({cell.seeds})"
    return f"{v['kl']:.2g} / {100 * v['top1']:.1f} / {v['perplexity']:.1f}{fewer}"


def fallback_notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says how many linears of which rows have A16 in place of A8, as their input does not fit into 8 bits."""
    found: dict[str, dict[int, str]] = {}
    for record in records:
        if count := record["fallbacks"]:
            of_row = found.setdefault(f"`{record['row']}` at {record['column']}", {})
            of_row[record["seed"]] = f"{count} of {record['settings']['linears']} linears (seed {record['seed']})"
    if not found:
        return []
    notes = "; ".join(f"{row}: {', '.join(by_seed[seed] for seed in sorted(by_seed))}" for row, by_seed in found.items())
    return [
        "",
        "Inputs of linears that 8 bits cannot hold stay float (A16), as in exports without `--strict`; peers have none of",
        f"these, nor has `fast: strict`. {notes}.",
    ]


def detail_table(cells: Sequence[Median]) -> list[str]:
    """Lines of a Markdown table: every row of a scheme with all metrics, ablations included, in the order of KL."""
    heads = ["row", "seeds", "KL, nats", "its standard error", "top-1, %", "perplexity", "KL of answers"]
    heads += [f"KL, {kind}" for kind in KINDS]
    heads += ["prefix, tokens", "inputs left float", "seconds", "peak, MiB", "measured"]
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell in sorted(cells, key=lambda cell: cell.values["kl"]):
        v = cell.values
        entries = [cell.row, str(cell.seeds), f"{v['kl']:.3g}", f"{v['kl_error']:.1g}", f"{100 * v['top1']:.2f}"]
        entries += [f"{v['perplexity']:.2f}", f"{v['kl_answer']:.3g}", *(f"{v[f'kl_{kind}']:.3g}" for kind in KINDS)]
        entries += [f"{v['prefix']:g}", f"{v['fallbacks']:g}", f"{v['seconds']:.0f}", f"{v['peak_bytes'] / 2**20:.0f}"]
        table.append(f"| {' | '.join(entries)} | {cell.measured} |")
    return table
