"""The command `qvlm-eval`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.commands import INTERRUPTED
from qvlm_export.cli.common import OneLineErrors, errors_as_lines

NOT_ASKED = 1  # exit code when some questions could not be asked
NAMED_FAILURES = 5

EXAMPLES = """
Examples:

  qvlm-eval engine.plan --task scienceqa --data ScienceQA

  qvlm-eval llava-7b --task vqav2 --data vqav2 --limit 1000 --json

  qvlm-eval engine.plan --task vqav2 --data vqav2 --split test-dev --submission answers.json

  qvlm-eval engine.plan --task vizwiz --data vizwiz --shard 1/4 --predictions part1.jsonl   # then 2/4, 3/4, 4/4, and:

  qvlm-eval --task vizwiz --data vizwiz --merge part1.jsonl --merge part2.jsonl --merge part3.jsonl --merge part4.jsonl

  torchrun --nproc-per-node 4 --no-python qvlm-eval llava-7b --task scienceqa --data ScienceQA
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    model: Annotated[str | None, typer.Argument(help="X.plan, a calibrated checkpoint, or a --model of qvlm-export")] = None,
    task: Annotated[str, typer.Option(help="scienceqa, vqav2, vizwiz or hateful-memes")] = "",
    data: Annotated[Path | None, typer.Option(help="directory of the official files")] = None,
    rung: Annotated[str, typer.Option(help="auto, torch, simulated, graph or engine")] = "auto",
    split: Annotated[str | None, typer.Option(help="default: the one that papers report and that has answers")] = None,
    form: Annotated[str, typer.Option(help="v1.5: asks for a short answer; v1.3: the bare question")] = "v1.5",
    conversation: Annotated[str, typer.Option(help="own: the chat template; vicuna_v1, llava_v1, mistral_instruct")] = "own",
    pad_square: Annotated[
        bool, typer.Option("--pad-square", help="pad pictures with the mean colour, as LLaVA-1.5")
    ] = False,
    questions: Annotated[Path | None, typer.Option(help="scienceqa: LLaVA's question file, for its prompts")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first questions")] = None,
    shard: Annotated[str, typer.Option(help="part/parts of the questions")] = "1/1",
    merge: Annotated[list[Path] | None, typer.Option(help="predictions of a shard, to be scored together; repeat")] = None,
    predictions: Annotated[Path | None, typer.Option(help="where answers are kept; the same command goes on there")] = None,
    submission: Annotated[Path | None, typer.Option(help="vqav2, vizwiz: write the file that the server takes")] = None,
    batch: Annotated[int | None, typer.Option(help="questions at once; default: what the export takes, 8 in torch")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest answer, in tokens; default: by task and form")] = None,
    runtime: Annotated[str, typer.Option(help="of graph and engine, as in qvlm-run")] = "auto",
    device: Annotated[str, typer.Option(help="of the torch rungs: auto, cpu (float32) or cuda (float16)")] = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="ONNX Runtime: round INT4 products' activations to 8 bits")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")] = False,
) -> None:
    """Scores a model on ScienceQA, VQAv2, VizWiz or Hateful Memes, from the official files in a local directory.

    An export is asked through its engine, or through its ONNX graph where that cannot run; a checkpoint in torch; --rung
    decides otherwise. Answers are kept as they come, and the same command goes on where a killed one stopped. Answers that
    name no option are wrong, and counted. Exit code 1 when questions could not be asked, such as for an unreadable picture.
    """
    with errors_as_lines(), _interruption_as_line():
        from qvlm_export.evaluation.distributed import use_own_gpu, world
        from qvlm_export.evaluation.evaluate import EvalOptions, evaluate
        from qvlm_export.pipeline.progress import Reporter

        if not task or data is None:
            raise UserError("give --task and --data: what to evaluate, and the directory with its official files")
        use_own_gpu()
        options = EvalOptions(
            model, task, data, rung, split, form, conversation, pad_square, questions, limit, _shard(shard),
            tuple(merge or ()), predictions, submission, batch, max_new_tokens, runtime, device, fast,
        )  # fmt: skip
        found = evaluate(options, Reporter(quiet=as_json or world().rank > 0))
        if found is None:
            return
        content = found.summary()
        if as_json:
            print(json.dumps(content, indent=1, allow_nan=False))
        else:
            show(content, Console(markup=False, highlight=False))
        if content["failed"]:
            raise typer.Exit(NOT_ASKED)


@contextmanager
def _interruption_as_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None:
        raise UserError(f"--shard {text}: give part/parts, such as 1/4 to 4/4")
    return int(found[1]), int(found[2])


def show(content: dict[str, Any], console: Console) -> None:
    """The result for people."""
    part = "" if content["shard"] == [1, 1] else ", shard {}/{}".format(*content["shard"])
    asked = f"{content['answers']} of {content['questions']} questions"
    title = f"{content['task']} {content['split']}, {content['rung']}{part}: {asked}"
    if content["metrics"] is None:
        console.print(f"{title}; the answers of this split are not public", soft_wrap=True)
    else:
        console.print(title, soft_wrap=True)  # a table's own title is broken to the table's width
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("")
        for name in content["metrics"]:
            table.add_column(name, justify="right")
        table.add_row("%", *("–" if value is None else f"{100 * value:.2f}" for value in content["metrics"].values()))
        table.add_row("questions", *(str(count) for count in content["counts"].values()))
        console.print(table)
        console.print(f"unparsed answers, counted as wrong: {content['unparsed']}")
    failed = list(content["failed"].items())
    if failed:
        console.print(f"not asked, counted as wrong: {len(failed)}")
        for _, reason in failed[:NAMED_FAILURES]:
            console.print(f"  {reason}", soft_wrap=True)
        if len(failed) > NAMED_FAILURES:
            console.print(f"  and {len(failed) - NAMED_FAILURES} more; --json names all")
    for name in ("predictions", "submission"):
        if content[name]:
            console.print(f"{name}: {content[name]}", soft_wrap=True)


if __name__ == "__main__":
    app()
