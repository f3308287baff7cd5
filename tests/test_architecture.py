"""Rules of the architecture: allowed imports, modules without torch, and limits for files, functions and folders.

A test that fails lists all offenders.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path

from paths import ROOT

# Folder -> package. calibrate and engines are installed inside qvlm_export, through symbolic links.
PACKAGES = {"calibrate": "qvlm_export.calibrate", "engines": "qvlm_export.engines", "qvlm_export": "qvlm_export"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ENTRIES = 400, 60, 10
TORCH = {"torch", "transformers", "compressed_tensors", "torchvision", "accelerate"}
RUNTIMES = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy"}
# The parts of calibrate that the engines may import: data, files and errors, all without torch.
NUMPY_ONLY = ("qvlm_export.calibrate.errors", "qvlm_export.calibrate.checkpoint")
NOT_SHIPPED = {"tools", "tests", "pytest", "hypothesis", *PACKAGES} - {"qvlm_export"}


def name_of(path: Path) -> str:
    """Name under which the file is imported."""
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[package], *rest]).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """All modules that a module imports, inside functions, too; `from a import b` gives a.b if that is a module, else a."""
    modules = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {module if module in MODULES else str(node.module) for module in full}
    return frozenset(modules)


def roots(name: str) -> set[str]:
    """Top-level packages that a module imports."""
    return {module.partition(".")[0] for module in imports(name)}


def inside(name: str, *packages: str) -> bool:
    """Whether a module is one of the packages or lies in one of them."""
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def folder_of(name: str) -> str:
    """The folder of a module, in dotted form."""
    return name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]


def folder_imports() -> dict[str, set[str]]:
    """Folder -> the other folders from which its modules import."""
    edges: dict[str, set[str]] = {folder_of(name): set() for name in MODULES}
    for name in MODULES:
        edges[folder_of(name)] |= {folder_of(module) for module in imports(name) if module in MODULES} - {folder_of(name)}
    return edges


def loaded(module: str) -> set[str]:
    """Top-level packages that are loaded in a new process after it imports the module."""
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(process.stdout.split())


def test_modules_and_imports_are_recognized() -> None:
    assert set(PACKAGES.values()) <= set(MODULES)
    assert "torch" in roots("qvlm_export.calibrate.calibrators.rtn")
    assert "qvlm_export.calibrate.checkpoint.calibrated" in imports("qvlm_export.engines.graph.qdq")
    assert (ROOT / "qvlm_export" / "calibrate").resolve() == ROOT / "calibrate"
    assert (ROOT / "qvlm_export" / "engines").resolve() == ROOT / "engines"


def test_calibrate_imports_neither_engines_nor_onnx_nor_tensorrt() -> None:
    modules = [name for name in MODULES if inside(name, "qvlm_export.calibrate")]
    others = {
        name: {m for m in imports(name) if m in MODULES and not inside(m, "qvlm_export.calibrate")} for name in modules
    }
    assert {name: wrong for name in modules if (wrong := others[name] | roots(name) & RUNTIMES)} == {}


def test_engines_import_neither_torch_nor_the_commands() -> None:
    modules = [name for name in MODULES if inside(name, "qvlm_export.engines")]
    allowed = ("qvlm_export.engines", *NUMPY_ONLY)
    others = {name: {m for m in imports(name) if m in MODULES and not inside(m, *allowed)} for name in modules}
    assert {name: wrong for name in modules if (wrong := others[name] | roots(name) & TORCH)} == {}


def test_modules_that_calibrate_shares_with_engines_are_free_of_torch() -> None:
    modules = [name for name in MODULES if inside(name, *NUMPY_ONLY)]
    others = {name: {m for m in imports(name) if m in MODULES and not inside(m, *NUMPY_ONLY)} for name in modules}
    assert {name: wrong for name in modules if (wrong := others[name] | roots(name) & TORCH)} == {}


def test_package_imports_no_tools_no_tests_and_no_package_by_its_folder() -> None:
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    assert {name: wrong for name in MODULES if (wrong := roots(name) & (NOT_SHIPPED | helpers))} == {}


def reachable(edges: Mapping[str, Set[str]], start: str, visited: set[str]) -> Iterator[str]:
    """All nodes that can be reached from `start`, itself only through a circle."""
    for other in edges[start] - visited:
        visited.add(other)
        yield other
        yield from reachable(edges, other, visited)


def test_imports_between_folders_and_between_modules_have_no_circles() -> None:
    folders = folder_imports()
    modules = {name: {other for other in imports(name) & MODULES.keys() if not is_package(other)} for name in MODULES}
    for edges in (folders, modules):
        assert {node for node in edges if node in set(reachable(edges, node, set()))} == set()


def test_every_import_can_be_seen() -> None:
    """No relative imports, none by name of a module of ours, and no folder that packaging would leave out."""
    relative, by_name = [], []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                relative.append(name)
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and "qvlm_export" in ast.unparse(node):
                by_name.append(name)
    assert relative == []
    assert by_name == ["qvlm_export.cli.commands"]  # which starts the commands
    assert {str(path.parent) for path in MODULES.values() if not (path.parent / "__init__.py").exists()} == set()


def test_folders_have_few_entries() -> None:
    """Files that Python or packaging require and symbolic links do not count."""
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


def test_every_module_has_a_docstring() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_sessions_builds_and_checkpoints_do_not_load_torch() -> None:
    engines, calibrate = "qvlm_export.engines", "qvlm_export.calibrate"
    torch_free = [f"{engines}.runtime.open", f"{engines}.builder.build", f"{calibrate}.checkpoint.calibrated"]
    assert {module: wrong for module in torch_free if (wrong := loaded(module) & TORCH)} == {}
    # The build process must start without importing any runtime.
    assert loaded(f"{engines}.builder.worker") & (RUNTIMES | TORCH | {"numpy"}) == set()
