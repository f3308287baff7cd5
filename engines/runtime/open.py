"""chooses engine, CUDA or CPU"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import gpu_present
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.device import UnusableEngineError
from qvlm_export.engines.runtime.session import Runner, Session
from qvlm_export.engines.runtime.tensorrt_runner import MODULES, TensorRTRunner

if TYPE_CHECKING:
    from qvlm_export.engines.runtime.onnx_runner import Cuda

RUNTIMES = ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime:cpu")


@dataclass(frozen=True)
class Machine:
    """What is asked of the machine when a session opens. Tests hand in others.

    installed: whether a Python module is there. open_engine: see `TensorRTRunner`. cuda: of ONNX Runtime, None for its own.
    """

    installed: Callable[[str], bool] = lambda module: importlib.util.find_spec(module) is not None
    gpu: Callable[[], bool] = gpu_present
    open_engine: Callable[[Manifest, str], Runner] = TensorRTRunner
    cuda: Cuda | None = None


def open_session(
    manifest: Manifest, runtime: str = "auto", threads: int | None = None, fast: bool = False, machine: Machine | None = None
) -> Session:
    """A session on `runtime`. threads, fast: of ONNX Runtime on CPU, see `open_float32_session`.

    Raises UserError when it cannot run here; with auto, an engine that turns out not to run makes way for the graph.
    """
    machine = machine or Machine()
    name, why = choose_runtime(manifest, runtime, machine)
    if name != "onnxruntime":
        try:
            return Session(manifest, machine.open_engine(manifest, name), why)
        except UnusableEngineError as error:
            if runtime != "auto":
                raise UserError(f"--runtime {runtime}: {error}; export again here, or use --runtime onnxruntime") from error
            why = str(error)
    if not machine.installed("onnxruntime"):
        raise UserError(f"{why}, and ONNX Runtime is not installed; run: pip install 'qvlm-export[cpu]'")
    from qvlm_export.engines.runtime.onnx_runner import Cuda, open_runner

    cuda = None if runtime == "onnxruntime:cpu" else machine.cuda or Cuda(gpu=machine.gpu)
    runner, no_cuda = open_runner(manifest, threads, fast, cuda)
    return Session(manifest, runner, "; ".join(dict.fromkeys(reason for reason in (why, no_cuda) if reason)))


def choose_runtime(manifest: Manifest, requested: str, machine: Machine | None = None) -> tuple[str, str]:
    """The runtime for `--runtime`, and why. Raises UserError when the requested one cannot run here.

    auto takes the engine when a GPU and the runtime that built it are here, else the ONNX graph.
    """
    if requested not in RUNTIMES:
        raise UserError(f"--runtime {requested}: unknown; choose one of {', '.join(RUNTIMES)}")
    if requested.startswith("onnxruntime"):
        return "onnxruntime", "as asked"
    obstacle = _engine_obstacle(manifest, requested, machine or Machine())
    if obstacle is None:
        return str(manifest.backend["name"]), "as asked" if requested != "auto" else "a GPU and the runtime are here"
    if requested == "auto":
        return "onnxruntime", obstacle
    raise UserError(f"--runtime {requested}: {obstacle}; use --runtime onnxruntime")


def _engine_obstacle(manifest: Manifest, requested: str, machine: Machine) -> str | None:
    """Why the export's engine cannot run here as far as can be seen without opening it, or None."""
    built = manifest.backend["name"]
    if built not in MODULES:
        return "this export has no engine"
    if requested not in ("auto", built):
        return f"this export's engine is for {built}"
    if not machine.installed(MODULES[built]):
        return f"{built} is not installed"
    if not machine.gpu():
        return "no NVIDIA GPU is here"
    return None
