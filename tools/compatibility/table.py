"""Runs every compatibility case and writes the table of what transformers gives and what this package gives.

python -m tools.compatibility.table --out docs/compatibility.md
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.compatibility import damage, hub, models, running, system
from tools.compatibility.case import Case

# Heading of a section of the table -> its cases.
SECTIONS: dict[str, Sequence[Case]] = {
    "The model that is given": models.LEFTOVERS,
    "Sources and targets of other kinds": models.SOURCES,
    "Downloads from the Hub": hub.CASES,
    "Pictures, prompts and answers": running.CASES,
    "Damage": damage.CASES,
    "Names, values, interruptions": system.CASES,
}

INTRODUCTION = """# Compatibility: what users really have

Made by `python -m tools.compatibility.table --out docs/compatibility.md`; every row is one run. "transformers" is what its
own model, processor or loader gives on the same input; a dash stands where it has no such step.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    parser.add_argument("--only", default="", help="run only sections and titles that contain this text")
    arguments = parser.parse_args()
    arguments.out.write_text(make_page(arguments.only), encoding="utf-8")


def make_page(only: str = "") -> str:
    """Returns the page in Markdown. only: run only sections and titles that contain this text."""
    parts = [INTRODUCTION]
    for heading, cases in SECTIONS.items():
        chosen = [case for case in cases if only in heading or only in case.title]
        if chosen:
            parts.append(
                "\n".join(
                    [
                        f"## {heading}\n",
                        "| case | transformers | qvlm-export |",
                        "|---|---|---|",
                        *map(_make_row, chosen),
                        "",
                    ]
                )
            )
    return "\n".join(parts)


def _make_row(case: Case) -> str:
    with tempfile.TemporaryDirectory() as name:
        outcome = case.run(Path(name).resolve())
    cells = (case.title, *(re.sub(r"(127\.0\.0\.1):\d+", r"\1:N", cell) for cell in (outcome.transformers, outcome.ours)))
    print(" | ".join(cells), flush=True)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    main()
