"""GPU memory through NVIDIA's own Python bindings (cuda-bindings): buffers, copies, one stream. Needs a driver when used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from qvlm_export.calibrate.errors import UserError


class UnusableEngineError(UserError):
    """The engine is as it was written, but this machine cannot run it: its GPU, driver, TensorRT or bindings."""


def cuda_runtime() -> Any:
    """The module of NVIDIA's bindings. Raises ImportError."""
    return importlib.import_module("cuda.bindings.runtime")


class Device:
    """The current GPU with one stream. Opened once a session; frees what it allocated when closed.

    Raises UnusableEngineError when the bindings are not installed, and whenever CUDA reports an error.
    """

    def __init__(self, load: Callable[[], Any] = cuda_runtime) -> None:
        try:
            self._runtime = load()
        except ImportError as error:
            raise UnusableEngineError("cuda-bindings is not installed (pip install cuda-bindings)") from error
        self._pointers: list[int] = []
        self.stream: int = int(self._call(self._runtime.cudaStreamCreate()))

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """Unpacks (error, value). Raises UnusableEngineError with CUDA's own name of the error."""
        error, *values = answer
        if int(error) != 0:
            hint = "; export with a smaller --max-length or --max-batch" if error.name == "cudaErrorMemoryAllocation" else ""
            raise UnusableEngineError(f"the GPU reports {error.name}{hint}")
        return values[0] if values else None

    def allocate(self, count_bytes: int) -> int:
        """The address of zeroed memory that lives until `close`."""
        pointer = int(self._call(self._runtime.cudaMalloc(count_bytes)))
        self._pointers.append(pointer)
        self._call(self._runtime.cudaMemsetAsync(pointer, 0, count_bytes, self.stream))
        return pointer

    def holds(self, pointer: int) -> bool:
        """Whether `pointer` is still allocated; after `close` nothing is."""
        return pointer in self._pointers

    def free(self, pointer: int) -> None:
        self._pointers.remove(pointer)
        self._call(self._runtime.cudaFree(pointer))

    def upload(self, pointer: int, array: np.ndarray) -> None:
        """Copies a contiguous array to the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._runtime.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: np.ndarray, pointer: int) -> None:
        """Fills a contiguous array from the GPU and waits for it."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._runtime.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        self._call(self._runtime.cudaStreamSynchronize(self.stream))

    def capability(self) -> str:
        """Such as sm89."""
        attribute = self._runtime.cudaDeviceAttr
        major = self._call(self._runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = self._call(self._runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
        return f"sm{major}{minor}"

    def close(self) -> None:
        self.synchronize()
        for pointer in list(self._pointers):
            self.free(pointer)
        self._call(self._runtime.cudaStreamDestroy(self.stream))
