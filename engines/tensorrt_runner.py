"""Runs an export's engines on TensorRT or TensorRT-RTX.

One execution context an engine; device buffers are made for the largest shapes once, and each layer's cache is one buffer
that the engine reads as past and writes as present.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from calibrate.errors import UserError
from engines.device import Device
from engines.manifest import Manifest, verified_file

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NUMPY = {"HALF": np.float16, "FLOAT": np.float32, "BF16": ml_dtypes.bfloat16, "INT64": np.int64, "INT32": np.int32}


class Engine:
    """A deserialized plan with its context. Output memory grows with the largest shape seen."""

    def __init__(self, trt: Any, device: Device, manifest: Manifest, role: str) -> None:
        plan = verified_file(manifest, role)
        self._trt, self._device = trt, device
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise UserError(_why_not(manifest, plan, trt, device))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(f"{plan.name}: no memory for its execution context on this GPU; free some and try again")
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes

    def dtype(self, name: str) -> np.dtype:
        """The numpy type of an input or output."""
        return np.dtype(_NUMPY[self._engine.get_tensor_dtype(name).name])

    def run(self, inputs: Mapping[str, np.ndarray], bound: Mapping[str, int], output: str) -> np.ndarray:
        """Runs once. `bound` maps tensor names to device addresses that are used as they are; returns `output`."""
        for name, array in inputs.items():
            given = np.ascontiguousarray(array, self.dtype(name))
            if not self._context.set_input_shape(name, tuple(given.shape)):
                raise UserError(f"{name}: shape {list(given.shape)} is outside what the engine was built for")
            address = self._buffer(name, given.nbytes)
            self._device.upload(address, given)
            self._context.set_tensor_address(name, address)
        for name, address in bound.items():
            self._context.set_tensor_address(name, address)
        result = np.empty(tuple(self._context.get_tensor_shape(output)), self.dtype(output))
        address = self._buffer(output, result.nbytes)
        self._context.set_tensor_address(output, address)
        if not self._context.execute_async_v3(self._device.stream):
            raise UserError("TensorRT could not run the engine; its words are above")
        self._device.download(result, address)
        return result

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._context.set_input_shape(name, shape)

    def _buffer(self, name: str, count_bytes: int) -> int:
        address, size = self._buffers.get(name, (0, 0))
        if size < count_bytes:
            if address:
                self._device.synchronize()
                self._device.free(address)
            address = self._device.allocate(count_bytes)
            self._buffers[name] = (address, count_bytes)
        return address


class Cache:
    """Device memory of all layers' keys and values for one batch."""

    def __init__(self, device: Device, manifest: Manifest, dtype: np.dtype, batch: int) -> None:
        text = manifest.config.text
        self.shape = (batch, text.num_kv_heads, manifest.limits.max_length, text.head_dim)
        count_bytes = int(np.prod(self.shape)) * dtype.itemsize
        names = [f"key_values.{i}.{part}" for i in range(text.num_layers) for part in ("key", "value")]
        self.address = {name: device.allocate(count_bytes) for name in names}
        self._device = device

    def __del__(self) -> None:
        for address in self.address.values():
            if self._device.holds(address):
                self._device.free(address)


class TensorRTRunner:
    """The engines of one export on this machine's GPU."""

    def __init__(self, manifest: Manifest, name: str) -> None:
        self.name = name
        trt = importlib.import_module(MODULES[name])
        self._manifest, self._device = manifest, Device()
        self._vision = Engine(trt, self._device, manifest, "vision_plan")
        self._language = Engine(trt, self._device, manifest, "language_plan")

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [n, 3, R, R] -> image embeddings [n * tokens, hidden] in the engine's type; one dummy row for none."""
        if len(pixel_values) == 0:
            return np.zeros((1, self._manifest.config.text.hidden_size), self._vision.dtype("image_embeds"))
        return self._vision.run({"pixel_values": pixel_values}, {}, "image_embeds")

    def new_cache(self, batch: int) -> Cache:
        return Cache(self._device, self._manifest, self._language.dtype("past_key_values.0.key"), batch)

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Cache
    ) -> np.ndarray:
        """One pass, writing into `cache`. ids, positions: int64 [B, S]; index: int64 [B] -> logits float32 [B, S, vocab]."""
        bound: dict[str, int] = {}
        for name, address in cache.address.items():
            self._language.set_shape(f"past_{name}", cache.shape)
            bound |= {f"past_{name}": address, f"present_{name}": address}
        inputs = {"input_ids": ids, "image_embeds": embeds, "position_ids": positions, "write_index": index}
        return self._language.run(inputs, bound, "logits")

    def close(self) -> None:
        del self._vision, self._language
        self._device.close()


def _why_not(manifest: Manifest, plan: Path, trt: Any, device: Device) -> str:
    built = manifest.backend
    targets = ", ".join(built["targets"]) or str(built.get("gpu", "another GPU"))
    return (
        f"{plan.name}: was built with {built['name']} {built['version']} for {targets}; here is {built['name']} "
        f"{trt.__version__} on {device.capability()}; export again on this machine, or use --runtime onnxruntime"
    )
