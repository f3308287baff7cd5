"""Which package may import what, which modules stay free of torch, and how large files and functions may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("calibrate", "engines", "qvlm_export")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# What the engines may use of `calibrate`: plain data, files and errors, all without torch.
NUMPY_ONLY = {
    f"calibrate.{name}" for name in ("scheme", "calibrated", "errors", "tensors", "packing", "safetensors_source", "samples")
}
TORCH = {"torch", "transformers", "compressed_tensors", "torchvision", "accelerate"}
RUNTIMES = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy"}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Every module that the file imports, at any depth; `from a import b` gives a, and a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")}
    return found


def is_module(name):
    place = ROOT / Path(*name.split("."))
    return place.with_suffix(".py").exists() or place.is_dir()


def roots(path):
    return {name.partition(".")[0] for name in imports(path)}


def modules_of(package):
    return [path for path in FILES if path.relative_to(ROOT).parts[0] == package]


def test_the_packages_are_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)
    assert {name_of(path) for path in FILES} >= NUMPY_ONLY
    assert "torch" in roots(ROOT / "calibrate" / "absmax.py")
    assert "calibrate.scheme" in imports(ROOT / "engines" / "plan_check.py")


@pytest.mark.parametrize("path", modules_of("calibrate"), ids=name_of)
def test_calibration_knows_no_graph_and_no_engine(path):
    assert not roots(path) & ({"engines", "qvlm_export", "tools"} | RUNTIMES)


@pytest.mark.parametrize("path", modules_of("engines"), ids=name_of)
def test_engines_know_no_torch_and_no_command(path):
    assert not roots(path) & ({"qvlm_export", "tools"} | TORCH)
    assert {name for name in imports(path) if name.partition(".")[0] == "calibrate"} <= NUMPY_ONLY | {"calibrate"}


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) in NUMPY_ONLY], ids=name_of)
def test_what_both_sides_share_is_numpy_only(path):
    assert not roots(path) & TORCH
    assert {name for name in imports(path) if name.partition(".")[0] == "calibrate"} <= NUMPY_ONLY


@pytest.mark.parametrize("path", modules_of("qvlm_export"), ids=name_of)
def test_nothing_that_ships_imports_tools_or_tests(path):
    helpers = {p.stem for folder in ("tools", "tests") for p in (ROOT / folder).glob("*.py")}
    assert not roots(path) & ({"tools", "tests", "pytest", "hypothesis"} | helpers)


@pytest.mark.parametrize("module", ["engines.session", "engines.build", "engines.build_worker", "calibrate.calibrated"])
def test_torch_is_not_loaded(module):
    program = f"import sys, {module}; print(sorted({TORCH!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_build_process_starts_without_a_runtime_of_its_own():
    program = f"import sys, engines.build_worker; print(sorted({RUNTIMES | {'numpy'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_holds(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
