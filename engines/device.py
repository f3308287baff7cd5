"""GPU memory through NVIDIA's own Python bindings (cuda-bindings): buffers, copies, one stream. Needs a driver when used."""

from __future__ import annotations

from typing import Any

import numpy as np

from calibrate.errors import UserError


class Device:
    """The current GPU with one stream. Opened once a session; frees what it allocated when closed."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise UserError("running an engine needs cuda-bindings; run: pip install 'qvlm-export[gpu]'") from error
        self._runtime: Any = runtime
        self._pointers: list[int] = []
        self.stream: int = int(self._call(runtime.cudaStreamCreate()))

    def _call(self, answer: tuple[Any, ...]) -> Any:
        """Unpacks (error, value). Raises UserError with CUDA's own name of the error."""
        error, *values = answer
        if int(error) != 0:
            hint = "; export with a smaller --max-length or --max-batch" if error.name == "cudaErrorMemoryAllocation" else ""
            raise UserError(f"the GPU reports {error.name}{hint}")
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
