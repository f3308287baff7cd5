"""The command `qvlm-validate`: compares the forms of an exported model, and finds where accuracy is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qvlm_export.cli.common import OneLineErrors, check_finite, errors_as_lines
from qvlm_export.engines.check.thresholds import MAX_KL, MIN_AGREEMENT
from qvlm_export.inference.forms import FLOAT

NOT_MET = 1  # exit code when a threshold is not met, or the graph is not what was calibrated

EXAMPLES = """
Examples:

  qvlm-validate engine.plan

  qvlm-validate engine.plan --samples mine.jsonl --min-agreement 0.98 --max-kl 0.02

  qvlm-validate engine.plan --per-layer --save-polygraphy polygraphy
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    plan: Annotated[Path, typer.Argument(help="X.plan as written by qvlm-export, or X.json beside it")],
    reference: Annotated[
        str | None, typer.Option(help="checkpoint to compare with; default: the one that was exported")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a --reference on the Hub")] = None,
    samples: Annotated[Path | None, typer.Option(help="JSONL: image, prompt, answer; default: the built-in scenes")] = None,
    limit: Annotated[int, typer.Option(min=1, help="largest number of samples")] = 64,
    min_agreement: Annotated[
        float,
        typer.Option(min=0, max=1, callback=check_finite, help="least share of answer tokens with the same top-1 token"),
    ] = MIN_AGREEMENT,
    max_kl: Annotated[
        float, typer.Option(min=0, callback=check_finite, help="largest mean KL divergence of answer tokens, in nats")
    ] = MAX_KL,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="compare the output of every block, too")] = False,
    save_polygraphy: Annotated[
        Path | None, typer.Option(help="write files and commands to repeat the comparison with Polygraphy")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")] = False,
) -> None:
    """Compares an export with its checkpoint, form by form, and says where accuracy is lost.

    The forms of the model: float (the checkpoint in transformers' own model), fake-quant (the calibrated checkpoint in
    torch), graph (the Q/DQ graph on ONNX Runtime), engine (TensorRT, if there is a GPU).

    Thresholds apply to the answer tokens of every form that runs. The exit code is 1 when a threshold is not met, when graph
    or engine are another model than what they were made from, when activations of the float model leave the range of a
    float16 engine, when the graph does not contain the calibrated integers, or when Polygraphy finds that graph and engine
    differ.
    """
    with errors_as_lines():
        from qvlm_export.pipeline.progress import Reporter
        from qvlm_export.validation.validate import ValidateOptions, validate

        options = ValidateOptions(
            plan, reference, revision, samples, limit, min_agreement, max_kl, per_layer, save_polygraphy
        )
        content = validate(options, Reporter(quiet=as_json)).summary()
        if as_json:
            print(json.dumps(content, indent=1, allow_nan=False))
        else:
            show(content, Console(markup=False, highlight=False), per_layer)
        if not content["passed"]:
            raise typer.Exit(NOT_MET)


def show(content: dict[str, Any], console: Console, per_layer: bool) -> None:
    """Prints the result for people. content: the summary that `--json` prints."""
    console.print(comparison_table(content))
    for run in content["forms"]:
        if run["status"] == "not run":
            console.print(f"not run: {run['name']}: {run['reason']}", soft_wrap=True)
    if per_layer:
        console.print(layer_table(content))
    if (weights := content["weights"])["checked"]:
        correct = weights["checked"] - len({w["linear"] for w in weights["wrong"]})
        console.print(f"graph: {correct} of {weights['checked']} quantized linears hold the calibrated integers and scales")
        for wrong in weights["wrong"]:
            console.print(f"  {wrong['linear']}: {wrong['what']}", soft_wrap=True)
    console.print(loss_line(content["loss"]), soft_wrap=True)
    for check in content["thresholds"]:
        show_check(check, content["largest_activation"], console)
    show_polygraphy(content["polygraphy"], console)


def show_check(check: dict[str, Any], largest_activation: list[Any] | None, console: Console) -> None:
    """Prints a threshold that was asked for, or any other that is not met. largest_activation: place and magnitude."""
    if check["passed"] and (check["metric"] not in ("agreement", "kl") or check["against"] != FLOAT):
        return
    sign, met = ">=" if check["metric"] == "agreement" else "<=", "met" if check["passed"] else "NOT MET"
    against = "" if check["against"] == FLOAT else f" against {check['against']}"
    place = f", at {largest_activation[0]}" if check["metric"] == "largest activation" and largest_activation else ""
    got, what = f"{check['metric']} {format_number(check['got'])}", f"{check['form']}{against}{place}"
    console.print(f"{got} {sign} {check['wanted']:g} on {what}: {met}", soft_wrap=True)


def comparison_table(content: dict[str, Any]) -> Table:
    """Returns a table of the scores of every form against the forms before it, for each kind of tokens."""
    title = f"{content['plan']}, {content['scheme']}, against {content['reference']}: {content['samples']} samples"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("form", "against", "tokens", "count", "KL nats", "top-1", "SQNR dB", "cosine"):
        table.add_column(column, justify="left" if column in ("form", "against", "tokens") else "right")
    for run in content["forms"]:
        if run["status"] != "run":
            table.add_row(run["name"], run["status"], end_section=True)
        for comparison in run["comparisons"]:
            for place, (kind, scores) in enumerate(comparison["tokens"].items()):
                names = (run["name"], comparison["against"]) if place == 0 else ("", "")
                count = str(scores["count"]) + (f" ({scores['not_finite']} not finite)" if scores["not_finite"] else "")
                values = [format_number(scores["kl"]), format_percent(scores["agreement"])]
                values += [
                    format_decibels(scores["sqnr_db"]),
                    "-" if scores["cosine"] is None else f"{scores['cosine']:.5f}",
                ]
                table.add_row(*names, kind, count, *values, end_section=place == len(comparison["tokens"]) - 1)
    return table


def layer_table(content: dict[str, Any]) -> Table:
    """Returns a table of the SQNR of every block's output."""
    title = "SQNR in dB of block outputs on one sample: fake-quant against float, graph against fake-quant"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("block", no_wrap=True)
    for column in ("fake-quant", "graph"):
        table.add_column(column, justify="right")
    for layer in content["layers"]:
        graph = format_decibels(layer["graph_sqnr_db"]) if layer["graph_compared"] else ""
        table.add_row(layer["block"], format_decibels(layer["sqnr_db"]), graph)
    return table


def loss_line(loss: dict[str, Any] | None) -> str:
    """Returns a line that names the form, and the layers if known, at which accuracy is lost."""
    if loss is None:
        return "no form loses accuracy"
    cost = "" if loss["kl"] is None else f", {format_number(loss['kl'])} nats a token against the form before it"
    layers = f"; most in {', '.join(loss['layers'])}" if loss["layers"] else "; --per-layer looks for the layers"
    return f"accuracy is lost at: {loss['form']}{cost}{layers}"


def show_polygraphy(saved: dict[str, Any] | None, console: Console) -> None:
    """Prints the verdicts of Polygraphy, and the commands to repeat them."""
    if saved is None:
        return
    for verdict in saved["verdicts"]:
        passed = "PASSED" if verdict["passed"] else "FAILED"
        runners = " against ".join(reversed(verdict["runners"]))
        console.print(f"polygraphy: {verdict['output']}, {runners}: SNR {format_decibels(verdict['snr_db'])} dB, {passed}")
    if saved["commands"]:
        console.print(f"\nto repeat by hand, from what was written to {saved['folder']}:", soft_wrap=True)
    for command in saved["commands"]:
        console.print(command, soft_wrap=True)  # not wrapped, so that it can be pasted


def format_number(value: float | None) -> str:
    """Returns three significant digits, or - for None."""
    return "-" if value is None else f"{value:.3g}"


def format_percent(value: float | None) -> str:
    """Returns a share as a percentage, or - for None."""
    return "-" if value is None else f"{100 * value:.2f}%"


def format_decibels(value: float | None) -> str:
    """Returns an SQNR in dB, or "equal" for None, which stands for no noise at all."""
    return "equal" if value is None else f"{value:.1f}"
