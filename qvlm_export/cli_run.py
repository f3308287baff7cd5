"""The command `qvlm-run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calibrate.errors import UserError
from qvlm_export.cli import OneLineErrors, errors_as_lines
from qvlm_export.commands import INTERRUPTED

if TYPE_CHECKING:
    from PIL import Image

    from qvlm_export.loading import Generation, LoadedModel

EXAMPLES = """
Examples:

  qvlm-run engine.plan --image photo.png --prompt "What is in the picture?"

  qvlm-run engine.plan --image a.png --image b.png --prompt "What differs?" --temperature 0.7 --seed 1

  qvlm-run engine.plan --image photo.png --chat
"""

CHAT_HELP = "chat: one line a turn; /image PATH shows a picture with the next turn, Ctrl-C ends an answer, /quit the chat"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    plan: Annotated[Path, typer.Argument(help="X.plan as qvlm-export wrote it")],
    prompt: Annotated[str | None, typer.Option(help="what to ask")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="a picture; repeat for more")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="go on asking, the history stays in the cache")] = False,
    runtime: Annotated[str, typer.Option(help="auto, tensorrt, tensorrt-rtx, onnxruntime or onnxruntime:cpu")] = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="ONNX Runtime: round INT4 products' activations to 8 bits")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="keep the likeliest tokens with this much probability")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 discourages repeating")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end the answer before this text; repeat for more")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable answer")] = False,
) -> None:
    """Asks an exported model questions about pictures."""
    with errors_as_lines(), _interruption_as_line():
        from qvlm_export.images import open_image
        from qvlm_export.loading import Generation, load

        if (prompt is None) != chat:
            raise UserError("give --prompt, or --chat to ask line by line")
        settings = Generation(
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop=stop or (),
        )
        pictures = [open_image(path, "--image") for path in image or []]
        with load(plan, runtime, fast) as model:
            if prompt is None:
                _chat(model, pictures, settings)
                return
            pieces = model.generate(prompt, pictures, settings, stream=True)  # refuses what it cannot take
            if as_json:
                runner = model.session.runner
                print(json.dumps({"runtime": runner.name, "device": runner.device, "answer": "".join(pieces)}))
            else:
                _show_runtime(model)
                _show(pieces)


@contextmanager
def _interruption_as_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _chat(model: LoadedModel, pictures: list[Image.Image], settings: Generation) -> None:
    """Reads turns until end of input. A turn that cannot be taken costs a line, not the conversation."""
    from qvlm_export.images import open_image

    conversation = model.chat()
    shown = list(pictures)
    _show_runtime(model)
    print(CHAT_HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/image "):
                shown.append(open_image(Path(line.removeprefix("/image ").strip()), "/image"))
            elif line:
                pieces = conversation.say(line, shown, settings)
                shown = []  # the turn is taken, whatever becomes of its answer
                _show(pieces)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print("interrupted", file=sys.stderr)


def _show_runtime(model: LoadedModel) -> None:
    """What answers, and why; on stderr, once nothing stands in the way of an answer."""
    runner = model.session.runner
    place = f" on {runner.device.upper()}" if runner.name == "onnxruntime" else ""
    print(f"runtime: {runner.name}{place} ({model.session.why})", file=sys.stderr)


def _show(pieces: Iterator[str]) -> None:
    """Prints the pieces as they come, and ends the line however they end."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
