"""The command `qvlm-run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qvlm_export.cli import errors_as_lines

EXAMPLES = """
Examples:

  qvlm-run engine.plan --image photo.png --prompt "What is in the picture?"

  qvlm-run engine.plan --image a.png --image b.png --prompt "What differs?" --max-new-tokens 128
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
def main(
    plan: Annotated[Path, typer.Argument(help="X.plan as qvlm-export wrote it")],
    prompt: Annotated[str, typer.Option(help="what to ask")],
    image: Annotated[list[Path] | None, typer.Option(help="a picture; repeat for more")] = None,
    runtime: Annotated[str, typer.Option(help="auto or onnxruntime")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable answer")] = False,
) -> None:
    """Asks an exported model a question about pictures."""
    with errors_as_lines():
        from qvlm_export.images import open_image
        from qvlm_export.loading import load

        pictures = [open_image(path, "--image") for path in image or []]
        with load(plan, runtime) as model:
            if as_json:
                answer = model.generate(prompt, pictures, max_new_tokens)
                print(json.dumps({"runtime": model.session.runner.name, "answer": answer}))
                return
            for piece in model.stream(prompt, pictures, max_new_tokens):
                print(piece, end="", flush=True)
            print()
