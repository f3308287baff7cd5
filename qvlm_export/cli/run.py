"""The command `qvlm-run`: asks an exported model questions about images, once or in a chat."""

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
    "chat: one line a turn; /image PATH adds an image to the next turn, /new starts again without history and images, "
    "Ctrl-C ends an answer, /quit ends the chat"
)
_COMMAND = re.compile(r"/[a-z]+( |$)")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES, cls=OneLineErrors)
def main(
    plan: Annotated[Path, typer.Argument(help="X.plan as written by qvlm-export")],
    prompt: Annotated[str | None, typer.Option(help="question to ask")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="image file; repeat for more")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask line by line; the history stays in the KV cache")] = False,
    runtime: Annotated[str, typer.Option(help="auto, tensorrt, tensorrt-rtx, onnxruntime or onnxruntime:cpu")] = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="ONNX Runtime: round activations of INT4 linears to 8 bits")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="sampling temperature; 0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the likeliest tokens that have this probability together")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1, tokens that occurred before become less likely")] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end the answer before this text; repeat for more")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable answer on stdout")] = False,
) -> None:
    """Asks an exported model questions about images."""
    with errors_as_lines(), _report_interruption():
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
            pieces = conversation.say(prompt, pictures, settings)  # raises UserError at once, before the runtime is shown
            if as_json:
                _print_answer(model, conversation, pieces)
            else:
                _show_runtime(model)
                _show_answer(pieces)
                _explain_cut(model, conversation)


@contextmanager
def _report_interruption() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _chat(model: LoadedModel, images: list[Image.Image], settings: Generation, as_json: bool) -> None:
    """Answers turns until the end of input or `/quit`. A turn that fails is reported in a line; the chat goes on."""
    from qvlm_export.engines.runtime.session import ContextError

    conversation, waiting = model.chat(), list(images)
    if not as_json:
        _show_runtime(model)
        print(CHAT_HELP, file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() and not as_json else ""
    if prompt:
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  # gives input() line editing and a history
    while (line := _read_line(prompt)) is not None and line != "/quit":
        try:
            if line == "/new":
                conversation, waiting = model.chat(), []
            elif _COMMAND.match(line):
                waiting.append(_open_requested_image(line))
            elif line:
                pieces = conversation.say(line, waiting, settings)
                waiting = []  # the turn is part of the conversation now, even if its answer fails
                if as_json:
                    _print_answer(model, conversation, pieces)
                else:
                    _show_answer(pieces)
                    _explain_cut(model, conversation, "; /new begins a new conversation")
        except UserError as error:
            hint = ""
            if waiting and not _COMMAND.match(line):
                hint = f"; pictures that wait for the next turn: {len(waiting)}, /new drops them"
            elif isinstance(error, ContextError):
                hint = "; /new begins a new conversation"
            _print_error(f"{' '.join(str(error).split())}{hint}", as_json)
        except KeyboardInterrupt:  # ends the answer, but not the conversation
            print("interrupted", file=sys.stderr)


def _read_line(prompt: str) -> str | None:
    """Returns the next line that the user types; None at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        if prompt:
            print()  # so that the prompt of the shell starts on a line of its own
        return None


def _open_requested_image(line: str) -> Image.Image:
    """Returns the image of `/image PATH`.

    Raises UserError when it cannot be opened, and for any other command, as a mistyped command must not become a question.
    """
    from qvlm_export.inputs.images import open_image

    command, _, path = line.partition(" ")
    if command != "/image":
        raise UserError(f"{command}: unknown; there are /image PATH, /new and /quit")
    if not path.strip():
        raise UserError("/image: give the path of a picture behind it")
    return open_image(Path(path.strip()), "/image")


def _print_error(message: str, as_json: bool) -> None:
    """Prints an error in a chat, as JSON on stdout or as a line on stderr."""
    if as_json:
        print(json.dumps({"error": message}), flush=True)
    else:
        print(f"error: {message}", file=sys.stderr)


def _print_answer(model: LoadedModel, conversation: Chat, pieces: Iterator[str]) -> None:
    """Prints the answer as one line of JSON."""
    runner, answer = model.session.runner, "".join(pieces)
    content = {"runtime": runner.name, "device": runner.device, "answer": answer, "ended": conversation.ended}
    print(json.dumps(content), flush=True)


def _explain_cut(model: LoadedModel, conversation: Chat, cure: str = "") -> None:
    """Says on stderr when the answer was cut off, so that nobody takes it for a complete one, and why."""
    if conversation.ended == "max_new_tokens":
        print("cut off: --max-new-tokens allows no more", file=sys.stderr)
    elif conversation.ended == "context":
        length = model.manifest.limits.max_length
        print(f"cut off: the context of {length} tokens is full; export with a larger --max-length{cure}", file=sys.stderr)


def _show_runtime(model: LoadedModel) -> None:
    """Says on stderr which runtime answers, and why it was chosen. Called once nothing stands in the way of an answer."""
    runner = model.session.runner
    place = f" on {runner.device.upper()}" if runner.name == "onnxruntime" else ""
    print(f"runtime: {runner.name}{place} ({model.session.why})", file=sys.stderr)


def _show_answer(pieces: Iterator[str]) -> None:
    """Prints the pieces of an answer as they come, and ends the line even when the answer is interrupted."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
