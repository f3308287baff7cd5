"""What the system and libraries refuse is one line in every command; an error of our own stays a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import assert_refused, copy_checkpoint, export_onnx, run_export
from safetensors import SafetensorError
from typer.testing import CliRunner

from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli import commands
from qvlm_export.cli.common import OneLineErrors, errors_as_lines
from qvlm_export.cli.evaluate import app as evaluate_app
from qvlm_export.cli.export import app as export_app
from qvlm_export.cli.inspect import app as inspect_app
from qvlm_export.cli.run import app as run_app
from qvlm_export.cli.validate import app as validate_app
from qvlm_export.pipeline import stages
from qvlm_export.pipeline.refusals import refusal_in_words

Llava = Callable[..., Path]
LONG = "x" * 5000
# Application -> arguments before the value that is tried.
PATHS: list[tuple[typer.Typer, list[str]]] = [
    (export_app, ["--model", "tiny", "--backend", "onnx", "--out"]),
    (export_app, ["--out", "{new}/x.plan", "--backend", "onnx", "--model"]),
    (export_app, ["--model", "tiny", "--out", "{new}/x.plan", "--backend", "onnx", "--calib-data"]),
    (export_app, ["--model", "tiny", "--out", "{new}/x.plan", "--backend", "onnx", "--recipe"]),
    (run_app, ["--prompt", "hi"]),
    (inspect_app, []),
    (validate_app, []),
    (evaluate_app, ["--task", "vqav2", "--data", "{new}"]),
    (evaluate_app, ["tiny", "--task", "vqav2", "--data"]),
]
NUMBERS = [
    (export_app, ["--model", "tiny", "--out", "{new}/x.plan"], ["--memory", "--samples", "--max-length", "--max-batch"]),
    (
        run_app,
        ["x.plan", "--prompt", "hi"],
        ["--max-new-tokens", "--temperature", "--top-p", "--repetition-penalty", "--seed"],
    ),
    (validate_app, ["x.plan"], ["--limit", "--min-agreement", "--max-kl"]),
    (evaluate_app, ["tiny", "--task", "vqav2", "--data", "{new}"], ["--limit", "--batch", "--max-new-tokens"]),
]


def refused_line(error: BaseException) -> str:
    """What a command prints that ends with `error`."""
    app = typer.Typer()

    @app.command(cls=OneLineErrors)
    def main() -> None:
        with errors_as_lines():
            raise error

    result = CliRunner().invoke(app, [])
    assert_refused(result)
    return result.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EFBIG, "File too large", "a.data"), "a.data: File too large; raise `ulimit -f`"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files; raise `ulimit -n`"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; check the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; give yourself the right"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a", None, "b"), "a -> b: No such file"),
        (OSError("12 requested and 7 written"), "12 requested and 7 written; try again"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),  # of another process, as stdout is open
        (MemoryError("Unable to allocate 1 TiB\nfor an array"), "memory ran out"),
        (RuntimeError("could not create a primitive"), "memory ran out (oneDNN"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1]\nDefaultCPUAllocator: can't allocate memory"), "memory ran out"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (ImportError("libtorch.so: failed to map segment from shared object"), "memory ran out while a library was loaded"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OverflowError("cannot convert float infinity to integer"), "a number is too large"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "is not UTF-8"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (SafetensorError("invalid header"), "a safetensors file cannot be read or written (invalid header)"),
        (ValueError("embedded null byte"), "NUL byte"),
        (UserError("a\nb\x1b[31m\udcff"), "a b\\x1b[31m\\udcff"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line(error: Exception, words: str) -> None:
    assert words in refused_line(error)


@pytest.mark.parametrize(
    "error",
    [ValueError("bug"), RuntimeError("bug"), TypeError("bug"), KeyError("bug"), ImportError("bug")],
)
def test_an_error_of_our_own_keeps_its_traceback(error: Exception) -> None:
    assert refusal_in_words(error) is None
    with pytest.raises(type(error)), errors_as_lines():
        raise error


@pytest.mark.parametrize(
    "value", [LONG, f"{LONG}.plan", f"./{LONG}/x.plan", "a\0b.plan", "a\nb.plan", "a\udcffb.plan", "\x1b[31m.plan"]
)
@pytest.mark.parametrize(("app", "before"), PATHS)
def test_a_name_that_no_file_has_is_one_line(tmp_path: Path, app: typer.Typer, before: list[str], value: str) -> None:
    arguments = [argument.format(new=tmp_path / "new") for argument in before]
    assert_refused(CliRunner().invoke(app, [*arguments, value]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [LONG, f"{LONG}/x", "a\0b"])
def test_a_work_dir_that_no_folder_can_be_is_one_line(tmp_path: Path, absent: Path, value: str) -> None:
    refused = run_export("tiny", absent, "--backend", "onnx", "--work-dir", tmp_path / value)
    assert_refused(refused, "--work-dir")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e308", "1" + "0" * 400, "-1" + "0" * 400, "9223372036854775807"])
@pytest.mark.parametrize(
    ("app", "before", "option"), [(app, before, option) for app, before, options in NUMBERS for option in options]
)
def test_a_number_that_nothing_can_take_is_one_line(
    tmp_path: Path, app: typer.Typer, before: list[str], option: str, value: str
) -> None:
    result = CliRunner().invoke(app, [*(argument.format(new=tmp_path / "new") for argument in before), option, value])
    assert_refused(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EFBIG, "File too large"), (".x.work: File too large", "ulimit -f")),
        (
            OSError(errno.ENOENT, "No such file or directory", "a/.x.work/out/x.onnx"),
            ("x.onnx: No such file", "removed or renamed"),
        ),
        (RuntimeError("could not create a primitive"), ("memory ran out (oneDNN", "--memory lowers")),
        (PermissionError(errno.EACCES, "Permission denied", "a"), ("a: Permission denied",)),
    ],
)
def test_what_is_refused_while_working_says_how_to_go_on(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: tuple[str, ...]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    out = tmp_path / "new" / "x.plan"
    with monkeypatch.context() as patched:
        patched.setattr(stages, "write_graph", fail)
        assert_refused(export_onnx(llava(), out), *words, "what was finished is kept", "--resume")
    resumed = export_onnx(llava(), out, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert "calibrate" not in json.loads(resumed.stdout)["seconds"]


def test_a_work_folder_that_is_removed_meanwhile_is_named(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_graph = stages.write_graph

    def remove_and_write(*arguments: Any) -> None:
        shutil.rmtree(tmp_path / "new" / ".x.work")
        write_graph(*arguments)

    monkeypatch.setattr(stages, "write_graph", remove_and_write)
    refused = export_onnx(llava(), tmp_path / "new" / "x.plan")
    assert_refused(refused, ".x.work", "No such file or directory", "removed or renamed")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: text.replace("{", '{"x": ' + "[" * 700 + "]" * 700 + ",", 1), "nested more than 100 deep"),
        (lambda text: text.replace("{", '{"x": "\\ud800",', 1), "surrogates not allowed"),
    ],
)
def test_a_config_that_cannot_be_copied_or_written_again_is_refused(
    llava: Llava, tmp_path: Path, absent: Path, edit: Callable[[str], str], reason: str
) -> None:
    model = copy_checkpoint(llava(), tmp_path / "model")
    (model / "config.json").write_text(edit((model / "config.json").read_text()))
    assert_refused(run_export(model, absent, "--backend", "onnx"), "config.json: not readable as JSON", reason)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_a_pipe_in_a_checkpoint_is_refused(llava: Llava, tmp_path: Path, absent: Path, name: str) -> None:
    """Reading it would wait for ever."""
    model = copy_checkpoint(llava(), tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert_refused(run_export(model, absent, "--backend", "onnx"), f"{model / name}: is a pipe")


# Real processes


@pytest.fixture(scope="module")
def exported(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X.plan in a folder whose name is not UTF-8."""
    plan = tmp_path_factory.mktemp("real") / "out" / "x.plan"
    assert run_export(llava(), plan, "--backend", "onnx", "--scheme", "fp16").exit_code == 0
    renamed = plan.parent.with_name("o\udcfft")
    plan.parent.rename(renamed)
    return renamed / "x.plan"


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of bash in which $BIN is the folder of the commands, and $1, $2 … are the arguments."""
    environment = {**os.environ, "BIN": str(Path(sys.executable).parent)}
    values = [os.fsencode(str(argument)) for argument in arguments]
    return subprocess.run(
        [b"bash", b"-c", command.encode(), b"bash", *values], capture_output=True, check=False, env=environment
    )


def test_names_that_are_not_utf8_are_printed(exported: Path) -> None:
    done = shell('"$BIN/qvlm-inspect" "$1" --json', exported)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode())["manifest"] == str(exported.with_suffix(".json"))
    done = shell('"$BIN/qvlm-inspect" "$1" --verify', exported)
    assert done.returncode == 0, done.stderr
    assert b"o\\udcfft: size and sha256 are what the export wrote" in done.stdout


def test_a_closed_pipe_ends_quietly(exported: Path) -> None:
    done = shell('"$BIN/qvlm-inspect" "$1" --json | true; exit "${PIPESTATUS[0]}"', exported)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_device_is_one_line(exported: Path) -> None:
    done = shell('"$BIN/qvlm-inspect" "$1" --json > /dev/full', exported)
    assert (done.returncode, done.stderr) == (2, b"error: the disk is full; free some space\n")


def test_a_file_that_is_too_large_leaves_nothing(llava: Llava, tmp_path: Path) -> None:
    done = shell(
        'ulimit -f 200; "$BIN/qvlm-export" --model "$1" --out "$2" --backend onnx --scheme fp16',
        llava(),
        tmp_path / "new" / "x.plan",
    )
    assert done.returncode == 2
    assert done.stderr.endswith(b"File too large; raise `ulimit -f`, or use a file system that takes larger files\n")
    assert done.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_for_the_program_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def fail(_: str) -> None:
        raise ImportError("libtorch.so: failed to map segment from shared object")

    monkeypatch.setattr(commands, "import_module", fail)
    with pytest.raises(SystemExit) as ended:
        commands.inspect()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: memory ran out while the program was loaded")
    monkeypatch.setattr(commands, "import_module", lambda name: __import__(f"{name}.no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        commands.inspect()
