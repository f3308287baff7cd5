"""The command `qvlm-validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qvlm_export.cli.common import OneLineErrors, errors_as_lines

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
    plan: Annotated[Path, typer.Argument(help="X.plan as qvlm-export wrote it, or X.json beside it")],
    reference: Annotated[str | None, typer.Option(help="the checkpoint; default: the one that was exported")] = None,
    samples: Annotated[Path | None, typer.Option(help="JSONL: image, prompt, answer; default: the built-in scenes")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many samples to use at most")] = 64,
    min_agreement: Annotated[float | None, typer.Option(min=0, max=1, help="least share of equal top-1 tokens")] = None,
    max_kl: Annotated[float | None, typer.Option(min=0, help="largest mean KL divergence, in nats")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="look at the output of every block")] = False,
    save_polygraphy: Annotated[Path | None, typer.Option(help="write what Polygraphy needs to repeat it by hand")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")] = False,
) -> None:
    """Compares an export with its checkpoint rung by rung, and names where accuracy is lost.

    The rungs: float (the checkpoint in torch), fake-quant (the calibrated checkpoint in torch), onnx graph (the Q/DQ graph
    on ONNX Runtime), engine (TensorRT, where a GPU is).

    Thresholds hold for the answer tokens of every rung that runs. Exit code 1 when one is not met, when the graph does not
    hold the calibrated integers, or when Polygraphy finds graph and engine apart.
    """
    with errors_as_lines():
        from qvlm_export.pipeline.progress import Reporter
        from qvlm_export.validation.validate import ValidateOptions, validate

        options = ValidateOptions(plan, reference, samples, limit, min_agreement, max_kl, per_layer, save_polygraphy)
        content = validate(options, Reporter(quiet=as_json)).summary()
        if as_json:
            print(json.dumps(content, indent=1, allow_nan=False))
        else:
            show(content, Console(markup=False, highlight=False), per_layer)
        if not content["passed"]:
            raise typer.Exit(NOT_MET)


def show(content: dict[str, Any], console: Console, per_layer: bool) -> None:
    """The result for people."""
    console.print(ladder_table(content))
    for rung in content["rungs"]:
        if rung["status"] == "not run":
            console.print(f"not run: {rung['name']}: {rung['reason']}", soft_wrap=True)
    if per_layer:
        console.print(layer_table(content))
    if (weights := content["weights"])["checked"]:
        right = weights["checked"] - len({w["linear"] for w in weights["wrong"]})
        console.print(f"graph: {right} of {weights['checked']} quantized linears hold the calibrated integers and scales")
        for wrong in weights["wrong"]:
            console.print(f"  {wrong['linear']}: {wrong['what']}", soft_wrap=True)
    console.print(loss_line(content["loss"]), soft_wrap=True)
    for check in content["thresholds"]:
        sign = ">=" if check["metric"] == "agreement" else "<="
        met = "met" if check["passed"] else "NOT MET"
        console.print(f"{check['metric']} {number(check['got'])} {sign} {check['wanted']:g} on {check['rung']}: {met}")
    show_polygraphy(content["polygraphy"], console)


def ladder_table(content: dict[str, Any]) -> Table:
    title = f"{content['plan']}, {content['scheme']}, against {content['reference']}: {content['samples']} samples"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("rung", "against", "tokens", "count", "KL nats", "top-1", "SQNR dB", "cosine"):
        table.add_column(column, justify="left" if column in ("rung", "against", "tokens") else "right")
    for rung in content["rungs"]:
        if rung["status"] != "run":
            table.add_row(rung["name"], rung["status"], end_section=True)
        for comparison in rung["comparisons"]:
            for place, (group, scores) in enumerate(comparison["tokens"].items()):
                names = (rung["name"], comparison["against"]) if place == 0 else ("", "")
                count = str(scores["count"]) + (f" ({scores['not_finite']} not finite)" if scores["not_finite"] else "")
                values = [number(scores["kl"]), percent(scores["agreement"])]
                values += [decibels(scores["sqnr_db"]), "-" if scores["cosine"] is None else f"{scores['cosine']:.5f}"]
                table.add_row(*names, group, count, *values, end_section=place == len(comparison["tokens"]) - 1)
    return table


def layer_table(content: dict[str, Any]) -> Table:
    title = "SQNR in dB of block outputs on one sample: fake-quant against float, onnx graph against fake-quant"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("block", no_wrap=True)
    for column in ("fake-quant", "onnx graph"):
        table.add_column(column, justify="right")
    for layer in content["layers"]:
        graph = decibels(layer["graph_sqnr_db"]) if layer["graph_compared"] else ""
        table.add_row(layer["block"], decibels(layer["sqnr_db"]), graph)
    return table


def loss_line(loss: dict[str, Any] | None) -> str:
    if loss is None:
        return "no rung loses accuracy"
    cost = "" if loss["kl"] is None else f", {number(loss['kl'])} nats a token against the rung below"
    named = f"; most in {', '.join(loss['layers'])}" if loss["layers"] else "; --per-layer looks for the layers"
    return f"accuracy is lost at: {loss['rung']}{cost}{named}"


def show_polygraphy(saved: dict[str, Any] | None, console: Console) -> None:
    if saved is None:
        return
    for verdict in saved["verdicts"]:
        passed = "PASSED" if verdict["passed"] else "FAILED"
        runners = " against ".join(reversed(verdict["runners"]))
        console.print(f"polygraphy: {verdict['output']}, {runners}: SNR {decibels(verdict['snr_db'])} dB, {passed}")
    if saved["commands"]:
        console.print(f"\nto repeat by hand, from what was written to {saved['folder']}:", soft_wrap=True)
    for command in saved["commands"]:
        console.print(command, soft_wrap=True)  # never wrapped: it is there to be pasted


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def decibels(value: float | None) -> str:
    """None stands for no noise at all."""
    return "equal" if value is None else f"{value:.1f}"
