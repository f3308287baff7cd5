"""Choice of the build backend: TensorRT, TensorRT-RTX, or none, where only ONNX files are written.

`choose_backend` turns `--backend` and `--target` into a `Backend`. The Python modules of both TensorRTs share one API.
TensorRT-RTX compiles ahead of time for named GPU generations and needs no GPU; the full TensorRT times kernels and builds
for the GPU it runs on.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
import shlex
from dataclasses import dataclass
from typing import Any

from qvlm_export.calibrate.errors import UserError

BACKENDS = ("auto", "tensorrt", "tensorrt-rtx", "onnx")
# Ahead-of-time targets of TensorRT-RTX 1.7. SM75 has no INT4.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "current")
INT4_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
WEIGHT_ONLY_INT8_TARGETS = INT4_TARGETS  # SM75 multiplies such weights in float16, after writing them out
BFLOAT16_TARGETS = INT4_TARGETS  # SM75 has no bfloat16 either
# GPUs that TensorRT-RTX does not build for: target as one may write it -> whose it is. TensorRT builds for them.
OTHER_GPUS = {
    "sm90": "H100 and H200", "h100": "H100", "h200": "H200", "gh200": "GH200", "sm100": "B200", "b200": "B200",
    "sm103": "B300", "b300": "B300", "sm70": "V100", "v100": "V100", "sm87": "Jetson Orin", "sm101": "Jetson Thor",
    "sm110": "Jetson Thor",
}  # fmt: skip
_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_PACKAGES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx")}


@dataclass(frozen=True)
class Backend:
    """The chosen build backend.

    name: as on the command line. module: the Python module that the build process imports, None when only ONNX files are
    written. version: of the installed package, None when unknown. targets: GPU generations to build for, such as sm89; empty
    for the GPU of this machine.
    """

    name: str
    module: str | None
    version: str | None
    targets: tuple[str, ...]


def choose_backend(requested: str, targets: tuple[str, ...]) -> Backend:
    """Returns the backend for the values of `--backend` and `--target`.

    Raises UserError when the backend is unknown, not installed or needs a GPU that is missing, and for an unknown target.
    """
    name = _resolve_name(requested)
    if name == "onnx":
        if targets:
            raise UserError(f"--target {targets[0]}: the onnx backend builds no engine; leave --target out")
        return Backend("onnx", None, None, ())
    if not _installed(name):
        hint = install_hint(_EXTRAS[name])
        raise UserError(f"--backend {name}: not installed; run: {hint}, or use --backend onnx")
    if name == "tensorrt":
        if targets:
            raise UserError("--target: TensorRT builds for the GPU of this machine; use --backend tensorrt-rtx for targets")
        if not gpu_present():
            raise UserError("--backend tensorrt: needs an NVIDIA GPU, and none is here; use --backend tensorrt-rtx")
    targets = tuple(_read_target(target) for target in targets)
    default_targets = () if name == "tensorrt" else INT4_TARGETS
    return Backend(name, _MODULES[name], _installed_version(name), tuple(dict.fromkeys(targets)) or default_targets)


def _resolve_name(requested: str) -> str:
    if requested not in BACKENDS:
        raise UserError(f"--backend {requested}: unknown; choose one of {', '.join(BACKENDS)}")
    if requested != "auto":
        return requested
    if _installed("tensorrt") and gpu_present():
        return "tensorrt"
    if _installed("tensorrt-rtx"):
        return "tensorrt-rtx"
    raise UserError(f"no TensorRT is installed; run: {install_hint('rtx')} (no GPU needed), or use --backend onnx")


def _read_target(target: str) -> str:
    """Returns a target as in RTX_TARGETS, written as sm89, SM89, 8.9 or 89. Raises UserError for one that is not there."""
    name = target.lower().replace("sm_", "sm").replace(".", "")
    name = f"sm{name}" if name.isdecimal() else name
    if name in RTX_TARGETS:
        return name
    offered = f"TensorRT-RTX offers {', '.join(RTX_TARGETS)}"
    if name in OTHER_GPUS:
        raise UserError(
            f"--target {target}: TensorRT-RTX does not build for {OTHER_GPUS[name]}; export with --backend tensorrt on that "
            f"machine; {offered}"
        )
    raise UserError(f"--target {target}: unknown; {offered}")


def install_hint(extra: str) -> str:
    """Returns the pip command that installs the packages of an extra of this package, from a clone or a wheel alike."""
    lines = importlib.metadata.requires("qvlm-export") or []
    packages = [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    return f"pip install {' '.join(map(shlex.quote, packages))}"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(_MODULES[name]) is not None


def _installed_version(name: str) -> str | None:
    for package in _PACKAGES[name]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def gpu_present() -> bool:
    """Returns whether the NVIDIA driver can be loaded and reports at least one GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def make_log(trt: Any, least_severity: Any) -> Any:
    """Returns a TensorRT logger that stores the messages of severity `least_severity` and above, and prints nothing.

    trt: the module tensorrt or tensorrt_rtx. The logger's `lines` are pairs of severity and text.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[Any, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= least_severity:  # TensorRT numbers its severities from the gravest
                self.lines.append((severity, text))

        def texts(self, severity: Any) -> list[str]:
            """Returns the stored messages of exactly this severity."""
            return [text for level, text in self.lines if level == severity]

        def all_texts(self) -> list[str]:
            """Returns all stored messages."""
            return [text for _, text in self.lines]

    return Log()
