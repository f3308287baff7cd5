"""The console scripts: each runs its app, and Ctrl-C ends it with one line and exit code 130."""

import os
import signal
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT
from typer.core import TyperCommand
from typer.testing import CliRunner

from qvlm_export.cli import commands, evaluate
from qvlm_export.cli import export as cli_export
from qvlm_export.cli import inspect as cli_inspect
from qvlm_export.cli import run as cli_run
from qvlm_export.cli import validate as cli_validate

APPS = {"export": cli_export, "run": cli_run, "validate": cli_validate, "eval": evaluate, "inspect": cli_inspect}
# Takes the place of typer, the first library that a command imports.
INTERRUPTED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("went on")
except KeyboardInterrupt:
    print("an exception within an import")
os._exit(7)
"""


@pytest.mark.parametrize("name", APPS)
def test_every_script_runs_its_app(name, monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[f"qvlm-{name}"].partition(":")
    assert module == "qvlm_export.cli.commands"
    calls = []
    monkeypatch.setattr(APPS[name], "app", lambda: calls.append(name))
    before = signal.getsignal(signal.SIGINT)
    getattr(commands, function)()
    assert calls == [name]
    assert signal.getsignal(signal.SIGINT) is before


def test_every_command_is_an_installed_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {f"qvlm-{name}" for name in APPS}


@pytest.mark.parametrize(
    ("handler", "code", "out", "err"),
    [(signal.default_int_handler, 130, "", "interrupted\n"), (signal.SIG_IGN, 7, "went on\n", "")],
    ids=["default handler", "ignored by the shell"],
)
def test_ctrl_c_while_a_command_is_being_imported(handler, code, out, err, tmp_path):
    (tmp_path / "typer.py").write_text(INTERRUPTED_IMPORT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-u", "-c", "from qvlm_export.cli.commands import run; run()"]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_ctrl_c_outside_the_part_of_a_command_that_handles_it(monkeypatch, capsys):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_run, "app", interrupt)
    with pytest.raises(SystemExit, match="130"):
        commands.run()
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", APPS)
def test_ctrl_c_while_arguments_are_parsed(name, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TyperCommand, "make_context", interrupt)
    result = CliRunner().invoke(APPS[name].app, ["--help"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
