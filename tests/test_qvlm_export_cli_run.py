"""qvlm-run: an answer on stdout, or one line on stderr and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PICTURE, assert_refused, export_to, run_model
from PIL import Image
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.cli_run import app

Llava = Callable[..., Path]
ASK = ("--prompt", "What color is the ring?", "--image", PICTURE, "--max-new-tokens", "6")
SCRIPT = Path(sys.executable).with_name("qvlm-run")
RUNTIME = "runtime: onnxruntime (this export has no engine)\n"


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
        wanted = model.generate("What color is the ring?", [Image.open(PICTURE)], 6)
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
    assert content["runtime"] == "onnxruntime"
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
    assert_refused(run_model(exported, *arguments, "--json"), *words)


def test_refusal_after_the_line_for_people(exported: Path) -> None:
    result = run_model(exported, "--prompt", "<image>")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(RUNTIME + "error: the prompt: has 1 times <image>")
    assert len(result.stderr.splitlines()) == 2


def test_chat(exported: Path, tmp_path: Path) -> None:
    """A turn that cannot be taken costs a line, not the conversation."""
    Image.new("RGB", (50, 50), (10, 200, 10)).save(tmp_path / "green.png")
    lines = [
        "What is it?",
        "/image /no/such.png",
        f"/image {tmp_path / 'green.png'}",
        "",
        "<image>",
        "And now?",
        "/quit",
        "x",
    ]
    arguments = [str(exported), "--chat", "--image", str(PICTURE), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input="\n".join(lines))
    assert result.exit_code == 0, result.exception
    with qvlm_export.load(exported) as model:
        chat = model.chat()
        first = "".join(chat.say("What is it?", [Image.open(PICTURE)], 4))
        second = "".join(chat.say("And now?", [Image.open(tmp_path / "green.png")], 4))
    assert result.stdout == f"{first}\n{second}\n"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [words in error for words, error in zip(("/no/such.png", "times <image>"), errors, strict=True)] == [True, True]


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
