"""The command `qvlm-run`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.commands import INTERRUPTED
from qvlm_export.cli.common import OneLineErrors, errors_as_lines

if TYPE_CHECKING:
    from PIL import Image

    from qvlm_export.inference.model import Chat, Generation, LoadedModel

EXAMPLES = """
Examples:

  qvlm-run engine.plan --image photo.png --prompt "What is in the picture?"

  qvlm-run engine.plan --image a.png --image b.png --prompt "What differs?" --temperature 0.7 --seed 1

  qvlm-run engine.plan --image photo.png --chat
"""

CHAT_HELP = (
    "chat: one line a turn; /image PATH shows a picture with the next turn, /new begins without history and pictures, "
    "Ctrl-C ends an answer, /quit the chat"
)
_COMMAND = re.compile(r"/[a-z]+( |$)")

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
        from qvlm_export.inference.model import Generation, load
        from qvlm_export.inputs.images import open_image

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
                _chat(model, pictures, settings, as_json)
                return
            conversation = model.chat()
            pieces = conversation.say(prompt, pictures, settings)  # refuses what it cannot take
            if as_json:
                _print_answer(model, conversation, pieces)
            else:
                _show_runtime(model)
                _show(pieces)
                _say_why_cut(model, conversation)


@contextmanager
def _interruption_as_line() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _chat(model: LoadedModel, pictures: list[Image.Image], settings: Generation, as_json: bool) -> None:
    """Reads turns until end of input. A turn that cannot be taken costs a line, not the conversation."""
    from qvlm_export.engines.runtime.session import ContextError

    conversation, shown = model.chat(), list(pictures)
    if not as_json:
        _show_runtime(model)
        print(CHAT_HELP, file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() and not as_json else ""
    if prompt:
        with suppress(ImportError):  # not in every Python
            import readline  # noqa: F401  # input() then has keys to edit a line, and to fetch earlier ones
    while (line := _next_line(prompt)) is not None and line != "/quit":
        try:
            if line == "/new":
                conversation, shown = model.chat(), []
            elif _COMMAND.match(line):
                shown.append(_picture(line))
            elif line:
                pieces = conversation.say(line, shown, settings)
                shown = []  # the turn is taken, whatever becomes of its answer
                if as_json:
                    _print_answer(model, conversation, pieces)
                else:
                    _show(pieces)
                    _say_why_cut(model, conversation, "; /new begins a new conversation")
        except UserError as error:
            way_out = ""
            if shown and not _COMMAND.match(line):
                way_out = f"; pictures that wait for the next turn: {len(shown)}, /new drops them"
            elif isinstance(error, ContextError):
                way_out = "; /new begins a new conversation"
            _complain(f"{' '.join(str(error).split())}{way_out}", as_json)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print("interrupted", file=sys.stderr)


def _next_line(prompt: str) -> str | None:
    """What the user types next; None at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        if prompt:
            print()  # the shell's prompt gets a line of its own
        return None


def _picture(line: str) -> Image.Image:
    """The picture of `/image PATH`. Raises UserError, for other commands too: a mistyped one is no question."""
    from qvlm_export.inputs.images import open_image

    command, _, path = line.partition(" ")
    if command != "/image":
        raise UserError(f"{command}: unknown; there are /image PATH, /new and /quit")
    if not path.strip():
        raise UserError("/image: give the path of a picture behind it")
    return open_image(Path(path.strip()), "/image")


def _complain(message: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message}), flush=True)
    else:
        print(f"error: {message}", file=sys.stderr)


def _print_answer(model: LoadedModel, conversation: Chat, pieces: Iterator[str]) -> None:
    """One line of JSON."""
    runner, answer = model.session.runner, "".join(pieces)
    content = {"runtime": runner.name, "device": runner.device, "answer": answer, "ended": conversation.ended}
    print(json.dumps(content), flush=True)


def _say_why_cut(model: LoadedModel, conversation: Chat, cure: str = "") -> None:
    """Half an answer must not pass for a whole one."""
    if conversation.ended == "max_new_tokens":
        print("cut off: --max-new-tokens allows no more", file=sys.stderr)
    elif conversation.ended == "context":
        length = model.manifest.limits.max_length
        print(f"cut off: the context of {length} tokens is full; export with a larger --max-length{cure}", file=sys.stderr)


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
