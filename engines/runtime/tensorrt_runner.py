"""Runs an export's engines on TensorRT or TensorRT-RTX.

One execution context an engine; device buffers are made for the largest shapes once, and each layer's cache is one buffer
that the engine reads as past and writes as present.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import make_log
from qvlm_export.engines.manifest import Manifest, verify_file
from qvlm_export.engines.runtime.device import Device, UnusableEngineError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# What TensorRT-RTX finds in a plan's header (EngineInvalidityDiagnostics), in words. The first two are said with what was
# wanted and what is here.
_FINDINGS = {
    "OLD_CUDA_DRIVER": "the NVIDIA driver of this machine is too old for it; update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime of this machine is too old for it; update it",
    "INSUFFICIENT_GPU_MEMORY": "this GPU has too little free memory for it",
    "CUDA_ERROR": "the CUDA driver or runtime of this machine does not work",
    "MALFORMED_ENGINE": "TensorRT-RTX does not take it for an engine",
}
_NUMPY = {"HALF": np.float16, "FLOAT": np.float32, "BF16": ml_dtypes.bfloat16, "INT64": np.int64, "INT32": np.int32}


class Engine:
    """A deserialized plan with its context. Output memory grows with the largest shape seen.

    trt: the module tensorrt or tensorrt_rtx. Raises UnusableEngineError when they cannot run the plan here.
    """

    def __init__(self, trt: Any, device: Device, manifest: Manifest, role: str) -> None:
        plan = verify_file(manifest, role)
        self._device, self._log = device, make_log(trt, trt.ILogger.ERROR)
        self._runtime = trt.Runtime(self._log)
        data = plan.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            words, found = self._words(), _findings(trt, self._runtime, data)
            reason = why_not(manifest.backend, trt.__version__, device.capability(), found, words)
            raise UnusableEngineError(f"{plan.name}: {reason}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UnusableEngineError(f"{plan.name}: no memory on this GPU for its execution context; free some")
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
            raise UserError(f"TensorRT could not run the engine ({self._words() or 'no reason given'})")
        self._device.download(result, address)
        return result

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._context.set_input_shape(name, shape)

    def _words(self) -> str:
        """What TensorRT complained about first; the rest comes of it."""
        return next((text for _, text in self._log.lines), "")

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
    """Device memory of all layers' keys and values for one batch. Raises UnusableEngineError when there is too little."""

    def __init__(self, device: Device, manifest: Manifest, dtype: np.dtype, batch: int) -> None:
        text = manifest.config.text
        self.shape = (batch, text.num_kv_heads, manifest.limits.max_length, text.head_dim)
        count_bytes = int(np.prod(self.shape)) * dtype.itemsize
        self._device, self.address = device, dict[str, int]()  # before the memory runs out, so that __del__ finds them
        for name in (f"key_values.{i}.{part}" for i in range(text.num_layers) for part in ("key", "value")):
            self.address[name] = device.allocate(count_bytes)

    def __del__(self) -> None:
        for address in self.address.values():
            if self._device.holds(address):
                self._device.free(address)


class TensorRTRunner:
    """The engines of one export on this machine's GPU. Raises UnusableEngineError when it cannot run them."""

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        load: Callable[[str], Any] = importlib.import_module,
        open_device: Callable[[], Device] = Device,
    ) -> None:
        self.name, self.device = name, "cuda"
        try:
            trt = load(MODULES[name])
        except (ImportError, OSError) as error:  # OSError: one of its libraries
            raise UnusableEngineError(f"{name} cannot be loaded ({error})") from error
        self._manifest, self._device = manifest, open_device()
        try:
            self._vision = Engine(trt, self._device, manifest, "vision_plan")
            self._language = Engine(trt, self._device, manifest, "language_plan")
        except UserError:
            self._device.close()
            raise

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


def _findings(trt: Any, runtime: Any, plan: bytes) -> list[str]:
    """The names of what TensorRT-RTX finds wrong with a plan; the full TensorRT offers no such look."""
    if not hasattr(runtime, "get_engine_validity"):
        return []
    _, bits = runtime.get_engine_validity(plan)
    known = trt.EngineInvalidityDiagnostics.__members__
    return [name for name, flag in known.items() if int(bits) & int(flag)]


def why_not(built: Mapping[str, Any], version: str, capability: str, findings: Sequence[str], words: str = "") -> str:
    """Why a plan does not run here, in one sentence.

    built: the manifest's backend. version, capability: what is here, such as 1.7.1.116 and sm89. words: TensorRT's own.
    """
    name, targets = built["name"], built["targets"]
    other_version = built["version"] != version
    other_gpu = bool(targets) and "current" not in targets and capability not in targets
    unread = not findings or "MALFORMED_ENGINE" in findings  # as plans of some other versions look to TensorRT-RTX
    if "VERSION_MISMATCH" in findings or (unread and other_version):
        return f"was built with {name} {built['version']}, here is {version}, and a plan runs on the version that built it"
    if "UNSUPPORTED_CC" in findings or (not findings and other_gpu):
        return f"was built for {', '.join(targets) or 'another GPU'}, the GPU here is {capability}"
    if findings:
        return "; ".join(_FINDINGS.get(finding, finding) for finding in findings)
    return f"{name} {version} does not take it on this GPU, {capability} ({words or 'no reason given'})"
