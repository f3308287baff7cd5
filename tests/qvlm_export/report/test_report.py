"""X.report.html: its numbers must be those of the calibration record, and the page must need no other file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commands import write_calibration

import qvlm_export
from qvlm_export.engines.manifest import Manifest, read_manifest
from qvlm_export.report.contents import inspect
from qvlm_export.report.report import header_facts, layer_rows, place_of, report_html, write_report

Llava = Callable[..., Path]
PLOTS = ["Error of each block", "Entropy of each layer", "SQNR of each linear's output"]
VOID = {"meta", "br", "link", "img", "input", "hr", "base", "source"}


class Page(HTMLParser):
    """A parsed page: tables by id as rows of texts, headings, ids, and every attribute that could load something.

    Parsing fails for unclosed tags.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._open: list[str] = []
        self._table = ""
        self._text: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [
            v for n, v in attributes.items() if n in ("src", "href", "xlink:href", "data", "action", "poster", "srcset")
        ]
        self.links += [v for n, v in attributes.items() if "url(" in v and n == "style"]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = attributes["id"]
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th", "h1", "h2"):
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self.tables[self._table][-1].append("".join(self._text).strip())
        elif tag in ("h1", "h2"):
            self.headings.append("".join(self._text))


@pytest.fixture(scope="module")
def exports(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exports(scheme, effort) -> X.json of such an export, made once. Do not write beside it."""
    folder, made = tmp_path_factory.mktemp("report"), dict[tuple[str, str], Path]()
    data = write_calibration(folder)

    def make(scheme: str, effort: str) -> Path:
        if (scheme, effort) not in made:
            plan = folder / f"{scheme}-{effort}" / "x.plan"
            qvlm_export.export(str(llava()), plan, backend="onnx", scheme=scheme, effort=effort, calib_data=data)
            made[scheme, effort] = plan.with_suffix(".json")
        return made[scheme, effort]

    return make


@pytest.fixture(scope="module")
def fast(exports: Callable[..., Path]) -> Manifest:
    return read_manifest(exports("int4", "fast"))


def page_beside(manifest: Manifest) -> Page:
    return Page(manifest.path.with_suffix(".report.html").read_text(encoding="utf-8"))


def engine_checks(manifest: Manifest) -> list[dict[str, Any]]:
    """The records that an engine check would have added: for half of the linears, one of which failed."""
    checked = [{"linear": n, "scheme": "W4A16", "executed": "half x int4 -> half", "passed": True} for n in manifest.linears]
    checked[1] = {**checked[1], "executed": "half x half -> half", "passed": False}
    return checked[: len(checked) // 2]


def test_an_export_writes_the_report_and_records_its_hash(fast: Manifest) -> None:
    assert fast.files["report"]["name"] == "x.report.html"
    assert len(fast.files["report"]["sha256"]) == 64
    assert {"report": "verified"}.items() <= {f.role: f.state for f in inspect(fast.path, verify=True).files}.items()


def test_the_same_manifest_gives_the_same_bytes(fast: Manifest, tmp_path: Path) -> None:
    write_report(fast, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == fast.path.with_suffix(".report.html").read_bytes()


def test_the_page_loads_nothing_from_elsewhere(fast: Manifest) -> None:
    page = page_beside(fast)
    assert {link[0] for link in page.links if not link.startswith("url(#")} <= {"#"}
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "img", "base"}
    html = fast.path.with_suffix(".report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\"'<> )]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))


def test_every_internal_reference_has_a_target(fast: Manifest) -> None:
    page = page_beside(fast)
    targets = {link[1:] for link in page.links if link.startswith("#")}
    assert targets
    assert targets <= set(page.ids)


def test_blocks_are_those_of_the_record(fast: Manifest) -> None:
    head, *rows = page_beside(fast).tables["blocks"]
    records = fast.calibration["blocks"]
    assert len(rows) == len(records) == 6
    for cells, record in zip(rows, records, strict=True):
        row = dict(zip(head, cells, strict=True))
        assert row["all"] == f"{record['error']:.2e}"
        compared = record["compared"]
        for name in ("image", "prompt", "answer"):
            assert row[name] == (f"{compared['searched'][name]:.2e}" if name in compared["searched"] else "-")
            assert row[f"{name}, RTN"] == (f"{compared['rtn'][name]:.2e}" if name in compared["rtn"] else "-")
        assert float(row["forwards"]) == record["forwards"]
        assert row["backwards"] == "0"
    vision = [f"vision_tower {n}" for n in range(3)]
    assert [row[0] for row in rows] == [*vision, "projector", "language_model 0", "language_model 1"]


def test_linears_are_those_of_the_record(fast: Manifest) -> None:
    head, *rows = page_beside(fast).tables["linears"]
    records = {n: r for b in fast.calibration["blocks"] for layer in b["layers"] for n, r in layer["linears"].items()}
    by_linear = {cells[0]: dict(zip(head, cells, strict=True)) for cells in rows}
    assert set(by_linear) == {*records, "language_model.lm_head"}
    assert by_linear["language_model.lm_head"]["SQNR, dB"] == ""
    for name, record in records.items():
        row = by_linear[name]
        assert row["scheme"] == record["scheme"] == fast.linears[name]
        assert row["bits per weight"] == f"{record['bits_per_weight']:.3f}"
        assert row["SQNR, dB"] == f"{record['sqnr_db']:.1f}"
        assert row["weight SQNR, dB"] == f"{record['weight_sqnr_db']:.1f}"
        assert row["range"] == ("" if record["range_coverage"] is None else f"{100 * record['range_coverage']:.1f} %")
    assert len({row["SQNR, dB"] for row in by_linear.values()}) > 5


def test_sizes_are_those_of_inspect(fast: Manifest) -> None:
    _, *rows = page_beside(fast).tables["sizes"]
    inspection = inspect(fast.path)
    for cells, part in zip(rows, [*inspection.components, inspection.total], strict=True):
        assert cells[:2] == [part.name, f"{part.parameters:,}"]
        assert cells[4] == ("" if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}")


def test_the_head_has_the_facts_of_the_export(fast: Manifest) -> None:
    facts = header_facts(fast)
    assert (facts["scheme"], facts["effort"], facts["backend"]) == ("int4", "fast", "onnx")
    assert facts["calibration"] == f"2 samples, 2 prompts, {fast.calibration['tokens']} tokens of calibration.jsonl"
    assert facts["search cost"] == f"{fast.calibration['block_forwards']} block forwards"
    with_backwards = replace(fast, calibration={**fast.calibration, "block_backwards": 1234})
    assert header_facts(with_backwards)["search cost"] == f"{facts['search cost']}, 1,234 block backwards"
    assert f"torch {fast.versions['torch']}" in facts["versions"]
    page = page_beside(fast)
    assert page.headings[0] == fast.model["name"]
    assert [heading for heading in page.headings if heading in PLOTS] == PLOTS


def test_entropies_and_boundaries_are_drawn(fast: Manifest) -> None:
    """There is a bar for each layer, and a line at each boundary between jointly searched blocks."""
    layers = layer_rows(fast.calibration)
    assert [layer.entropy for layer in layers] == [x["entropy"] for b in fast.calibration["blocks"] for x in b["layers"]]
    html = report_html(fast)
    all_start = replace(fast, calibration={**fast.calibration, "blocks": start_block_at_every_layer(fast)})
    assert sum(layer.starts_block for layer in layers) < len(layers)
    lines = [len(re.findall(r'id="entropies-line2d_\d+"', text)) for text in (html, report_html(all_start))]
    assert lines[1] - lines[0] == sum(not layer.starts_block for layer in layers)
    blocks = [*fast.calibration["blocks"]]
    blocks[-1] = {**blocks[-1], "layers": blocks[-1]["layers"][:-1]}
    shorter = report_html(replace(fast, calibration={**fast.calibration, "blocks": blocks}))
    bars = [len(re.findall(r'id="entropies-patch_\d+"', text)) for text in (html, shorter)]
    assert bars[0] - bars[1] == 1


def start_block_at_every_layer(manifest: Manifest) -> list[dict[str, Any]]:
    blocks = manifest.calibration["blocks"]
    return [{**b, "layers": [{**layer, "starts_block": True} for layer in b["layers"]]} for b in blocks]


def test_kernels_come_from_the_engine_check(fast: Manifest) -> None:
    checks = engine_checks(fast)
    page = Page(report_html(replace(fast, plan_check=tuple(checks))))
    kernels = {cells[0]: cells[-1] for cells in page.tables["linears"]}
    assert kernels.pop("linear") == "kernel operands"
    assert {name: text for name, text in kernels.items() if text} == {c["linear"]: c["executed"] for c in checks}
    assert f"{len(checks) - 1} of {len(checks)} quantized linears run on integers" in report_html(
        replace(fast, plan_check=tuple(checks))
    )
    assert page_beside(fast).tables["linears"][0][-1] == "weight SQNR, dB"


def test_sections_without_records_are_left_out(exports: Callable[..., Path]) -> None:
    manifest = read_manifest(exports("fp16", "rtn"))
    page = page_beside(manifest)
    assert page.headings[1:] == ["Size of the weights", "Linears"]
    assert "svg" not in page.tags
    assert page.tables["linears"][0] == ["linear", "shape", "scheme"]
    assert {cells[2] for cells in page.tables["linears"][1:]} == {"float16"}
    assert not {"calibration", "search cost"} & header_facts(manifest).keys()


def test_an_rtn_export_has_bits_ranges_and_weight_sqnr(exports: Callable[..., Path]) -> None:
    manifest = read_manifest(exports("int4", "rtn"))
    page = page_beside(manifest)
    assert page.headings[1:] == ["Size of the weights", "Linears"]
    assert "svg" not in page.tags
    head, *rows = page.tables["linears"]
    records = {name: record for block in manifest.calibration["blocks"] for name, record in block["linears"].items()}
    by_linear = {cells[0]: dict(zip(head, cells, strict=True)) for cells in rows}
    assert by_linear.keys() == {*records, "language_model.lm_head"}
    for name, record in records.items():
        row = by_linear[name]
        assert row["scheme"] == manifest.linears[name]
        assert row["bits per weight"] == f"{record['bits_per_weight']:.3f}"
        assert row["weight SQNR, dB"] == f"{record['weight_sqnr_db']:.1f}"
        assert row["SQNR, dB"] == ""
        assert row["range"] in (
            {"100.0 %", "100.1 %"} if row["scheme"] == "W8A8" else {""}
        )  # the scale is rounded to float16
    forwards = f"{manifest.calibration['block_forwards']} block forwards"
    assert header_facts(manifest)["search cost"] == forwards


def test_the_page_of_q_vlm_shows_partition_percentiles_and_errors(exports: Callable[..., Path]) -> None:
    manifest = read_manifest(exports("int4", "qvlm"))
    page, records = page_beside(manifest), manifest.calibration["blocks"]
    assert [heading for heading in page.headings if heading in PLOTS] == PLOTS
    head, *rows = page.tables["searches"]
    searches = [(block, search) for block in records for search in block["joint_searches"]]
    assert len(rows) == len(searches)
    layers = iter([layer for block in records for layer in block["layers"]])
    for cells, (block, search) in zip(rows, searches, strict=True):
        row, part = dict(zip(head, cells, strict=True)), [next(layers) for _ in range(search["layers"])]
        assert row["block"] == str(place_of(block["name"]))
        names = "; ".join(", ".join(n.removeprefix(f"{block['name']}.") for n in layer["linears"]) for layer in part)
        assert row["layers"] == names
        assert [layer["starts_block"] for layer in part] == [True] + [False] * (len(part) - 1)
        percentiles = [[layer[f"{kind}_percentile"] for layer in part] for kind in ("activation", "weight")]
        for column, shares in zip(("inputs, %", "weights, %"), percentiles, strict=True):
            assert row[column] == "; ".join("float" if share is None else f"{100 * share:.1f}" for share in shares)
        assert row["absmax"] == f"{search['error_before']:.2e}"
        assert row["chosen"] == f"{search['error_after']:.2e}"
    decoder = [cells[2] for cells in rows if cells[0].startswith("language")]
    assert decoder
    assert all(set(text.split("; ")) == {"float"} for text in decoder)
    facts = header_facts(manifest)
    assert facts["effort"] == "qvlm"
    assert facts["method"].startswith("partition entropy, vision epochs 10")
    assert "block backwards" in facts["search cost"]
    assert " of 4 blocks tuned on 2 samples" in facts["visual encoder"]
    assert "would search" not in report_html(manifest)
    assert "fallbacks" not in page.tables


def test_names_are_escaped(fast: Manifest) -> None:
    hostile = "</title><script>alert('$x^2$')</script>&amp;\"'"
    blocks = [{**block, "name": hostile} for block in fast.calibration["blocks"]]
    manifest = replace(
        fast,
        model={**fast.model, "name": hostile},
        scheme=hostile,
        calibration={**fast.calibration, "data": hostile, "effort": hostile, "blocks": blocks},
        versions={hostile: hostile},
        backend={"name": hostile, "version": hostile, "targets": [hostile]},
        plan_check=tuple({**check, "executed": hostile} for check in engine_checks(fast)),
    )
    page = Page(report_html(manifest))
    assert "script" not in page.tags
    assert page.headings[0] == hostile
    assert page.tables["blocks"][1][0] == hostile
    assert hostile in {cells[-1] for cells in page.tables["linears"]}


def test_zero_and_missing_errors_do_not_break_the_report(fast: Manifest) -> None:
    block = {
        **fast.calibration["blocks"][0],
        "compared": {"inputs": 1, "rtn": {"image": 0.0}, "searched": {"image": 0.0}},
        "error": 0.0,
    }
    without_layers = {**block, "layers": []}
    page = Page(report_html(replace(fast, calibration={**fast.calibration, "blocks": [block, without_layers]})))
    assert [row[0] for row in page.tables["blocks"][1:]] == ["vision_tower 0", "vision_tower 0"]
    assert PLOTS[0] not in page.headings


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vision_tower.vision_model.encoder.layers.11", "vision_tower 11"),
        ("language_model.model.layers.3.mlp.down_proj", "language_model 3"),
        ("multi_modal_projector", "projector"),
        ("multi_modal_projector.linear_1", "projector"),
        ("language_model.lm_head", "lm_head"),
        ("no_such", "no_such"),
    ],
)
def test_place_of_block_and_linear_names(name: str, place: str) -> None:
    assert str(place_of(name)) == place
