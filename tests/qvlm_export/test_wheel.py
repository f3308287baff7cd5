"""The wheel: built from the sources and installed elsewhere, it must run without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from qvlm_export.inputs.samples import default_calibration

Llava = Callable[..., Path]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Runs a command that must succeed, and returns its stdout."""
    process = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    # New files count although they are not committed yet; ignored ones, such as build/, do not.
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (sources / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, sources / name)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, sources, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", folder / "target", wheel, cwd=folder)
    return folder / "target"


def test_the_wheel_has_all_modules_and_data_files(target: Path) -> None:
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    for folder, installed in (("qvlm_export", ""), ("calibrate", "qvlm_export/"), ("engines", "qvlm_export/")):
        modules = {installed + str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert len(modules) > 10
        assert modules <= names
    assert {"qvlm_export/py.typed", "qvlm_export/report/templates/report.html.jinja"} <= names
    images = {
        f"qvlm_export/inputs/calibration_set/images/{path.name}" for path in default_calibration().parent.glob("images/*")
    }
    assert len(images) == 64
    assert images | {"qvlm_export/inputs/calibration_set/scenes.jsonl"} <= names
    assert {name.partition("/")[0] for name in names if name.endswith(".py")} == {"qvlm_export"}
    (license_file,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    assert (target / license_file).read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_modules_come_from_the_wheel(target: Path, tmp_path: Path) -> None:
    script = (
        "import qvlm_export as q, qvlm_export.calibrate as c, qvlm_export.engines as e, qvlm_export.errors as u; "
        "assert q.UserError is u.UserError; print(q.__file__, c.__file__, e.__file__, q.__version__)"
    )
    *paths, version = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target)).split()
    package = target / "qvlm_export"
    assert paths == [str(folder / "__init__.py") for folder in (package, package / "calibrate", package / "engines")]
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_files_named_like_our_folders_beside_a_script_do_no_harm(target: Path, tmp_path: Path) -> None:
    """Python looks for generic names such as calibrate first in the folder of the script, or in the current folder."""
    for name in ("calibrate", "engines", "tools"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')\n", encoding="utf-8")
    script = tmp_path / "mine.py"
    script.write_text(
        "import qvlm_export\n"
        "from qvlm_export.calibrate.calibrators import rtn\n"
        "from qvlm_export.engines.builder import worker\n"
        "from qvlm_export.pipeline import export\n"
        "print('fine')\n",
        encoding="utf-8",
    )
    assert run(sys.executable, script, cwd=tmp_path, PYTHONPATH=str(target)) == "fine\n"
    assert run(sys.executable, "-c", script.read_text(), cwd=tmp_path, PYTHONPATH=str(target)) == "fine\n"


def test_the_command_finds_its_built_in_calibration_set(llava: Llava, target: Path, tmp_path: Path) -> None:
    """Without --calib-data, the calibration set in the package is read."""
    arguments = ("--model", llava(), "--out", "engine.plan", "--backend", "onnx", "--dry-run", "--json")
    output = run(sys.executable, target / "bin" / "qvlm-export", *arguments, cwd=tmp_path, PYTHONPATH=str(target))
    content = json.loads(output)
    assert (content["calibration_data"], content["calibration_samples"]) == ("built-in", 64)
    assert list(tmp_path.iterdir()) == []


def test_every_command_of_the_project_is_installed(target: Path) -> None:
    assert {"qvlm-export", "qvlm-run", "qvlm-eval"} <= {path.name for path in (target / "bin").iterdir()}
