"""The tiny model's scores by task and rung, asked by qvlm-eval: writes docs/evaluation.json and its tables.

    python -m tools.tiny.make_eval_sets --out build/tiny-eval
    python -m tools.tiny.scores --data build/tiny-eval --docs docs

The tables of docs/evaluation.md lie between two marks and are replaced. Exports and answers are kept in --work, so a killed
run goes on. Engines are built and asked where a GPU is; elsewhere their rows say that they were not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import qvlm_export
from qvlm_export.calibrate.checkpoint.calibrated import write_json
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import gpu_present
from qvlm_export.evaluation.evaluate import TASKS, EvalOptions, evaluate
from qvlm_export.pipeline.progress import Reporter

SCHEMES = ("fp16", "int8", "int4")
MAX_NEW_TOKENS = 32  # the longest right answer has six
BEGIN, END = "<!-- tables of tools/tiny/scores.py -->", "<!-- end of tables -->"


def rungs(work: Path) -> Iterator[tuple[str, str, str, str]]:
    """Name of the row, what is asked, --rung, --form. Exports what is missing."""
    yield "torch", "tiny", "torch", "v1.3"
    for scheme in SCHEMES:
        plan = work / scheme / "tiny.plan"
        if not plan.with_suffix(".json").exists():
            backend = "auto" if gpu_present() else "onnx"  # engines are of no use here without a GPU
            qvlm_export.export("tiny", plan, scheme=scheme, backend=backend, max_batch=8)
        if scheme != "fp16":
            yield f"{scheme}, simulated", str(plan), "simulated", "v1.3"
        yield f"{scheme}, graph", str(plan), "graph", "v1.3"
        yield f"{scheme}, engine", str(plan), "engine", "v1.3"
    yield "torch, --form v1.5", "tiny", "torch", "v1.5"


def measure(data: Path, work: Path) -> list[dict[str, Any]]:
    """A row for each rung and task; what cannot run says why."""
    found = []
    for name, subject, rung, form in rungs(work):
        for task in TASKS:
            path = work / f"{name.replace(', ', '-').replace(' ', '')}-{task}.jsonl"
            options = EvalOptions(
                subject, task, data / task, rung=rung, form=form, predictions=path, max_new_tokens=MAX_NEW_TOKENS
            )
            row: dict[str, Any] = {"rung": name, "task": task}
            try:
                evaluation = evaluate(options, Reporter())
                assert evaluation is not None
                kept = ("metrics", "counts", "unparsed", "questions")
                row |= {key: value for key, value in evaluation.summary().items() if key in kept}
            except UserError as error:
                if rung != "engine":
                    raise
                row["not_run"] = str(error)
            print(f"{name}, {task}: {row.get('metrics') or row.get('not_run')}", flush=True)
            found.append(row)
    return found


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the main metric of all tasks, then each task by its columns."""
    names = list(dict.fromkeys(row["rung"] for row in rows))
    by_cell = {(row["rung"], row["task"]): row for row in rows}
    ran = [name for name in names if all("metrics" in by_cell[name, task] for task in TASKS)]
    heads = [f"{task}, {TASKS[task].main}" for task in TASKS]
    lines = [f"| rung | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
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
