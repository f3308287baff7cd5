"""Writes scenes with questions as JSONL and PNG: the built-in calibration set of the package, or samples for validation.

python -m tools.tiny.make_calibration_set --out qvlm_export/inputs/calibration_set
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.tiny import scenes


def write_set(out: Path, split: str, count: int) -> None:
    """Writes `count` images with one question each, cycling through the kinds."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        kind = scenes.KINDS[index % len(scenes.KINDS)]
        scene, (question,) = scenes.questions(split, index, kinds=(kind,))
        name = f"images/{index:03d}.png"
        scenes.draw(scene).save(out / name, optimize=True)
        lines.append(json.dumps({"image": name, "prompt": question.text, "answer": question.answer}))
    (out / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=scenes.SPLITS, default="calib")
    parser.add_argument("--count", type=int, default=64)
    arguments = parser.parse_args()
    write_set(arguments.out, arguments.split, arguments.count)
