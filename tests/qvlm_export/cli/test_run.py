"""`qvlm-run`: an answer on stdout, or one line on stderr and exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import ASK, PICTURE, RUNTIME, assert_refused, run_model
from PIL import Image
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.cli.run import app
from qvlm_export.engines.manifest import seal
from qvlm_export.engines.runtime.onnx_runner import OnnxRunner

Llava = Callable[..., Path]
SCRIPT = Path(sys.executable).with_name("qvlm-run")


@pytest.fixture
def mine(exported: Path, tmp_path: Path) -> Path:
    """The plan path of a copy that may be damaged."""
    shutil.copytree(exported.parent, tmp_path / "copy")
    return tmp_path / "copy" / "x.plan"


def test_the_answer_is_that_of_generate(exported: Path) -> None:
    result = run_model(exported, *ASK)
    assert (result.exit_code, result.stderr) == (0, f"{RUNTIME}cut off: --max-new-tokens allows no more\n")
    with qvlm_export.load(exported) as model:
        expected = model.generate("What color is the ring?", [Image.open(PICTURE)], max_new_tokens=6)
    assert result.stdout == expected + "\n"
    assert len(expected) > 3


def test_real_command(exported: Path, tmp_path: Path) -> None:
    """The installed script runs in another folder; stdout has the answer only, stderr the runtime and why it was cut off."""
    arguments = [exported, "--prompt", "What?", "--max-new-tokens", "3"]
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr) == (0, f"{RUNTIME}cut off: --max-new-tokens allows no more\n")
    assert done.stdout == run_model(*arguments).stdout


def test_json(exported: Path) -> None:
    result = run_model(exported, *ASK, "--json")
    content = json.loads(result.stdout)
    assert (content["runtime"], content["device"]) == ("onnxruntime", "cpu")
    assert content["answer"] == run_model(exported, *ASK).stdout.removesuffix("\n")
    assert content["ended"] == "max_new_tokens"


def test_the_answer_depends_on_the_image(exported: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), (10, 200, 10)).save(tmp_path / "green.png")
    answers = {
        run_model(exported, "--prompt", "What?", *pictures, "--max-new-tokens", "12").stdout
        for pictures in ((), ("--image", PICTURE), ("--image", tmp_path / "green.png"))
    }
    assert len(answers) == 3


def test_the_manifest_is_accepted_as_an_argument(exported: Path) -> None:
    assert run_model(exported.with_suffix(".json"), *ASK).stdout == run_model(exported, *ASK).stdout


def test_more_images_than_the_export_takes_are_refused(exported: Path) -> None:
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
        (["x.plan", "--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens", "1"]),
        (["x.plan", "--prompt", "a", "--temperature", "nan"], ["temperature nan", "must be 0"]),
        (["x.plan", "--prompt", "a", "--top-p", "0"], ["top_p 0.0", "must be above 0"]),
        (["x.plan", "--prompt", "a", "--seed", "-1"], ["seed -1", "must be at least 0"]),
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
        (["--prompt", "a", "--image", "/"], ["--image: /: is a folder, not a picture"]),
        (["--prompt", "a", "--runtime", "cuda"], ["--runtime cuda"]),
    ],
)
def test_bad_question(exported: Path, arguments: list[str], words: list[str]) -> None:
    assert_refused(run_model(exported, *arguments), *words)
    assert_refused(run_model(exported, *arguments, "--json"), *words)


def test_options_reach_the_model(exported: Path) -> None:
    """Each option changes the answer as it should."""
    ask = ("--prompt", "What?", "--max-new-tokens", "40")
    plain = run_model(exported, *ask).stdout
    assert run_model(exported, *ask, "--temperature", "2", "--seed", "1").stdout != plain
    assert (
        run_model(exported, *ask, "--temperature", "2", "--top-p", "1e-9").stdout == plain
    )  # only the likeliest token is left
    assert run_model(exported, *ask, "--repetition-penalty", "100").stdout != plain
    word = plain.split()[1]
    stopped = run_model(exported, *ask, "--stop", "never said", "--stop", word).stdout
    assert stopped == plain[: plain.index(word)] + "\n"
    assert run_model(exported, *ask, "--runtime", "onnxruntime:cpu").stdout == plain


@pytest.mark.parametrize("name", ["x.json", "x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data"])
def test_missing_file_of_the_export_is_refused(mine: Path, name: str) -> None:
    (mine.parent / name).unlink()
    assert_refused(run_model(mine, *ASK), str(mine.parent / name))


@pytest.mark.parametrize("name", ["x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_truncated_file_of_the_export_is_refused(mine: Path, name: str, share: float) -> None:
    path = mine.parent / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(run_model(mine, *ASK), f"{path}: has {int(len(data) * share)} bytes", f"says {len(data)}", "incomplete")


def test_missing_processor_is_refused(mine: Path) -> None:
    shutil.rmtree(mine.parent / "x.processor")
    assert_refused(run_model(mine, *ASK), "x.processor: is missing", "keep the files of an export together")


def test_damaged_processor_is_refused(mine: Path) -> None:
    path = mine.parent / "x.processor" / "tokenizer.json"
    path.write_text("{")
    assert_refused(run_model(mine, *ASK), f"{path}: has 1 bytes", "incomplete, export again")


def test_damaged_processor_without_recorded_hashes_is_refused(mine: Path) -> None:
    path = mine.with_suffix(".json")
    content = json.loads(path.read_text())
    del content["files"]["processor"]["files"]
    path.write_text(json.dumps(seal(content)))
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


def test_logits_that_are_not_finite_end_with_exit_code_2(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of an engine whose activations leave the range of float16; before, the answer was empty."""
    step = OnnxRunner.step
    monkeypatch.setattr(OnnxRunner, "step", lambda self, *arguments: step(self, *arguments) * np.nan)
    for arguments in ((), ("--json",), ("--temperature", "1")):
        assert_refused(run_model(exported, *ASK, *arguments), "the logits are NaN or infinite", "float16")
    chat = CliRunner().invoke(app, [str(exported), "--chat"], input="What?\n/quit\n")
    assert "error: the logits are NaN or infinite" in chat.stderr
    assert chat.stdout == ""


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "nan", "temperature nan: must be 0 (greedy) or more, and finite"),
        ("--temperature", "1e400", "temperature inf"),
        ("--temperature", "-0.5", "temperature -0.5: must be 0 (greedy) or more"),
        ("--temperature", "warm", "Invalid value for '--temperature'"),
        ("--top-p", "0", "top_p 0.0: must be above 0"),
        ("--top-p", "nan", "top_p nan"),
        ("--repetition-penalty", "0", "repetition_penalty 0.0: must be above 0"),
        ("--repetition-penalty", "-1e300", "repetition_penalty -1e+300"),
        ("--seed", "-1", "seed -1: must be at least 0"),
        ("--seed", "1.5", "Invalid value for '--seed'"),
        ("--seed", "9" * 5000, "Invalid value for '--seed'"),
        ("--seed", "9" * 400, "--seed: the number is too large"),
        ("--max-new-tokens", "0", "Invalid value for '--max-new-tokens'"),
        ("--stop", "", "none of them empty"),
    ],
)
def test_a_bad_setting_is_refused(exported: Path, option: str, value: str, words: str) -> None:
    assert_refused(run_model(exported, *ASK, option, value), words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--repetition-penalty", "1e-300"),
        ("--repetition-penalty", "1e300", "--temperature", "1e-300"),
        ("--temperature", "1e300", "--top-p", "1e-300"),
        ("--seed", "9" * 15, "--temperature", "1"),
        ("--max-new-tokens", "9" * 15, "--stop", "a"),
    ],
)
def test_extreme_settings_give_an_answer(exported: Path, arguments: tuple[str, ...]) -> None:
    result = run_model(exported, *ASK, *arguments)
    assert (result.exit_code, result.exception) == (0, None), result.stderr
