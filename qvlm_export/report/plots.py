"""Draws the plots of the report with matplotlib, as SVG that is the same to the byte for the same numbers.

matplotlib's global settings are neither used nor changed. Labels are numbers and words of this file, never names from a
checkpoint, so that the SVG needs no escaping.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from qvlm_export.report.contents import COMPONENTS
from qvlm_export.report.rows import MODALITIES, BlockRow, LayerRow, LinearRow, Place

# The palette of Okabe and Ito, which colour-blind readers can tell apart, too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
# Linears of the same function have one colour in all families.
LINEAR_KINDS = {
    "query, key": ("q_proj", "k_proj"),
    "value": ("v_proj",),
    "attention output": ("o_proj", "out_proj"),
    "MLP in": ("gate_proj", "up_proj", "fc1", "linear_1"),
    "MLP out": ("down_proj", "fc2", "linear_2"),
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text is kept as text, which is smaller and can be searched
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def plot_errors(blocks: Sequence[BlockRow]) -> str:
    """Returns the SVG of the blocks' output errors by modality, round-to-nearest and as searched, on a logarithmic axis."""
    with _figure("errors") as (axes, svg):
        axes.set_yscale("log")
        for color, modality in zip(COLORS, MODALITIES, strict=False):
            for dashes, errors in (("-", [row.errors for row in blocks]), ("--", [row.rtn_errors for row in blocks])):
                points = [(k, error[modality]) for k, error in enumerate(errors) if error.get(modality, 0) > 0]
                label = modality if dashes == "-" else "_"  # one entry in the legend for each modality
                for _, part in itertools.groupby(points, key=lambda point: blocks[point[0]].place.component):
                    x, y = zip(*part, strict=True)
                    axes.plot(x, y, dashes, marker="o", markersize=4 if dashes == "-" else 2, color=color, label=label)
                    label = "_"
        axes.set_ylabel("relative squared error")
        _label_places(axes, [row.place for row in blocks])
        axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return svg[0]


def plot_entropies(layers: Sequence[LayerRow], thresholds: Mapping[str, float]) -> str:
    """Returns the SVG of the input entropies by bits, with the boundaries between blocks that Q-VLM would search jointly."""
    with _figure("entropies") as (axes, svg):
        for color, bits in zip(COLORS, sorted({row.bits for row in layers}), strict=False):
            points = [(k, row.entropy) for k, row in enumerate(layers) if row.bits == bits]
            x, y = zip(*points, strict=True)
            axes.bar(x, y, width=0.7, color=color, label=f"{bits} bits")
            if str(bits) in thresholds:
                axes.axhline(thresholds[str(bits)], color=color, linewidth=1, linestyle="--")
        for k, row in enumerate(layers):
            if row.starts_block and k:
                axes.axvline(k - 0.5, color="#555555", linewidth=0.5)
        axes.set_ylabel("entropy, nats")
        _label_places(axes, [row.place for row in layers])
        axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    return svg[0]


def plot_sqnr(linears: Sequence[LinearRow]) -> str:
    """Returns the SVG of the SQNR of every quantized linear over the blocks, by the function of the linear."""
    rows = [row for row in linears if row.record.get("sqnr_db") is not None]
    places = list(dict.fromkeys(row.place for row in rows))
    with _figure("sqnr") as (axes, svg):
        for color, (kind, names) in zip(COLORS, LINEAR_KINDS.items(), strict=False):
            of_kind = [row for row in rows if row.linear.name.rpartition(".")[2] in names]
            if of_kind:
                x, y = [places.index(row.place) for row in of_kind], [row.record["sqnr_db"] for row in of_kind]
                axes.plot(x, y, "o", markersize=5, color=color, alpha=0.8, label=kind)
        axes.set_ylabel("SQNR, dB")
        _label_places(axes, places)
        axes.legend(ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    return svg[0]


def _label_places(axes: Axes, places: Sequence[Place]) -> None:
    """Writes the components' names below the axis and the numbers of their blocks on it."""
    axes.set_xlim(-0.7, len(places) - 0.3)
    ticks: dict[int, str] = {}
    start = 0
    for component, part in itertools.groupby(places, key=lambda place: place.component):
        numbers = [place.number for place in part]
        stop = start + len(numbers)
        label = component.replace("_", " ") if component in COMPONENTS else "other"
        middle = (start + stop - 1) / 2
        axes.annotate(
            label, (middle, -0.13), xycoords=("data", "axes fraction"), ha="center", va="top", annotation_clip=False
        )
        if start:
            axes.axvline(start - 0.5, color="#000000", linewidth=1)
        firsts = [k for k, n in enumerate(numbers) if n is not None and (k == 0 or numbers[k - 1] != n)]
        every = -(-len(places) * len(firsts) // (30 * max(1, len(numbers))))  # about 30 numbers have room
        ticks |= {start + k: str(numbers[k]) for k in firsts if (numbers[k] or 0) % max(1, every) == 0}
        start = stop
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.set_xticklabels(list(ticks.values()))


@contextmanager
def _figure(name: str) -> Iterator[tuple[Axes, list[str]]]:
    """Yields axes to draw on, and a list that gets the SVG element when the context ends.

    The ids in the SVG begin with `name`, so that several plots can be in one page.
    """
    svg: list[str] = []
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's matplotlibrc
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        yield figure.add_subplot(), svg
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = file.getvalue()
    svg.append(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text[text.index("<svg") :]))
