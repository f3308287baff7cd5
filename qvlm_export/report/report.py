"""Writes X.report.html, an overview of an export: sizes, errors and entropies of blocks, scheme and SQNR of every linear.

The page is made from the manifest alone. It is one file without scripts and without anything loaded from elsewhere, and the
same manifest gives the same bytes. Sections whose numbers the calibrator did not record are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qvlm_export.calibrate.checkpoint.files import write_atomically
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.manifest import Manifest
from qvlm_export.report.contents import COMPONENTS, Component, Linear, all_linears, component_sizes
from qvlm_export.report.rows import (
    MODALITIES,
    BlockRow,
    Fallback,
    JointSearch,
    LayerRow,
    LinearRow,
    MassiveActivation,
    Place,
)


def write_report(manifest: Manifest, path: Path) -> None:
    """Writes the report of a manifest to `path`, through a temporary file. Raises UserError as `report_html` does."""
    html = report_html(manifest)
    write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))


def report_html(manifest: Manifest) -> str:
    """Returns the whole page as HTML. Raises UserError when the manifest has linears or schemes that cannot exist."""
    shapes = expected_shapes(manifest.config)
    calibration = manifest.calibration
    blocks, layers = block_rows(calibration), layer_rows(calibration)
    linears = linear_rows(calibration, all_linears(manifest, shapes))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qvlm_export", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "percentile": _format_percentile,
        "error": _format_error,
        "size": _format_size,
        "whole": "{:,}".format,
        "count": _format_count,
    }
    sizes = component_sizes(manifest, shapes)
    return environment.get_template("report.html.jinja").render(
        manifest=manifest,
        facts=header_facts(manifest),
        sizes=[*sizes, Component("total", *(sum(getattr(s, f) for s in sizes) for f in _SUMMED_FIELDS))],
        plots=_draw_plots(blocks, layers, linears, calibration),
        blocks=blocks,
        modalities=MODALITIES,
        linears=linears,
        massive=massive_rows(calibration),
        fallbacks=fallback_rows(calibration),
        joint_searches=joint_searches(calibration),
        recorded=any(row.record for row in linears),
        checked=sum(bool(check["passed"]) for check in manifest.plan_check),
    )


_SUMMED_FIELDS = ("parameters", "float16_bytes", "stored_bytes")


def header_facts(manifest: Manifest) -> dict[str, str]:
    """Returns the facts at the head of the page, text by name, in order; those that the manifest lacks are left out."""
    calibration, backend = manifest.calibration, manifest.backend
    counts = [f"{calibration[key]:,} {key}" for key in ("samples", "prompts", "tokens") if key in calibration]
    cost = [
        f"{calibration[key]:,} {key.replace('_', ' ')}"
        for key in ("block_forwards", "block_backwards")
        if calibration.get(key)
    ]
    runtime = " ".join(map(str, (backend.get("name"), backend.get("version") or "", *backend.get("targets", ()))))
    facts = {
        "scheme": manifest.scheme,
        "effort": str(calibration.get("effort", "")),
        "method": _format_settings(calibration.get("method")),
        "calibration": ", ".join(counts) + (f" of {calibration['data']}" if "data" in calibration else ""),
        "search cost": ", ".join(cost),
        "prefix": _describe_prefix(calibration.get("prefix")),
        "visual encoder": _describe_vision(calibration.get("vision_optimization")),
        "accuracy": _describe_accuracy(calibration.get("accuracy")),
        "backend": re.sub(" +", " ", runtime).strip(),
        "limits": f"{manifest.limits.max_length:,} tokens, batch {manifest.limits.max_batch}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    return {name: text for name, text in facts.items() if text}


def block_rows(calibration: Mapping[str, Any]) -> list[BlockRow]:
    """Returns a row for each block whose search was recorded. calibration: the section of this name in the manifest."""
    return [
        BlockRow(
            place=place_of(block["name"]),
            error=block["error"],
            rtn_errors=block["compared"]["rtn"],
            errors=block["compared"]["searched"],
            cost=(block["forwards"], block.get("backwards", 0)),  # only Q-VLM has backwards in a block
        )
        for block in calibration.get("blocks", ())
        if "rtn" in block.get("compared", ())  # records before 0.9 have other keys
    ]


def _describe_accuracy(accuracy: Mapping[str, Any] | None) -> str:
    if not accuracy:
        return ""
    which = "held-out calibration samples" if accuracy["held_out"] else "calibration samples, none of which was held out"
    share, worst = f"{100 * accuracy['agreement']:.1f} %", ", ".join(accuracy["worst"])
    return (
        f"first choice of the float model for {share} of {accuracy['tokens']:,} tokens, KL divergence {accuracy['kl']:.3g} "
        f"nats, on {accuracy['samples']} {which}; most is lost in {worst}"
    )


def _describe_vision(vision: Mapping[str, Any] | None) -> str:
    """Returns what Q-VLM's optimization of the visual encoder did, and its errors next to the decoder."""
    if not vision:
        return ""
    before, after = vision["before"], vision["after"]
    return (
        f"gains and biases of {vision['tuned']} of {vision['blocks']} blocks tuned on {vision['samples']} samples; error at "
        f"the end with round-to-nearest, weighted by gradients {before['task']:.2e}, then {after['task']:.2e}, plain "
        f"{before['error']:.2e}, then {after['error']:.2e}"
    )


def _describe_prefix(prefix: Mapping[str, Any] | None) -> str:
    if not prefix:
        return ""
    return f"{len(prefix['token_ids'])} tokens, {prefix['text']!r}, with keys and values of the float model"


def massive_rows(calibration: Mapping[str, Any]) -> list[MassiveActivation]:
    """Returns the massive activations that calibration met: those of the prefix, then those behind it, in block order."""
    prefix = calibration.get("prefix", {})
    tokens, rows = prefix.get("token_ids", ()), []
    for name, found in prefix.get("massive_activations", {}).items():
        rows.append(_massive_row(name, found, tokens[found["position"]], 0, "in the prefix, so it is never quantized"))
    for block in calibration.get("blocks", ()):
        if found := block.get("massive_activation"):
            fell_back = ", ".join(block.get("fallbacks", ()))
            treatment = f"{fell_back} of this block read float inputs" if fell_back else "inside the ranges of this block"
            rows.append(_massive_row(block["name"], found, found.get("token"), len(tokens), treatment))
    return rows


def _massive_row(name: str, found: Mapping[str, Any], token: int | None, start: int, treatment: str) -> MassiveActivation:
    position = found["position"] + (0 if token is None else start)
    numbers = (found["channel"], found["magnitude"], found["times_median"])
    return MassiveActivation(place_of(name), token, position, *numbers, treatment)


def fallback_rows(calibration: Mapping[str, Any]) -> list[Fallback]:
    """Returns the linears that kept float inputs, the one that 8 bits would have harmed most first."""
    rows = [
        Fallback(f"{block['name']}.{name}", block["activation_errors"][name])
        for block in calibration.get("blocks", ())
        for name in block.get("fallbacks", ())
    ]
    return sorted(rows, key=lambda row: -row.error)


def joint_searches(calibration: Mapping[str, Any]) -> list[JointSearch]:
    """Returns the joint searches of Q-VLM in the order of the layers; none for other calibrators."""
    rows = []
    for block in calibration.get("blocks", ()):
        layers = iter(block.get("layers", ()))
        for search in block.get("joint_searches", ()):
            part = list(itertools.islice(layers, search["layers"]))
            rows.append(
                JointSearch(
                    place_of(block["name"]),
                    tuple(", ".join(name.removeprefix(f"{block['name']}.") for name in layer["linears"]) for layer in part),
                    tuple(layer["activation_percentile"] for layer in part),
                    tuple(layer["weight_percentile"] for layer in part),
                    search["error_before"],
                    search["error_after"],
                    search["layer_forwards"],
                )
            )
    return rows


def _format_settings(method: object) -> str:
    """Returns the settings of a search, nested ones included, in one line; for a calibrator without settings, its name."""
    if not isinstance(method, Mapping):
        return str(method or "")
    texts = [_format_settings(value) if isinstance(value, Mapping) else f"{name.replace('_', ' ')} {value}"
             for name, value in method.items() if value is not None]  # fmt: skip
    return ", ".join(texts)


def layer_rows(calibration: Mapping[str, Any]) -> list[LayerRow]:
    """Returns a row for each set of shared-input linears with a recorded entropy, of any calibrator.

    Where the record has no boundaries of jointly searched blocks, every recorded block is one.
    """
    return [
        LayerRow(
            place=place_of(next(iter(layer["linears"]))),
            linears=tuple(layer["linears"]),
            bits=layer["bits"],
            entropy=layer["entropy"],
            starts_block=layer.get("starts_block", number == 0),
        )
        for block in calibration.get("blocks", ())
        for number, layer in enumerate(block.get("layers", ()))
    ]


def linear_rows(calibration: Mapping[str, Any], linears: Sequence[Linear]) -> list[LinearRow]:
    """Returns a row for each linear of the model, with its record if there is one."""
    records: dict[str, Mapping[str, Any]] = {}
    for block in calibration.get("blocks", ()):
        records |= block.get("linears", {})
        for layer in block.get("layers", ()):
            records |= layer["linears"] if isinstance(layer["linears"], Mapping) else {}
    return [LinearRow(linear, place_of(linear.name), records.get(linear.name, {})) for linear in linears]


def place_of(name: str) -> Place:
    """Returns the place of a block, or of the block that a linear is in, by its canonical name."""
    component = next((c for c, prefixes in COMPONENTS.items() if f"{name}.".startswith(prefixes)), name)
    number = re.search(r"\.layers\.(\d+)(\.|$)", name)
    return Place(component, None if number is None else int(number[1]))


def _draw_plots(
    blocks: Sequence[BlockRow], layers: Sequence[LayerRow], linears: Sequence[LinearRow], calibration: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns title, text and SVG of each plot that has data."""
    from qvlm_export.report import plots as report_plots  # matplotlib takes a second to import

    plots = []
    if any(error > 0 for row in blocks for error in row.errors.values()):  # a logarithmic axis cannot show zeros
        text = (
            "Squared error of each block's output against the float model's, relative to it, by the kind of token: with "
            "round-to-nearest (dashed) and as quantized, on the same inputs. These come from the preceding quantized "
            "blocks, so errors grow along the model."
        )
        plots.append({"title": "Error of each block", "text": text, "svg": report_plots.plot_errors(blocks)})
    if layers:
        verb = "searches" if joint_searches(calibration) else "would search"
        text = (
            "Entropy of the codes of each layer's input (of float inputs: as if they had the weights' bits). Layers between "
            f"two lines are what the Q-VLM rule {verb} jointly: where entropy is above the median (dashed) of all "
            "layers with as many bits."
        )
        svg = report_plots.plot_entropies(layers, calibration.get("entropy_thresholds", {}))
        plots.append({"title": "Entropy of each layer", "text": text, "svg": svg})
    if any(row.record.get("sqnr_db") is not None for row in linears):
        text = (
            "What each linear gives, against what it gives in the float model; higher is closer. Its input comes from the "
            "quantized blocks before, whose errors are in it."
        )
        plots.append({"title": "SQNR of each linear's output", "text": text, "svg": report_plots.plot_sqnr(linears)})
    # The SVGs are made of numbers and fixed words, so they need no escaping.
    return [{**plot, "svg": Markup(plot["svg"])} for plot in plots]


def _format_error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _format_percentile(share: float | None) -> str:
    return "float" if share is None else f"{100 * share:.1f}"


def _format_count(count: float) -> str:
    """Formats a number of block runs, which is a fraction where only a part of the block was run."""
    return f"{count:,.1f}".removesuffix(".0")


def _format_size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
