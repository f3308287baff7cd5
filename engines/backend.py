"""Which TensorRT builds the engines, chosen once.

Both modules share one API. TensorRT-RTX compiles ahead of time for named GPU generations and needs no GPU; the full TensorRT
times kernels and builds for the GPU it runs on.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

from qvlm_export.calibrate.errors import UserError

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnx")
# Ahead-of-time targets of TensorRT-RTX 1.7. SM75 has no INT4.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "current")
INT4_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_PACKAGES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx")}


@dataclass(frozen=True)
class Backend:
    """name: as on the command line. module: what the build process imports, None when only ONNX files are written."""

    name: str
    module: str | None
    version: str | None
    targets: tuple[str, ...]


def choose_backend(requested: str, targets: tuple[str, ...]) -> Backend:
    """The backend for `--backend` and `--target`. Raises UserError when none can be had or a target is unknown."""
    name = _resolve(requested)
    if name == "onnx":
        if targets:
            raise UserError(f"--target {targets[0]}: the onnx backend builds no engine; leave --target out")
        return Backend("onnx", None, None, ())
    if not _installed(name):
        raise UserError(f"--backend {name}: not installed; run: pip install '{_extra(name)}', or use --backend onnx")
    if name == "tensorrt":
        if targets:
            raise UserError("--target: TensorRT builds for the GPU of this machine; use --backend tensorrt-rtx for targets")
        if not gpu_present():
            raise UserError("--backend tensorrt: needs an NVIDIA GPU, and none is here; use --backend tensorrt-rtx")
    unknown = [t for t in targets if t not in RTX_TARGETS]
    if unknown:
        raise UserError(f"--target {unknown[0]}: unknown; TensorRT-RTX offers {', '.join(RTX_TARGETS)}")
    default = () if name == "tensorrt" else INT4_TARGETS
    return Backend(name, _MODULES[name], _version(name), tuple(dict.fromkeys(targets)) or default)


def _resolve(requested: str) -> str:
    if requested not in BACKENDS:
        raise UserError(f"--backend {requested}: unknown; choose one of {', '.join(BACKENDS)}")
    if requested != "auto":
        return requested
    if _installed("tensorrt") and gpu_present():
        return "tensorrt"
    if _installed("tensorrt-rtx"):
        return "tensorrt-rtx"
    raise UserError("no TensorRT is installed; run: pip install 'qvlm-export[rtx]' (no GPU needed), or use --backend onnx")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(_MODULES[name]) is not None


def _extra(name: str) -> str:
    return "qvlm-export[rtx]" if name == "tensorrt-rtx" else "qvlm-export[gpu]"


def _version(name: str) -> str | None:
    for package in _PACKAGES[name]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def gpu_present() -> bool:
    """Whether the NVIDIA driver answers and counts at least one GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def make_log(trt: Any, least: Any) -> Any:
    """A logger that keeps what TensorRT says, from severity `least` up, and prints none of it."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= least:  # the lower, the graver
                self.lines.append((severity, text))

        def texts(self, severity: Any) -> list[str]:
            return [text for level, text in self.lines if level == severity]

        def all_texts(self) -> list[str]:
            return [text for _, text in self.lines]

    return Log()
