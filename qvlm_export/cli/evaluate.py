"""The command `qvlm-eval`: accuracy on ScienceQA, VQAv2, VizWiz and Hateful Memes."""

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
NAMED_FAILURES = 5  # how many of them are listed at most

EXAMPLES = """
Examples:

  qvlm-eval engine.plan --task scienceqa --data ScienceQA

  qvlm-eval llava-7b --task vqav2 --data vqav2 --limit 1000 --json

  qvlm-eval engine.plan --task vqav2 --data vqav2 --split test-dev --submission answers.json

  qvlm-eval engine.plan --task vizwiz --data vizwiz --shard 1/4 --predictions part1.jsonl   # likewise 2/4 to 4/4, then:

  qvlm-eval --task vizwiz --data vizwiz --merge part1.jsonl --merge part2.jsonl --merge part3.jsonl --merge part4.jsonl

  torchrun --nproc-per-node 4 --no-python qvlm-eval llava-7b --task scienceqa --data ScienceQA
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    model: Annotated[str | None, typer.Argument(help="X.plan, a calibrated checkpoint, or a --model of qvlm-export")] = None,
    task: Annotated[str, typer.Option(help="scienceqa, vqav2, vizwiz or hateful-memes")] = "",
    data: Annotated[Path | None, typer.Option(help="directory with the official files")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a model on the Hub")] = None,
    model_form: Annotated[str, typer.Option(help="auto, float, fake-quant, graph or engine")] = "auto",
    split: Annotated[str | None, typer.Option(help="default: the one that papers report, with public answers")] = None,
    form: Annotated[str, typer.Option(help="prompt: v1.5 asks for a short answer; v1.3 is the question alone")] = "v1.5",
    conversation: Annotated[
        str, typer.Option(help="own (the model's chat template), vicuna_v1, llava_v1 or mistral_instruct")
    ] = "own",
    pad_square: Annotated[bool, typer.Option("--pad-square", help="pad images to squares, as LLaVA-1.5 does")] = False,
    questions: Annotated[Path | None, typer.Option(help="scienceqa: LLaVA's question file with the prompts")] = None,
    limit: Annotated[int | None, typer.Option(help="ask only this many questions, the first ones")] = None,
    shard: Annotated[str, typer.Option(help="ask only one part of the questions, such as 2/4")] = "1/1",
    merge: Annotated[list[Path] | None, typer.Option(help="score predictions of shards together; repeat for each")] = None,
    predictions: Annotated[Path | None, typer.Option(help="file for the answers; the same command continues it")] = None,
    submission: Annotated[Path | None, typer.Option(help="vqav2, vizwiz: write the file for the evaluation server")] = None,
    batch: Annotated[int | None, typer.Option(help="questions at once; default: the export's batch, 8 in torch")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="longest answer in tokens; default: by task and form")] = None,
    runtime: Annotated[str, typer.Option(help="runtime of graph and engine, as in qvlm-run")] = "auto",
    device: Annotated[str, typer.Option(help="of float and fake-quant: auto, cpu (float32) or cuda (float16)")] = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="ONNX Runtime: round activations of INT4 linears to 8 bits")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")] = False,
) -> None:
    """Scores a model on ScienceQA, VQAv2, VizWiz or Hateful Memes, from the official files in a local directory.

    By default, an export runs through its engine, or through its ONNX graph where the engine cannot run, and a checkpoint
    runs in torch; --model-form chooses otherwise. Answers are written as they come: after an interruption, the same command
    continues where it stopped. Answers that name no option count as wrong, and their number is reported. The exit code is 1
    when some questions could not be asked, for example because of an unreadable image.
    """
    with errors_as_lines(), _report_interruption():
        from qvlm_export.evaluation.distributed import use_own_gpu, world
        from qvlm_export.evaluation.evaluate import EvalOptions, evaluate
        from qvlm_export.pipeline.progress import Reporter

        if not task or data is None:
            raise UserError("give --task and --data: what to evaluate, and the directory with its official files")
        use_own_gpu()
        options = EvalOptions(
            model, task, data, model_form, split, form, conversation, pad_square, questions, limit, _parse_shard(shard),
            tuple(merge or ()), predictions, submission, batch, max_new_tokens, runtime, device, fast,
            revision,
        )  # fmt: skip
        result = evaluate(options, Reporter(quiet=as_json or world().rank > 0))
        if result is None:  # in a process of torchrun other than the first
            return
        content = result.summary()
        if as_json:
            print(json.dumps(content, indent=1, allow_nan=False))
        else:
            show(content, Console(markup=False, highlight=False))
        if content["failed"]:
            raise typer.Exit(NOT_ASKED)


@contextmanager
def _report_interruption() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _parse_shard(text: str) -> tuple[int, int]:
    """Returns (part, parts) of `--shard part/parts`."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise UserError(f"--shard {text}: give part/parts, such as 1/4 to 4/4")
    return int(match[1]), int(match[2])


def show(content: dict[str, Any], console: Console) -> None:
    """Prints the result for people. content: the summary that `--json` prints."""
    shard = "" if content["shard"] == [1, 1] else ", shard {}/{}".format(*content["shard"])
    answered = f"{content['answers']} of {content['questions']} questions"
    title = f"{content['task']} {content['split']}, {content['model_form']}{shard}: {answered}"
    if content["metrics"] is None:
        console.print(f"{title}; the answers of this split are not public", soft_wrap=True)
    else:
        console.print(title, soft_wrap=True)  # as the title of the table, it would be wrapped to the table's width
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
