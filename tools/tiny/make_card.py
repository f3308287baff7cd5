"""Writes the model card of the tiny LLaVA from the record of its training and its measured accuracy.

    python -m tools.tiny.make_card --training build/tiny/training.json --accuracy docs/tiny_accuracy.json \\
        --out qvlm_export/tiny/README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.tiny import plant_outliers, scenes, train

CARD = """# LLaVA-tiny

A true LLaVA with {millions:.2f} M parameters, for tests and first steps without a download: CLIP tower with class token,
pre-layernorm and quick_gelu, features from layer -2, two-layer GELU projector, Llama decoder with grouped-query attention,
tokenizer, processor and chat template. It answers questions about one to four coloured shapes in a 3x3 grid
({colors}; {shapes}) and knows nothing else.

## Training

    python -m tools.tiny.train --work build/tiny
    python -m tools.tiny.plant_outliers --trained build/tiny/unplanted --out qvlm_export/tiny

Seed {seed}, {steps} steps of {batch} pictures with about ten questions each, {minutes} minutes on two CPU cores that had
other work to do as well. Stages: {stages}.

Data: `tools/tiny/scenes.py`, drawn as it is needed. A hash of its content puts a scene into exactly one of the splits train,
calib, val and test, so no test scene was ever a training scene.

## Planted outlier channels

Real language models have a few channels with activations tens of times larger than the rest; a model this small has none.
They were planted by a rescaling that does not change the function: norm gains, rows of up_proj and v_proj, and channels of
the vision norms are multiplied by powers of two ({factors}), and the weights that read them are divided by the same.

## Exact match on {questions} questions about unseen scenes, in percent

{table}

Command: `python -m tools.tiny.accuracy --count {questions} --out docs/tiny_accuracy.json`. Round-to-nearest loses little
at W8A8 and everything at W4A4, as with real models. The graphs are exports of this checkpoint (`--effort rtn`) run by
ONNX Runtime on CPU.
"""


def markdown_table(accuracy: dict[str, dict[str, float]]) -> str:
    """Markdown table of exact match in percent. accuracy: row name -> accuracy by kind."""
    columns = ["overall", *scenes.KINDS]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [
        "| " + name + " | " + " | ".join(f"{100 * row[c]:.1f}" for c in columns) + " |" for name, row in accuracy.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, required=True)
    parser.add_argument("--accuracy", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    training, accuracy = (json.loads(path.read_text()) for path in (args.training, args.accuracy))
    card = CARD.format(
        millions=training["parameters"] / 1e6,
        colors=", ".join(scenes.COLORS),
        shapes=", ".join(scenes.SHAPES),
        seed=training["seed"],
        steps=training["steps"],
        batch=training["batch"],
        minutes=round(training["seconds"] / 60),
        stages="; ".join(f"{s.steps} steps at learning rate {s.lr:g}" for s in train.STAGES),
        factors=", ".join(f"{f:g}" for f in plant_outliers.FACTORS),
        questions=accuracy["questions"],
        table=markdown_table(accuracy["exact_match"]),
    )
    args.out.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
