"""The command `qvlm-inspect`: what an export contains, and whether its files are intact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qvlm_export.cli.common import OneLineErrors, errors_as_lines
from qvlm_export.cli.export import format_bytes

EXAMPLES = """
Examples:

  qvlm-inspect engine.plan

  qvlm-inspect engine.plan --verify

  qvlm-inspect engine.plan --json > contents.json
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    plan: Annotated[Path, typer.Argument(help="X.plan as written by qvlm-export, or X.json beside it")],
    verify: Annotated[
        bool, typer.Option("--verify", help="read every file and compare its size and sha256 with the manifest")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable result on stdout, with every linear")] = False,
) -> None:
    """Shows what an export contains: sizes, schemes, which linears run on integers, inputs, outputs, versions and files.

    The exit code is 2 when the manifest is missing or damaged and, with --verify, when a file is not as it was written.
    """
    with errors_as_lines():
        from qvlm_export.pipeline.progress import Reporter
        from qvlm_export.report.contents import inspect

        if verify:
            with Reporter(quiet=as_json).stage("verify") as stage:
                content = inspect(plan, verify, stage.fraction).summary()
        else:
            content = inspect(plan).summary()
        if as_json:
            print(json.dumps(content, indent=1, allow_nan=False))
        else:
            show(content, Console(markup=False, highlight=False))


def show(content: dict[str, Any], console: Console) -> None:
    """Prints the content of an export for people. content: the summary that `--json` prints."""
    console.print(size_table(content))
    if content["tied_head"]:
        console.print("lm_head is tied to the embeddings\n")
    console.print(linear_table(content))
    console.print(check_line(content), soft_wrap=True)
    console.print(interface_table(content))
    limits = content["limits"]
    console.print(
        f"limits: {limits['max_length']} tokens, batch {limits['max_batch']}, {limits['max_images']} images at once"
    )
    facts = {
        key: value for key, value in content["calibration"].items() if isinstance(value, str | int)
    }  # nested values are too long for a line
    calibration = ", ".join(f"{key} {value}" for key, value in facts.items()) or "not needed"
    console.print(f"calibration: {calibration}", soft_wrap=True)
    console.print(f"built with: {', '.join(f'{name} {version}' for name, version in versions(content))}", soft_wrap=True)
    console.print(file_table(content))
    console.print(verified_line(content), soft_wrap=True)


def size_table(content: dict[str, Any]) -> Table:
    """Returns a table of the components of the model with the sizes of their weights."""
    name, scheme = content["model"].get("name", "model"), content["scheme"]
    table = _make_table(
        f"{name}, {scheme}: weights", "component", "parameters", "float16", "stored", "bits/weight", "smaller"
    )
    rows = content["components"]
    for number, sizes in enumerate([*rows, content["total"]], 1):
        bits, float16, stored = sizes["bits_per_weight"], sizes["float16_bytes"], sizes["stored_bytes"]
        ratio = f"{float16 / stored:.2f}x" if float16 and stored else "-"
        cells = (
            f"{sizes['parameters']:,}",
            format_bytes(float16),
            format_bytes(stored),
            "-" if bits is None else f"{bits:.2f}",
        )
        table.add_row(sizes["name"], *cells, ratio, end_section=number == len(rows))
    return table


def linear_table(content: dict[str, Any]) -> Table:
    """Returns a table of how many linears have which component, scheme and kernel in the engine."""
    counts: dict[tuple[str, str, str], int] = {}
    for linear in content["linears"]:
        unchecked = "not checked" if linear["quantized"] else "float"
        key = (linear["component"], linear["scheme"], linear["executed"] or unchecked)
        counts[key] = counts.get(key, 0) + 1
    table = _make_table("linears", "component", "scheme", "kernel operands", "count")
    for (component, scheme, executed), count in counts.items():
        table.add_row(component, scheme, executed, str(count))
    return table


def check_line(content: dict[str, Any]) -> str:
    """Returns a line that says how many linears are quantized, and how many of them run on integers in the engine."""
    quantized = sum(linear["quantized"] for linear in content["linears"])
    summary = f"{quantized} of {len(content['linears'])} linears are quantized"
    check = content["plan_check"]
    if check["checked"]:
        return f"{summary}; engine check: {check['passed']} of {check['checked']} run on integers"
    return f"{summary}; no engine was checked" if quantized else summary


def interface_table(content: dict[str, Any]) -> Table:
    """Returns a table of inputs and outputs, in which those of all layers share a row."""
    rows: dict[tuple[str, ...], int] = {}
    for part, directions in content["interface"].items():
        for direction, values in directions.items():
            for value in values:
                name, shape = re.sub(r"\.\d+\.", ".*.", value["name"]), ", ".join(map(str, value["shape"]))
                key = (part, direction.removesuffix("puts"), name, f"{value['type']} [{shape}]")
                rows[key] = rows.get(key, 0) + 1
    layers = max(rows.values(), default=1)
    table = _make_table(f"inputs and outputs; * is a layer, 0 to {layers - 1}", "engine", "", "name", "type and shape")
    for row in rows:
        table.add_row(*row)
    return table


def versions(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns names and versions: of the backend, with its targets, and of the packages."""
    backend = content["backend"]
    targets = f" for {' '.join(backend['targets'])}" if backend.get("targets") else ""
    built = [(backend["name"], f"{backend['version']}{targets}")] if backend.get("version") else []
    return [*built, *content["versions"].items()]


def file_table(content: dict[str, Any]) -> Table:
    """Returns a table of the files of the export with size, hash and state."""
    table = _make_table("files", "file", "size", "sha256", "state")
    for file in content["files"]:
        size, digest = file["bytes"], file["sha256"]
        cells = ("" if size is None else format_bytes(size), "" if digest is None else f"{digest[:12]}…")
        table.add_row(file["name"], *cells, file["state"])
    return table


def verified_line(content: dict[str, Any]) -> str:
    """Returns a line that says where the files are, and which of them `--verify` compared."""
    folder = Path(content["manifest"]).parent.resolve()
    if content["verified"] is None:
        return f"in {folder}; --verify compares the files with their hashes"
    unrecorded = [file["name"] for file in content["files"] if file["bytes"] is None]
    exception = f"; not recorded by that export, so not verified: {', '.join(unrecorded)}" if unrecorded else ""
    return f"verified {content['verified']} files in {folder}: size and sha256 are what the export wrote{exception}"


def _make_table(title: str, *columns: str) -> Table:
    """Returns an empty table whose columns of numbers are right-aligned."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    numbers = ("parameters", "float16", "stored", "bits/weight", "smaller", "count", "size")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table
