"""qvlm-run: an answer on stdout, or one line on stderr and exit code 2."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PICTURE, assert_refused, copy_checkpoint, export_to, run_model
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import qvlm_export
from engines.manifest import sealed
from qvlm_export.cli_run import app

Llava = Callable[..., Path]
ASK = ("--prompt", "What color is the ring?", "--image", PICTURE, "--max-new-tokens", "6")
SCRIPT = Path(sys.executable).with_name("qvlm-run")
RUNTIME = "runtime: onnxruntime on CPU (this export has no engine)\n"


@pytest.fixture(scope="module")
def exported(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of a float16 export, graphs only. Do not write beside it."""
    plan = tmp_path_factory.mktemp("run") / "x.plan"
    export_to(llava(), plan, "--backend", "onnx", "--scheme", "fp16", "--max-length", "256")
    return plan


@pytest.fixture
def mine(exported: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(exported.parent, tmp_path / "copy")
    return tmp_path / "copy" / "x.plan"


def test_answers(exported: Path) -> None:
    result = run_model(exported, *ASK)
    assert (result.exit_code, result.stderr) == (0, RUNTIME)
    with qvlm_export.load(exported) as model:
        wanted = model.generate("What color is the ring?", [Image.open(PICTURE)], max_new_tokens=6)
    assert result.stdout == wanted + "\n"
    assert len(wanted) > 3


def test_real_command(exported: Path, tmp_path: Path) -> None:
    """From elsewhere, with nothing but the answer on stdout and nothing but the runtime on stderr."""
    arguments = [exported, "--prompt", "What?", "--max-new-tokens", "3"]
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr) == (0, RUNTIME)
    assert done.stdout == run_model(*arguments).stdout


def test_json(exported: Path) -> None:
    result = run_model(exported, *ASK, "--json")
    content = json.loads(result.stdout)
    assert (content["runtime"], content["device"]) == ("onnxruntime", "cpu")
    assert content["answer"] == run_model(exported, *ASK).stdout.removesuffix("\n")


def test_the_picture_matters(exported: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), (10, 200, 10)).save(tmp_path / "green.png")
    answers = {
        run_model(exported, "--prompt", "What?", *pictures, "--max-new-tokens", "12").stdout
        for pictures in ((), ("--image", PICTURE), ("--image", tmp_path / "green.png"))
    }
    assert len(answers) == 3


def test_manifest_for_an_argument(exported: Path) -> None:
    assert run_model(exported.with_suffix(".json"), *ASK).stdout == run_model(exported, *ASK).stdout


def test_as_many_pictures_as_the_export_takes(exported: Path) -> None:
    four = ["--image", str(PICTURE)] * 4
    assert run_model(exported, "--prompt", "What?", "--max-new-tokens", "2", *four).exit_code == 0
    refused = run_model(exported, "--prompt", "What?", "--image", PICTURE, *four, "--json")
    assert_refused(refused, "5 images at once", "built for 4")


def test_help_shows_examples() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "qvlm-run engine.plan --image photo.png --prompt" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing argument", "--help"]),
        (["x.plan"], ["give --prompt, or --chat"]),
        (["x.plan", "--prompt", "a", "--chat"], ["give --prompt, or --chat"]),
        (["x.plan", "--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens", "greater than or equal to 1"]),
        (["x.plan", "--prompt", "a", "--temperature", "nan"], ["temperature nan", "must be 0"]),
        (["x.plan", "--prompt", "a", "--top-p", "0"], ["top_p 0.0", "must be above 0"]),
        (["x.plan", "--prompt", "a", "--seed", "-1"], ["seed -1", "must be 0 or more"]),
        (["/no/such.plan", "--prompt", "a"], ["/no/such.json", "no such manifest"]),
        (["/no/such.onnx", "--prompt", "a"], ["/no/such.onnx", "give the .plan"]),
        (["/no", "--prompt", "a"], ["/no:", "give the .plan"]),
    ],
)
def test_unusable_arguments(arguments: list[str], words: list[str]) -> None:
    assert_refused(CliRunner().invoke(app, arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "<image> What?", "--image", str(PICTURE)], ["2 times <image> for 1 pictures", "leave <image> out"]),
        (["--prompt", "<image> What?"], ["1 times <image> for 0 pictures"]),
        (["--prompt", "\udcff"], ["half a surrogate pair", "UTF-8"]),
        (["--prompt", "word " * 300], ["tokens long", "built for 256"]),
        (["--prompt", "a", "--image", "/no/such.png"], ["--image: there is no picture /no/such.png", "check the path"]),
        (["--prompt", "a", "--image", __file__], ["--image:", "is not a picture"]),
        (["--prompt", "a", "--image", "/"], ["--image: / cannot be read", "Is a directory"]),
        (["--prompt", "a", "--runtime", "cuda"], ["--runtime cuda"]),
    ],
)
def test_bad_question(exported: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(run_model(exported, *arguments), *words)
    assert_refused(run_model(exported, *arguments, "--json"), *words)


def test_options_reach_the_model(exported: Path) -> None:
    """Each changes the answer in the way it must."""
    ask = ("--prompt", "What?", "--max-new-tokens", "40")
    plain = run_model(exported, *ask).stdout
    assert run_model(exported, *ask, "--temperature", "2", "--seed", "1").stdout != plain
    assert run_model(exported, *ask, "--temperature", "2", "--top-p", "1e-9").stdout == plain  # one token is left to choose
    assert run_model(exported, *ask, "--repetition-penalty", "100").stdout != plain
    word = plain.split()[1]
    stopped = run_model(exported, *ask, "--stop", "never said", "--stop", word).stdout
    assert stopped == plain[: plain.index(word)] + "\n"
    assert run_model(exported, *ask, "--runtime", "onnxruntime:cpu").stdout == plain


def test_chat(exported: Path, tmp_path: Path) -> None:
    """A turn that cannot be taken costs a line, not the conversation."""
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
    wanted = ("/no/such.png", "2 times <image> for 1 pictures", "the context would be")
    assert [words in error for words, error in zip(wanted, errors, strict=True)] == [True] * 3
    assert result.stderr.startswith(f"{RUNTIME}chat: ")


@pytest.fixture(scope="module")
def talkative(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of an export that never says that it has ended, and has room for an answer of many seconds."""
    folder = tmp_path_factory.mktemp("talkative")
    checkpoint = copy_checkpoint(llava(text={"max_position_embeddings": 4096}), folder / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    (head,) = (array for name, array in tensors.items() if name.endswith("lm_head.weight"))
    head[2] = 0  # </s> has a logit of 0, and one of the other 511 a larger one
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    export_to(checkpoint, folder / "x.plan", "--backend", "onnx", "--scheme", "fp16", "--max-length", "4096")
    return folder / "x.plan"


LONG = ("--prompt", "What?", "--max-new-tokens", "4000")


def test_ctrl_c_ends_an_answer(talkative: Path) -> None:
    command = [sys.executable, SCRIPT, talkative, *LONG]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipes, preexec_fn=_heed_interrupts) as process:  # noqa: PLW1509
        assert process.stdout is not None
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, f"{RUNTIME}interrupted\n")
    answer = begun + rest
    assert answer.endswith("\n")
    beginning = run_model(talkative, *LONG[:-1], "20").stdout
    assert beginning.startswith(answer.removesuffix("\n")[:15])


def _heed_interrupts() -> None:
    """Tests that run in the background of a shell have Ctrl-C ignored, and would hand that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _own_terminal() -> None:
    _heed_interrupts()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A command on a terminal of its own, as a user has it: what is typed reaches it as keys, Ctrl-C as a signal."""

    def __init__(self, *command: object) -> None:
        self.master, self._slave = pty.openpty()
        self.before = termios.tcgetattr(self._slave)
        self.seen = ""
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=_own_terminal,  # noqa: PLW1509
        )

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str) -> None:
        """Reads until what was not yet waited for holds `pattern`."""
        came = ""
        while not re.search(pattern, came):
            ready, _, _ = select.select([self.master], [], [], 60)
            assert ready, f"{pattern!r} did not come: {self.seen + came!r}"
            came += os.read(self.master, 4096).decode(errors="replace")
        self.seen += came

    def is_running(self, seconds: float) -> bool:
        """Whether the command still runs after that time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def end(self) -> int:
        """The exit code. The terminal must be as it was, with the cursor at the beginning of a line."""
        code = self._process.wait(timeout=60)
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        assert termios.tcgetattr(self._slave) == self.before
        assert self.seen.endswith("\r\n"), self.seen
        os.close(self.master)
        os.close(self._slave)
        return code


def test_ctrl_c_leaves_a_usable_terminal(talkative: Path) -> None:
    terminal = Terminal(sys.executable, SCRIPT, talkative, *LONG)
    terminal.read_until(r"no engine\)\r\n.{5}")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.seen.endswith("interrupted\r\n")
    assert "Traceback" not in terminal.seen


def test_ctrl_c_ends_an_answer_and_not_the_chat(talkative: Path) -> None:
    terminal = Terminal(sys.executable, SCRIPT, talkative, "--chat", "--max-new-tokens", "4000")
    terminal.read_until("> ")
    terminal.type("What?\n")
    terminal.read_until(r"What\?\r\n.{5}")
    terminal.type("\x03")
    terminal.read_until(r"interrupted\r\n> ")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen


def test_ctrl_c_at_the_prompt_ends_the_chat(talkative: Path) -> None:
    terminal = Terminal(sys.executable, SCRIPT, talkative, "--chat")
    terminal.read_until("> ")
    terminal.type("\x03")
    if terminal.is_running(seconds=10):  # a Ctrl-C between the prompt and the read after it is only noted: the read waits on
        terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.seen.endswith("interrupted\r\n")


@pytest.mark.parametrize("name", ["x.json", "x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data"])
def test_file_of_the_export_is_missing(mine: Path, name: str) -> None:
    (mine.parent / name).unlink()
    assert_refused(run_model(mine, *ASK), str(mine.parent / name))


@pytest.mark.parametrize("name", ["x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_file_of_the_export_is_cut_off(mine: Path, name: str, kept: float) -> None:
    path = mine.parent / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert_refused(run_model(mine, *ASK), f"{path}: has {int(len(data) * kept)} bytes", f"says {len(data)}", "incomplete")


def test_processor_is_missing(mine: Path) -> None:
    shutil.rmtree(mine.parent / "x.processor")
    assert_refused(run_model(mine, *ASK), "x.processor: is missing", "keep the files of an export together")


def test_processor_is_damaged(mine: Path) -> None:
    path = mine.parent / "x.processor" / "tokenizer.json"
    path.write_text("{")
    assert_refused(run_model(mine, *ASK), f"{path}: has 1 bytes", "incomplete, export again")


def test_processor_of_an_export_without_a_record_of_it_is_damaged(mine: Path) -> None:
    path = mine.with_suffix(".json")
    content = json.loads(path.read_text())
    del content["files"]["processor"]["files"]
    path.write_text(json.dumps(sealed(content)))
    assert run_model(mine, *ASK).exit_code == 0
    (mine.parent / "x.processor" / "tokenizer.json").write_text("{")
    assert_refused(run_model(mine, *ASK), "x.processor", "cannot be loaded")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["not a readable manifest", "export again"]),
        ("[]", ["no manifest of qvlm-export"]),
        ('{"format": "other"}', ["no manifest of qvlm-export"]),
        ('{"format": "qvlm-export", "version": 99}', ["manifest version 99", "update qvlm-export"]),
        ('{"format": "qvlm-export", "version": 1}', ["was changed since the export", "export again"]),
    ],
)
def test_damaged_manifest(mine: Path, content: str, words: list[str]) -> None:
    mine.with_suffix(".json").write_text(content)
    assert_refused(run_model(mine, *ASK), str(mine.with_suffix(".json")), *words)
