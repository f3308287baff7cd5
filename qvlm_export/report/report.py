"""X.report.html, what an export did at a glance: sizes, errors, entropies, what was chosen for every block and linear.

Made from the manifest alone, in one file without scripts or anything from elsewhere. The same manifest gives the same bytes.
What the calibrator kept no record of has no section.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qvlm_export.calibrate.checkpoint.calibrated import write_atomically
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.manifest import Manifest
from qvlm_export.report.contents import COMPONENTS, Component, Linear, all_linears, component_sizes
from qvlm_export.report.rows import MODALITIES, BlockRow, LayerRow, LinearRow, Place


def write_report(manifest: Manifest, path: Path) -> None:
    """Writes the report, through a temporary file."""
    html = report_html(manifest)
    write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))


def report_html(manifest: Manifest) -> str:
    """The whole page. Raises UserError when the manifest names linears or schemes that cannot be."""
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
    environment.filters |= {"error": _error, "size": _size, "whole": "{:,}".format, "count": _count}
    sizes = component_sizes(manifest, shapes)
    return environment.get_template("report.html.jinja").render(
        manifest=manifest,
        facts=header_facts(manifest),
        sizes=[*sizes, Component("total", *(sum(getattr(s, f) for s in sizes) for f in _SUMS))],
        plots=_plots(blocks, layers, linears, calibration),
        blocks=blocks,
        modalities=MODALITIES,
        linears=linears,
        recorded=any(row.record for row in linears),
        checked=sum(bool(check["passed"]) for check in manifest.plan_check),
    )


_SUMS = ("parameters", "float16_bytes", "stored_bytes")


def header_facts(manifest: Manifest) -> dict[str, str]:
    """What the head of the page says, by name, in order; only what there is."""
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
        "method": _settings(calibration.get("method")),
        "calibration": ", ".join(counts) + (f" of {calibration['data']}" if "data" in calibration else ""),
        "search cost": ", ".join(cost),
        "backend": re.sub(" +", " ", runtime).strip(),
        "limits": f"{manifest.limits.max_length:,} tokens, batch {manifest.limits.max_batch}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    return {name: text for name, text in facts.items() if text}


def block_rows(calibration: Mapping[str, Any]) -> list[BlockRow]:
    """The blocks whose search was recorded."""
    return [
        BlockRow(
            place=place_of(block["name"]),
            error=block["error"],
            nearest=block["compared"]["nearest"],
            errors=block["compared"]["searched"],
            held_back=block["held_back_errors"],
            cost=(block["forwards"], block["backwards"]),
        )
        for block in calibration.get("blocks", ())
        if "compared" in block
    ]


def _settings(method: object) -> str:
    """The settings of a search, nested ones too, in one line; a calibrator without settings has a name."""
    if not isinstance(method, Mapping):
        return str(method or "")
    said = [_settings(value) if isinstance(value, Mapping) else f"{name.replace('_', ' ')} {value}"
            for name, value in method.items() if value is not None]  # fmt: skip
    return ", ".join(said)


def layer_rows(calibration: Mapping[str, Any]) -> list[LayerRow]:
    """All layers with an entropy, of whichever calibrator; where it says no boundaries, its blocks are the parts."""
    return [
        LayerRow(
            place=place_of(next(iter(layer["linears"]))),
            linears=tuple(layer["linears"]),
            bits=layer["bits"],
            entropy=layer["entropy"],
            starts=layer.get("starts_block", number == 0),
        )
        for block in calibration.get("blocks", ())
        for number, layer in enumerate(block.get("layers", ()))
    ]


def linear_rows(calibration: Mapping[str, Any], linears: Sequence[Linear]) -> list[LinearRow]:
    """Every linear of the model with its record, if there is one."""
    records: dict[str, Mapping[str, Any]] = {}
    for block in calibration.get("blocks", ()):
        records |= block.get("linears", {})
        for layer in block.get("layers", ()):
            records |= layer["linears"] if isinstance(layer["linears"], Mapping) else {}
    return [LinearRow(linear, place_of(linear.name), records.get(linear.name, {})) for linear in linears]


def place_of(name: str) -> Place:
    """The place of a block, or of a linear inside it, by its canonical name."""
    component = next((c for c, starts in COMPONENTS.items() if f"{name}.".startswith(starts)), name)
    number = re.search(r"\.layers\.(\d+)(\.|$)", name)
    return Place(component, None if number is None else int(number[1]))


def _plots(
    blocks: Sequence[BlockRow], layers: Sequence[LayerRow], linears: Sequence[LinearRow], calibration: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Title, explanation and SVG of each plot that has something to show."""
    from qvlm_export.report import plots as report_plots  # matplotlib takes a second to import

    plots = []
    if any(error > 0 for row in blocks for error in row.errors.values()):  # a logarithm shows no zeros
        text = (
            "Squared error of each block's output against the float model's, relative to it, by the kind of token: rounded "
            "to nearest (dashed) and as it is now, on the same inputs. They come from the quantized blocks before, so "
            "errors grow along the model."
        )
        plots.append({"title": "Error of each block", "text": text, "svg": report_plots.errors(blocks)})
    if layers:
        text = (
            "Entropy of the codes of each layer's input (of float inputs: as if they had the weights' bits). Layers between "
            "two lines are what the Q-VLM rule would search jointly: where entropy is above the median (dashed) of all "
            "layers with as many bits."
        )
        svg = report_plots.entropies(layers, calibration.get("entropy_thresholds", {}))
        plots.append({"title": "Entropy of each layer", "text": text, "svg": svg})
    if any(row.record.get("sqnr_db") is not None for row in linears):
        text = (
            "What each linear gives, against what it gives in the float model; higher is closer. Its input comes from the "
            "quantized blocks before, whose errors are in it."
        )
        plots.append({"title": "SQNR of each linear's output", "text": text, "svg": report_plots.sqnr(linears)})
    # The SVGs are made of numbers and fixed words, so they need no escaping.
    return [{**plot, "svg": Markup(plot["svg"])} for plot in plots]


def _short(names: Sequence[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _count(count: float) -> str:
    """Of runs, of which a part may have run."""
    return f"{count:,.1f}".removesuffix(".0")


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
