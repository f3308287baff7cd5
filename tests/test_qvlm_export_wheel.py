"""The wheel: made from the sources, installed apart from them, it must run on its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qvlm_export.samples import default_calibration

Llava = Callable[..., Path]
ROOT = Path(__file__).parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    # New files count although they are not committed yet; ignored ones, such as build/, do not.
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, sources / name)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, sources, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", folder / "target", wheel, cwd=folder)
    return folder / "target"


def test_what_is_inside(target: Path) -> None:
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    for package in ("qvlm_export", "calibrate", "engines"):
        wanted = {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
        assert wanted <= names
    assert {"qvlm_export/py.typed", "qvlm_export/templates/report.html.jinja"} <= names
    pictures = {f"qvlm_export/calibration/images/{path.name}" for path in default_calibration().parent.glob("images/*")}
    assert len(pictures) == 64
    assert pictures | {"qvlm_export/calibration/scenes.jsonl"} <= names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


def test_modules_come_from_the_wheel(target: Path, tmp_path: Path) -> None:
    script = "import calibrate, engines, qvlm_export as q; print(calibrate.__file__, engines.__file__, q.__file__)"
    found = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert found == [str(target / package / "__init__.py") for package in ("calibrate", "engines", "qvlm_export")]


def test_command_runs_with_the_data_it_carries(llava: Llava, target: Path, tmp_path: Path) -> None:
    """Without --calib-data, so that the package's own pictures are read."""
    arguments = ("--model", llava(), "--out", "engine.plan", "--backend", "onnx", "--dry-run", "--json")
    output = run(sys.executable, target / "bin" / "qvlm-export", *arguments, cwd=tmp_path, PYTHONPATH=str(target))
    content = json.loads(output)
    assert (content["calibration_data"], content["calibration_samples"]) == ("built-in", 64)
    assert list(tmp_path.iterdir()) == []


def test_every_command_of_the_project_is_installed(target: Path) -> None:
    assert {"qvlm-export", "qvlm-run", "qvlm-eval"} <= {path.name for path in (target / "bin").iterdir()}
