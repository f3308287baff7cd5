"""Evaluates all forms of the tiny model on all tasks of qvlm-eval; writes docs/evaluation.json and the tables of the page.

    python -m tools.tiny.make_eval_sets --out build/tiny-eval
    python -m tools.tiny.scores --data build/tiny-eval --docs docs

It replaces the tables of docs/evaluation.md, which lie between two marks. Exports and answers stay in --work, so a run that
was killed continues where it stopped. Engines are built and evaluated only if there is a GPU; otherwise their rows say that
they were not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import qvlm_export
from qvlm_export.calibrate.checkpoint.files import write_json
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import gpu_present
from qvlm_export.evaluation.evaluate import TASKS, EvalOptions, evaluate
from qvlm_export.pipeline.progress import Reporter

SCHEMES = ("fp16", "int8", "int4")
MAX_NEW_TOKENS = 32  # the longest right answer has six tokens
BEGIN, END = "<!-- tables of tools/tiny/scores.py -->", "<!-- end of tables -->"


def forms(work: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yields row name, model, --model-form and --form of each row of the table; exports the tiny model where missing."""
    yield "float", "tiny", "float", "v1.3"
    for scheme in SCHEMES:
        plan = work / scheme / "tiny.plan"
        if not plan.with_suffix(".json").exists():
            backend = "auto" if gpu_present() else "onnx"  # without a GPU engines could not be run
            qvlm_export.export("tiny", plan, scheme=scheme, backend=backend, max_batch=8)
        if scheme != "fp16":
            yield f"{scheme}, fake-quant", str(plan), "fake-quant", "v1.3"
        yield f"{scheme}, graph", str(plan), "graph", "v1.3"
        yield f"{scheme}, engine", str(plan), "engine", "v1.3"
    yield "float, --form v1.5", "tiny", "float", "v1.5"


def measure(data: Path, work: Path) -> list[dict[str, Any]]:
    """Evaluates each form of the model on each task; returns one row each, with the reason in "not_run" if it cannot run."""
    rows = []
    for name, model, model_form, form in forms(work):
        for task in TASKS:
            path = work / f"{name.replace(', ', '-').replace(' ', '')}-{task}.jsonl"
            options = EvalOptions(
                model, task, data / task, model_form=model_form, form=form, predictions=path, max_new_tokens=MAX_NEW_TOKENS
            )
            row: dict[str, Any] = {"model_form": name, "task": task}
            try:
                evaluation = evaluate(options, Reporter())
                if evaluation is None:  # in all processes of torchrun but the first
                    raise UserError("start this program without torchrun: it runs in one process")
                keys = ("metrics", "counts", "unparsed", "questions")
                row |= {key: value for key, value in evaluation.summary().items() if key in keys}
            except UserError as error:
                if model_form != "engine":
                    raise
                row["not_run"] = str(error)
            print(f"{name}, {task}: {row.get('metrics') or row.get('not_run')}", flush=True)
            rows.append(row)
    return rows


def percent(value: float | None) -> str:
    """The share in percent with one decimal; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown tables: the main metrics of all tasks, then one table for each task with all of its metrics."""
    names = list(dict.fromkeys(row["model_form"] for row in rows))
    by_cell = {(row["model_form"], row["task"]): row for row in rows}
    ran = [name for name in names if all("metrics" in by_cell[name, task] for task in TASKS)]
    heads = [f"{task}, {TASKS[task].main}" for task in TASKS]
    lines = [f"| model | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in names:
        cells = [percent(by_cell[name, t]["metrics"][TASKS[t].main]) if name in ran else "not run" for t in TASKS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for task in TASKS:
        columns = list(by_cell[ran[0], task]["metrics"])
        counts = [str(by_cell[ran[0], task]["counts"][column]) for column in columns]
        lines += ["", f"| {task} | {' | '.join(columns)} | unparsed |", f"|---|{'---|' * (len(columns) + 1)}"]
        lines.append(f"| questions | {' | '.join(counts)} | |")
        for name in ran:
            row = by_cell[name, task]
            lines.append(f"| {name} | {' | '.join(percent(row['metrics'][c]) for c in columns)} | {row['unparsed']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/tiny-eval"))
    parser.add_argument("--work", type=Path, default=Path("build/tiny-scores"))
    parser.add_argument("--docs", type=Path, help="folder with evaluation.md, whose tables are replaced")
    args = parser.parse_args()
    rows = measure(args.data, args.work)
    if args.docs is None:
        print(tables(rows))
        return
    write_json(args.docs / "evaluation.json", rows)
    page = args.docs / "evaluation.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
