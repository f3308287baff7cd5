"""The command `qvlm-export`: from a LLaVA checkpoint to TensorRT engines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from qvlm_export.calibrate.calibrators.efforts import DEFAULT_EFFORT, EFFORTS
from qvlm_export.cli.common import OneLineErrors, check_finite, errors_as_lines

EXAMPLES = """
Examples:

  qvlm-export --model tiny --out engine.plan

  qvlm-export --model llava-13b --out engine.plan --calib-data mine.jsonl

  qvlm-export --model ./my-llava --out out/int8.plan --scheme int8 --target sm89 --target sm120

  qvlm-export --model llava-7b --out engine.plan --dry-run

  qvlm-export --list-models
"""

LIST_WIDTH = 140  # least width of the table of --list-models, so that no name is cut off

EFFORT_HELP = "; ".join(f"{effort.name}: {effort.summary}" for effort in EFFORTS.values())

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def print_models(requested: bool) -> None:
    """Prints the aliases of `--model` with the sizes of their models, and ends the program, if `requested`."""
    if not requested:
        return
    from qvlm_export.pipeline.preparation.model_sizes import model_sizes

    table = Table(title="--model takes tiny, a Hugging Face id, a folder, or", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("alias", "repository", "parameters", "float16", "int4", "image tokens"):
        table.add_column(column, justify="left" if column in ("alias", "repository") else "right", no_wrap=True)
    for size in model_sizes():
        sizes = (format_bytes(size.float16_bytes), format_bytes(size.int4_bytes), f"{size.image_tokens}")
        table.add_row(size.alias, size.repository, f"{size.parameters / 1e9:.2f} B", *sizes)
    console = Console(markup=False, highlight=False)
    Console(markup=False, highlight=False, width=max(console.width, LIST_WIDTH)).print(table)
    raise typer.Exit


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    model: Annotated[str, typer.Option(help="an alias of --list-models, a Hugging Face id, or a local folder")],
    out: Annotated[Path, typer.Option(help="the language engine X.plan; the other files are named after it")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a model on the Hub")] = None,
    scheme: Annotated[str, typer.Option(help="int4, int8, fp16; sim-w6a6 and others with --backend onnx")] = "int4",
    recipe: Annotated[Path | None, typer.Option(help="YAML file of schemes for single modules, instead of --scheme")] = None,
    calib_data: Annotated[
        Path | None, typer.Option(help="JSONL of image, prompt, answer; self: the model writes its own; built-in")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="number of calibration samples; default: up to 128")] = None,
    effort: Annotated[str, typer.Option(help=EFFORT_HELP)] = DEFAULT_EFFORT,
    backend: Annotated[str, typer.Option(help="auto, tensorrt, tensorrt-rtx or onnx (graphs only)")] = "auto",
    target: Annotated[list[str] | None, typer.Option(help="GPU architecture, e.g. sm89; repeat for more")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="longest sequence in tokens, with image and answer")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 1,
    work_dir: Annotated[Path | None, typer.Option(help="work here, and keep the calibrated checkpoint here")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted export")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace also what qvlm-export did not write")] = False,
    memory: Annotated[
        float | None,
        typer.Option(min=0, callback=check_finite, help="GiB of memory for calibration; activations beyond it go to disk"),
    ] = None,
    device: Annotated[str, typer.Option(help="device for calibration: cpu, cuda or auto")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float type of the engines: float16, or bfloat16 for its range")] = "float16",
    prefix: Annotated[str, typer.Option(help="first tokens, common to all prompts, that stay float: auto, N or 0")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="W8A8 also where 8 bits cannot hold an input")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, and only show what would be done")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable result on stdout")] = False,
    list_models: Annotated[  # noqa: ARG001  (handled by the callback)
        bool, typer.Option("--list-models", is_eager=True, callback=print_models, help="list aliases with their sizes")
    ] = False,
) -> None:
    """Converts a LLaVA checkpoint to TensorRT INT4/INT8 engines, and checks that their linears run on integers."""
    with errors_as_lines():
        from qvlm_export.pipeline.preparation.prepare import ExportOptions

        options = ExportOptions(
            model=model,
            out=out,
            revision=revision,
            scheme=scheme,
            recipe=recipe,
            calib_data=calib_data,
            samples=samples,
            effort=effort,
            backend=backend,
            targets=tuple(target or ()),
            max_length=max_length,
            max_batch=max_batch,
            work_dir=work_dir,
            resume=resume,
            memory=memory,
            device=device,
            dtype=dtype,
            prefix=prefix,
            strict=strict,
            overwrite=overwrite,
        )
        _export(options, dry_run, as_json)


def _export(options: Any, dry_run: bool, as_json: bool) -> None:
    """Exports, or prepares only, and prints the result. options: ExportOptions."""
    from qvlm_export.pipeline.export import export
    from qvlm_export.pipeline.preparation.prepare import estimate_export, prepare_export
    from qvlm_export.pipeline.progress import Reporter

    if dry_run:
        prepared = prepare_export(options)
        content = dry_run_summary(prepared, estimate_export(prepared))
        show = show_dry_run
    else:
        content = result_summary(export(options, Reporter(quiet=as_json)))
        show = show_result
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        show(content, Console(markup=False, highlight=False))


def dry_run_summary(prepared: Any, estimated: Any) -> dict[str, Any]:
    """Returns what `--dry-run --json` prints. prepared: a PreparedExport; estimated: its Estimate."""
    from qvlm_export.checkpoints.origin import describe_origin

    origin = describe_origin(prepared.checkpoint)
    parts = (origin, origin.get("tower", {}))
    counts: dict[str, int] = {}
    for linear in prepared.linears.values():
        counts[linear.name] = counts.get(linear.name, 0) + 1
    return {
        "model": prepared.checkpoint.name,
        "backend": prepared.backend.name,
        "targets": list(prepared.backend.targets),
        "max_length": prepared.limits.max_length,
        "max_batch": prepared.limits.max_batch,
        "linears": counts,
        "calibration_data": str(prepared.options.calib_data or prepared.calibration_set.name) if prepared.samples else None,
        "calibration_samples": len({id(sample) for sample in (*prepared.samples, *prepared.checked_samples)}),
        "parts": {
            part: {
                "float16_bytes": sizes.float16_bytes,
                "weights_bytes": sizes.quantized_bytes,
                "compression": round(sizes.compression, 2),
            }
            for part, sizes in prepared.sizes.items()
        },
        "disk_bytes": prepared.disk_bytes,
        "download_bytes": prepared.download_bytes,
        "hub": [{key: part[key] for key in ("repository", "commit")} for part in parts if "repository" in part],
        "memory_bytes": estimated.memory_bytes,
        "build_memory_bytes": estimated.build_memory_bytes,
        "seconds": estimated.seconds,
        "calibration_floor_seconds": estimated.floor_seconds,
        "estimate": estimated.in_words(),
        "block_forwards": round(prepared.cost.forwards),
    }


def show_dry_run(content: dict[str, Any], console: Console) -> None:
    """Prints what `--dry-run` found for people. content: as `dry_run_summary` returns it."""
    table = Table(title=f"{content['model']}: what would be written", title_justify="left")
    for column in ("part", "float16", "weights", "compression"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, sizes in content["parts"].items():
        weights = format_bytes(sizes["weights_bytes"])
        table.add_row(part, format_bytes(sizes["float16_bytes"]), weights, f"{sizes['compression']:.2f}x")
    console.print(table)
    linears = ", ".join(f"{count} {name}" for name, count in content["linears"].items()) or "none"
    console.print(f"quantized linears: {linears}")
    console.print(f"backend: {content['backend']} {' '.join(content['targets'])}")
    console.print(f"longest sequence: {content['max_length']} tokens, batch {content['max_batch']}")
    console.print(f"calibration: {content['calibration_data'] or 'not needed'}, {content['calibration_samples']} samples")
    console.print(content["estimate"])
    written = "Nothing was written"
    for part in content["hub"]:
        console.print(f"on the Hub: {part['repository']}, commit {part['commit']}", soft_wrap=True)
    if content["hub"]:
        console.print(f"to download: {format_bytes(content['download_bytes'])} of weights")
        written += ", except configuration and tokenizer to the Hub's cache where it lacked them"
    console.print(f"disk needed: {format_bytes(content['disk_bytes'])}. {written}.", soft_wrap=True)


def result_summary(result: Any) -> dict[str, Any]:
    """Returns what `--json` prints after an export. result: an ExportResult."""
    manifest = result.manifest
    folder = manifest.path.parent
    builds = {Path(r.plan).name: {"seconds": round(r.seconds, 2), "peak_bytes": r.peak_bytes} for r in result.reports}
    files = {
        role: {**entry, **builds.get(entry["name"], {}), "path": str(folder / entry["name"])}
        for role, entry in manifest.files.items()
    }
    return {
        "manifest": str(manifest.path),
        "scheme": manifest.scheme,
        "files": files,
        "removed": result.removed,
        "compression": compression(manifest),
        "schemes": {part: dict(_count_schemes(manifest.linears, part)) for part in ("language", "vision")},
        "linears": {"quantized": len(manifest.linears), "checked_integer": sum(c.passed for c in result.checks)},
        "plan_check": [dict(check) for check in manifest.plan_check],
        "seconds": {stage: round(seconds, 2) for stage, seconds in result.seconds.items()},
        "processor_seconds": {stage: round(seconds, 2) for stage, seconds in result.processor_seconds.items()},
        "peak_bytes": result.peak_bytes,
        "backend": dict(manifest.backend),
    }


def _count_schemes(linears: Mapping[str, str], part: str) -> Counter[str]:
    """Returns how many linears of a part have each scheme."""
    language = part == "language"
    return Counter(scheme for name, scheme in linears.items() if name.startswith("language_model.") == language)


def compression(manifest: Any) -> dict[str, float]:
    """Returns by part the bytes of the weights in float16 over the bytes of the weights written."""
    from qvlm_export.pipeline.preparation.prepare import float16_bytes

    float16 = float16_bytes(manifest.config)
    return {part: round(float16[part] / manifest.files[f"{part}_data"]["bytes"], 2) for part in float16}


def show_result(content: dict[str, Any], console: Console) -> None:
    """Prints the result of an export for people. content: as `result_summary` returns it."""
    table = Table(title=f"exported as {content['scheme']}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("file", "size", "scheme", "to fp16", "seconds", "memory"):
        table.add_column(column, justify="left" if column in ("file", "scheme") else "right", no_wrap=column != "scheme")
    for role, entry in content["files"].items():
        part, _, kind = role.partition("_")
        schemes = ", ".join(content["schemes"].get(part, {})) or "float16"
        table.add_row(
            entry["name"],
            format_bytes(entry["bytes"]) if "bytes" in entry else "",
            schemes if kind in ("plan", "onnx") else "",
            f"{content['compression'][part]:.2f}x less" if kind == "data" else "",
            f"{entry['seconds']:.1f}" if "seconds" in entry else "",
            format_bytes(entry["peak_bytes"]) if "peak_bytes" in entry else "",
        )
    console.print(table)
    console.print(f"in {Path(content['manifest']).parent.resolve()}", soft_wrap=True)
    if content["removed"]:
        console.print(f"removed with the older export: {', '.join(content['removed'])}", soft_wrap=True)
    console.print(f"what it did to the model, block by block: {content['files']['report']['name']}", soft_wrap=True)
    if content["backend"]["version"] is not None and content["linears"]["quantized"]:
        _show_engine_check(content, console)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in content["seconds"].items())
    console.print(f"seconds: {stages}; peak memory {format_bytes(content['peak_bytes'])}")


def _show_engine_check(content: dict[str, Any], console: Console) -> None:
    """Prints how many linears the engines execute in which precision; X.json lists every linear."""
    linears = content["linears"]
    console.print(f"engine check: {linears['checked_integer']} of {linears['quantized']} quantized linears run on integers")
    kinds = Counter((check["scheme"], check["executed"]) for check in content["plan_check"])
    for (scheme, executed), count in sorted(kinds.items()):
        console.print(f"  {count} {scheme}: {executed}")


def format_bytes(count: int) -> str:
    """Returns a number of bytes as text, in MiB or, from 1 GiB on, in GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
