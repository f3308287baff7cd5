"""GPU memory through NVIDIA's Python bindings (cuda-bindings): buffers, copies and one stream.

The bindings are imported when a `Device` is opened, and need an NVIDIA driver then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from qvlm_export.calibrate.errors import UserError


class UnusableEngineError(UserError):
    """The engine is intact, but this machine cannot run it, because of its GPU, driver, TensorRT or bindings."""


def cuda_runtime() -> Any:
    """Returns the module of NVIDIA's bindings. Raises ImportError when it is not installed."""
    return importlib.import_module("cuda.bindings.runtime")


class Device:
    """The current GPU with one stream; it is opened once a session and frees its memory when closed.

    Raises UnusableEngineError when the bindings are not installed, and whenever CUDA reports an error.
    """

    def __init__(self, load: Callable[[], Any] = cuda_runtime) -> None:
        try:
            self._runtime = load()
        except ImportError as error:
            raise UnusableEngineError("cuda-bindings is not installed (pip install cuda-bindings)") from error
        self._pointers: list[int] = []
        self.stream: int = int(self._unwrap(self._runtime.cudaStreamCreate()))

    def _unwrap(self, result: tuple[Any, ...]) -> Any:
        """Returns the value of a result (error, value). Raises UnusableEngineError with CUDA's name of the error."""
        error, *values = result
        if int(error) != 0:
            hint = "; export with a smaller --max-length or --max-batch" if error.name == "cudaErrorMemoryAllocation" else ""
            raise UnusableEngineError(f"the GPU reports {error.name}{hint}")
        return values[0] if values else None

    def allocate(self, count_bytes: int) -> int:
        """Returns the address of `count_bytes` of zeroed memory, which lives until `free` or `close`."""
        pointer = int(self._unwrap(self._runtime.cudaMalloc(count_bytes)))
        self._pointers.append(pointer)
        self._unwrap(self._runtime.cudaMemsetAsync(pointer, 0, count_bytes, self.stream))
        return pointer

    def holds(self, pointer: int) -> bool:
        """Returns whether `pointer` is still allocated; after `close` nothing is."""
        return pointer in self._pointers

    def free(self, pointer: int) -> None:
        """Frees allocated memory."""
        self._pointers.remove(pointer)
        self._unwrap(self._runtime.cudaFree(pointer))

    def upload(self, pointer: int, array: np.ndarray) -> None:
        """Copies a contiguous array to the GPU, in order with the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._unwrap(self._runtime.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self.stream))

    def upload_rows(self, pointer: int, pitch: int, array: np.ndarray) -> None:
        """Copies the rows of a contiguous array to the GPU, `pitch` bytes apart, in order with the stream.

        array: [rows, ..]. It must live until the stream has come that far.
        """
        kind, width = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, array.nbytes // len(array)
        place = (pointer, pitch, array.ctypes.data, width, width, len(array))
        self._unwrap(self._runtime.cudaMemcpy2DAsync(*place, kind, self.stream))

    def download(self, array: np.ndarray, pointer: int) -> None:
        """Copies from the GPU into a contiguous array and waits until it is filled."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._unwrap(self._runtime.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for all work on the stream."""
        self._unwrap(self._runtime.cudaStreamSynchronize(self.stream))

    def capability(self) -> str:
        """Returns the compute capability, such as sm89."""
        attribute = self._runtime.cudaDeviceAttr
        major = self._unwrap(self._runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = self._unwrap(self._runtime.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
        return f"sm{major}{minor}"

    def close(self) -> None:
        """Waits for the stream, frees all memory and destroys the stream."""
        self.synchronize()
        for pointer in list(self._pointers):
            self.free(pointer)
        self._unwrap(self._runtime.cudaStreamDestroy(self.stream))
