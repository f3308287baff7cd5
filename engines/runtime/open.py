"""Opens an export on the runtime of this machine: the TensorRT engine, or the graph on ONNX Runtime with CUDA or on CPU.

With `auto` the engine is tried first, then CUDA, then the CPU; the session carries the reason for what was chosen.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import gpu_present, install_hint
from qvlm_export.engines.manifest import Manifest, open_prefix
from qvlm_export.engines.runtime.device import UnusableEngineError
from qvlm_export.engines.runtime.session import Runner, Session
from qvlm_export.engines.runtime.tensorrt_runner import MODULES, TensorRTRunner

if TYPE_CHECKING:
    from qvlm_export.engines.runtime.onnx_runner import Cuda

RUNTIMES = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime:cpu")


@dataclass(frozen=True)
class Machine:
    """What a session needs to know of the machine and how it opens an engine; tests replace the parts.

    installed: whether a Python module is installed. gpu: whether there is an NVIDIA GPU. open_engine: opens an engine of the
    manifest on the runtime of that name, see `TensorRTRunner`. cuda: how ONNX Runtime uses CUDA, None for the default.
    """

    installed: Callable[[str], bool] = lambda module: importlib.util.find_spec(module) is not None
    gpu: Callable[[], bool] = gpu_present
    open_engine: Callable[[Manifest, str], Runner] = TensorRTRunner
    cuda: Cuda | None = None


def open_session(
    manifest: Manifest, runtime: str = "auto", threads: int | None = None, fast: bool = False, machine: Machine | None = None
) -> Session:
    """Returns a session on `runtime`. threads, fast: for ONNX Runtime on CPU, see `open_float32_session`.

    Raises UserError when the runtime cannot run here; with auto, the graph is used when the engine turns out not to run.
    """
    machine, prefix = machine or Machine(), open_prefix(manifest)
    name, why = choose_runtime(manifest, runtime, machine)
    if name != "onnxruntime":
        try:
            return Session(manifest, machine.open_engine(manifest, name), why, prefix)
        except UnusableEngineError as error:
            if runtime != "auto":
                raise UserError(f"--runtime {runtime}: {error}; export again here, or use --runtime onnxruntime") from error
            why = str(error)
    if not machine.installed("onnxruntime"):
        raise UserError(f"{why}, and ONNX Runtime is not installed; run: {install_hint('cpu')}")
    from qvlm_export.engines.runtime.onnx_runner import Cuda, open_runner

    cuda = None if runtime == "onnxruntime:cpu" else machine.cuda or Cuda(gpu=machine.gpu)
    runner, cuda_reason = open_runner(manifest, threads, fast, cuda)
    why = "; ".join(dict.fromkeys(reason for reason in (why, cuda_reason) if reason))
    return Session(manifest, runner, why, prefix)


def choose_runtime(manifest: Manifest, requested: str, machine: Machine | None = None) -> tuple[str, str]:
    """Returns the runtime for the value of `--runtime`, and the reason for it.

    auto takes the engine when this machine has a GPU and the runtime that built it, otherwise the ONNX graph. Raises
    UserError when the requested runtime is unknown or cannot run here.
    """
    if requested not in RUNTIMES:
        raise UserError(f"--runtime {requested}: unknown; choose one of {', '.join(RUNTIMES)}")
    if requested.startswith("onnxruntime"):
        return "onnxruntime", "as asked"
    obstacle = _find_engine_obstacle(manifest, requested, machine or Machine())
    if obstacle is None:
        return str(manifest.backend["name"]), "as asked" if requested != "auto" else "a GPU and the runtime are here"
    if requested == "auto":
        return "onnxruntime", obstacle
    raise UserError(f"--runtime {requested}: {obstacle}; use --runtime onnxruntime")


def _find_engine_obstacle(manifest: Manifest, requested: str, machine: Machine) -> str | None:
    """Returns why the export's engine cannot run here, as far as is known without opening it, or None."""
    engine_runtime = manifest.backend["name"]
    if engine_runtime not in MODULES:
        return "this export has no engine"
    if requested not in ("auto", engine_runtime):
        return f"this export's engine is for {engine_runtime}"
    if not machine.installed(MODULES[engine_runtime]):
        return f"{engine_runtime} is not installed"
    if not machine.gpu():
        return "no NVIDIA GPU is here"
    return None
