"""`qvlm-run --chat` and Ctrl-C, with and without a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PICTURE, RUNTIME, copy_checkpoint, export_to, run_model
from PIL import Image
from safetensors.numpy import load_file, save_file
from shell import restore_interrupts
from typer.testing import CliRunner, Result

import qvlm_export
from qvlm_export.cli.run import app

Llava = Callable[..., Path]
SCRIPT = Path(sys.executable).with_name("qvlm-run")


def test_chat_goes_on_after_bad_turns(exported: Path, tmp_path: Path) -> None:
    """Each bad turn prints one line and leaves the conversation unchanged."""
    Image.new("RGB", (50, 50), (10, 200, 10)).save(tmp_path / "green.png")
    lines = [
        "What is it?",
        "/image /no/such.png",
        f"/image {tmp_path / 'green.png'}",
        "",
        "<image>",
        "word " * 300,
        "And now?",
        "/quit",
        "x",
    ]
    arguments = [str(exported), "--chat", "--image", str(PICTURE), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input="\n".join(lines))
    assert result.exit_code == 0, result.exception
    with qvlm_export.load(exported) as model:
        chat = model.chat()
        first = "".join(chat.say("What is it?", [Image.open(PICTURE)], max_new_tokens=4))
        second = "".join(chat.say("And now?", [Image.open(tmp_path / "green.png")], max_new_tokens=4))
    assert result.stdout == f"{first}\n{second}\n"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    expected = ("/no/such.png", "2 times <image> for 1 pictures", "the context would be")
    assert [words in error for words, error in zip(expected, errors, strict=True)] == [True] * 3
    assert result.stderr.startswith(f"{RUNTIME}chat: ")


def run_chat(plan: Path, lines: list[str], *arguments: str) -> Result:
    """Runs a chat with these lines as input and one image, which must succeed."""
    options = [str(plan), "--chat", "--image", str(PICTURE), "--max-new-tokens", "4", *arguments]
    result = CliRunner().invoke(app, options, input="\n".join(lines))
    assert result.exit_code == 0, result.exception
    return result


def test_a_chat_with_too_many_images_can_go_on(exported: Path) -> None:
    """Images of a refused turn wait for the next one, which the error says; /new drops them with the history."""
    lines = ["What?", *[f"/image {PICTURE}"] * 5, "And those?", "And now?", "/new", "What?"]
    result = run_chat(exported, lines)
    answers, errors = result.stdout.split("\n"), [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 2
    assert all(e.startswith("error: 5 images at once") and "wait for the next turn: 5, /new drops" in e for e in errors)
    assert answers[1] == run_model(exported, "--prompt", "What?", "--max-new-tokens", "4").stdout.removesuffix("\n")
    full = run_chat(exported, ["What?", "word " * 300])
    assert "the context would be" in full.stderr
    assert "; /new begins a new conversation\n" in full.stderr


def test_a_mistyped_command_is_not_taken_for_a_question(exported: Path) -> None:
    result = run_chat(exported, ["/image", "/imgae a.png", "/help", "/usr/bin is what?"])
    assert result.stdout.count("\n") == 1
    assert result.stderr.count("error: ") == 3
    assert "/image: give the path of a picture" in result.stderr
    assert "/imgae: unknown; there are /image PATH, /new and /quit\n" in result.stderr


def test_a_chat_in_json(exported: Path) -> None:
    """Each turn prints one object on stdout, errors included, and nothing on stderr."""
    result = run_chat(exported, ["What?", "<image>", "And now?"], "--json")
    first, refused, second = map(json.loads, result.stdout.splitlines())
    assert result.stderr == ""
    assert refused == {"error": "the prompt: has 1 times <image> for 0 pictures; the chat template places them, so leave "
                                "<image> out"}  # fmt: skip
    plain = run_chat(exported, ["What?", "<image>", "And now?"]).stdout
    assert plain == f"{first['answer']}\n{second['answer']}\n"
    assert (first["runtime"], first["device"], first["ended"]) == ("onnxruntime", "cpu", "max_new_tokens")


def test_an_answer_that_is_cut_off_is_reported(talkative: Path) -> None:
    result = run_model(talkative, "--prompt", "What?", "--max-new-tokens", "3")
    assert result.stderr == f"{RUNTIME}cut off: --max-new-tokens allows no more\n"


@pytest.fixture(scope="module")
def talkative(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan path of an export that never generates the end token, and has room for an answer that takes many seconds."""
    folder = tmp_path_factory.mktemp("talkative")
    checkpoint = copy_checkpoint(llava(text={"max_position_embeddings": 4096}), folder / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    (head,) = (array for name, array in tensors.items() if name.endswith("lm_head.weight"))
    head[2] = 0  # the logit of </s> is 0, and one of the other 511 is larger
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    export_to(checkpoint, folder / "x.plan", "--backend", "onnx", "--scheme", "fp16", "--max-length", "4096")
    return folder / "x.plan"


LONG = ("--prompt", "What?", "--max-new-tokens", "4000")


def test_ctrl_c_ends_an_answer(talkative: Path) -> None:
    command = [sys.executable, SCRIPT, talkative, *LONG]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipes, preexec_fn=restore_interrupts) as process:  # noqa: PLW1509
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, f"{RUNTIME}interrupted\n")
    answer = first + rest
    assert answer.endswith("\n")
    beginning = run_model(talkative, *LONG[:-1], "20").stdout
    # The last character may have been interrupted in the middle of its bytes.
    assert beginning.startswith(answer.removesuffix("\n").rstrip("\ufffd")[:15])


def _take_terminal() -> None:
    """Makes stdin the controlling terminal of the child process."""
    restore_interrupts()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A command on a pseudo-terminal of its own: typed text reaches it as keys, Ctrl-C as a signal."""

    def __init__(self, *command: object) -> None:
        self.master, self._slave = pty.openpty()
        self.before = termios.tcgetattr(self._slave)
        self.output = ""
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509
        )

    def type(self, keys: str) -> None:
        """Sends keys to the command."""
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str) -> None:
        """Reads output until what this call has read matches `pattern`."""
        received = ""
        while not re.search(pattern, received):
            ready, _, _ = select.select([self.master], [], [], 60)
            assert ready, f"{pattern!r} did not come: {self.output + received!r}"
            received += os.read(self.master, 4096).decode(errors="replace")
        self.output += received

    def is_running(self, seconds: float) -> bool:
        """Returns whether the command still runs after this many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def end(self) -> int:
        """Returns the exit code. The terminal must be as it was before, with the cursor at the beginning of a line."""
        code = self._process.wait(timeout=60)
        while select.select([self.master], [], [], 0)[0]:
            self.output += os.read(self.master, 4096).decode(errors="replace")
        assert termios.tcgetattr(self._slave) == self.before
        assert self.output.endswith("\r\n"), self.output
        os.close(self.master)
        os.close(self._slave)
        return code


def test_ctrl_c_leaves_a_usable_terminal(talkative: Path) -> None:
    terminal = Terminal(sys.executable, SCRIPT, talkative, *LONG)
    terminal.read_until(r"no engine\)\r\n.{5}")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.output.endswith("interrupted\r\n")
    assert "Traceback" not in terminal.output


def test_ctrl_c_ends_an_answer_and_not_the_chat(talkative: Path) -> None:
    terminal = Terminal(sys.executable, SCRIPT, talkative, "--chat", "--max-new-tokens", "4000")
    terminal.read_until("> ")
    terminal.type("What?\n")
    terminal.read_until(r"What\?\r\n.{5}")
    terminal.type("\x03")
    terminal.read_until(r"interrupted\r\n> ")
    terminal.type("\x1b[A")  # the arrow key up, which fetches the previous line
    terminal.read_until(r"What\?")
    terminal.type("\x15/quit\n")  # Ctrl-U clears the line first
    assert terminal.end() == 0
    assert "Traceback" not in terminal.output


def test_ctrl_c_at_the_prompt_ends_the_chat(talkative: Path) -> None:
    terminal = Terminal(sys.executable, SCRIPT, talkative, "--chat")
    terminal.read_until("> ")
    terminal.type("\x03")
    # A Ctrl-C between the prompt and the read that follows is only handled after the read, which waits on.
    if terminal.is_running(seconds=10):
        terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.output.endswith("interrupted\r\n")
