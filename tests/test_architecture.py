"""What may import what, which modules stay free of torch, and how large files, functions and folders may grow.

Each test lists every offender at once.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from paths import ROOT

# The packages by the folder they lie in; calibrate and engines are installed inside qvlm_export, through links.
PACKAGES = {"calibrate": "qvlm_export.calibrate", "engines": "qvlm_export.engines", "qvlm_export": "qvlm_export"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ENTRIES = 400, 60, 10
TORCH = {"torch", "transformers", "compressed_tensors", "torchvision", "accelerate"}
RUNTIMES = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy"}
# What the engines may use of calibration: plain data, files and errors, all without torch.
NUMPY_ONLY = ("qvlm_export.calibrate.errors", "qvlm_export.calibrate.checkpoint")
OUTSIDE = {"tools", "tests", "pytest", "hypothesis", *PACKAGES} - {"qvlm_export"}


def name_of(path: Path) -> str:
    """The module that the file is imported as."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[package], *rest]).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that a module imports, at any depth; `from a import b` gives a.b where that is a module, else a."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {module if module in MODULES else str(node.module) for module in full}
    return frozenset(found)


def roots(name: str) -> set[str]:
    return {module.partition(".")[0] for module in imports(name)}


def inside(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def room_of(name: str) -> str:
    """The folder of a module, as a module."""
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def rooms() -> dict[str, set[str]]:
    """By folder the folders that its modules import from."""
    found: dict[str, set[str]] = {room_of(name): set() for name in MODULES}
    for name in MODULES:
        found[room_of(name)] |= {room_of(module) for module in imports(name) if module in MODULES} - {room_of(name)}
    return found


def loaded(module: str) -> set[str]:
    """The roots of all modules that a new process has after importing one."""
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_the_modules_are_found() -> None:
    assert set(PACKAGES.values()) <= set(MODULES)
    assert "torch" in roots("qvlm_export.calibrate.calibrators.rtn")
    assert "qvlm_export.calibrate.checkpoint.calibrated" in imports("qvlm_export.engines.graph.qdq")
    assert (ROOT / "qvlm_export" / "calibrate").resolve() == ROOT / "calibrate"
    assert (ROOT / "qvlm_export" / "engines").resolve() == ROOT / "engines"


def test_calibration_knows_no_graph_and_no_engine() -> None:
    mine = [name for name in MODULES if inside(name, "qvlm_export.calibrate")]
    others = {name: {m for m in imports(name) if m in MODULES and not inside(m, "qvlm_export.calibrate")} for name in mine}
    assert {name: wrong for name in mine if (wrong := others[name] | roots(name) & RUNTIMES)} == {}


def test_engines_know_no_torch_and_no_command() -> None:
    mine = [name for name in MODULES if inside(name, "qvlm_export.engines")]
    allowed = ("qvlm_export.engines", *NUMPY_ONLY)
    others = {name: {m for m in imports(name) if m in MODULES and not inside(m, *allowed)} for name in mine}
    assert {name: wrong for name in mine if (wrong := others[name] | roots(name) & TORCH)} == {}


def test_what_both_sides_share_is_numpy_only() -> None:
    mine = [name for name in MODULES if inside(name, *NUMPY_ONLY)]
    others = {name: {m for m in imports(name) if m in MODULES and not inside(m, *NUMPY_ONLY)} for name in mine}
    assert {name: wrong for name in mine if (wrong := others[name] | roots(name) & TORCH)} == {}


def test_nothing_that_ships_imports_tools_or_tests_or_a_package_by_its_folder() -> None:
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    assert {name: wrong for name in MODULES if (wrong := roots(name) & (OUTSIDE | helpers))} == {}


def test_folders_import_one_way() -> None:
    arrows = rooms()

    def behind(room: str, seen: set[str]) -> Iterator[str]:
        for other in arrows[room] - seen:
            seen.add(other)
            yield other
            yield from behind(other, seen)

    assert {room for room in arrows if room in set(behind(room, set()))} == set()


def test_folders_have_few_entries() -> None:
    """Without what Python and packaging ask for, and without links."""
    folders = {ROOT / package for package in PACKAGES} | {path.parent for path in MODULES.values()}
    entries = {
        str(folder.relative_to(ROOT)): [
            path.name
            for path in folder.iterdir()
            if not path.is_symlink() and path.name not in {"__init__.py", "__pycache__", "py.typed"}
        ]
        for folder in folders
    }
    assert {folder: names for folder, names in entries.items() if len(names) > MAX_ENTRIES} == {}


def test_files_and_functions_stay_small() -> None:
    long = {}
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        sizes = {f"{name}.{f.name}": (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
        long |= {function: size for function, size in sizes.items() if size > MAX_FUNCTION_LINES}
        if len(text.splitlines()) > MAX_FILE_LINES:
            long[name] = len(text.splitlines())
    assert long == {}


def test_every_file_says_what_it_holds() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_sessions_builds_and_checkpoints_load_no_torch() -> None:
    engines, calibrate = "qvlm_export.engines", "qvlm_export.calibrate"
    light = [f"{engines}.runtime.open", f"{engines}.builder.build", f"{calibrate}.checkpoint.calibrated"]
    assert {module: wrong for module in light if (wrong := loaded(module) & TORCH)} == {}
    # The build process must start without a runtime of its own.
    assert loaded(f"{engines}.builder.worker") & (RUNTIMES | TORCH | {"numpy"}) == set()
