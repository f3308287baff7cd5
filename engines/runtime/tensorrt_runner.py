"""Runs the engines of an export on TensorRT or TensorRT-RTX.

There is one execution context an engine. Device buffers grow to the largest shape that was needed. The cache of each layer
is one buffer for keys and one for values, which the engine reads as past and writes as present, so that no cache is copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qvlm_export.calibrate.checkpoint.prefix import PrefixCache
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import make_log
from qvlm_export.engines.manifest import Manifest, verify_file
from qvlm_export.engines.runtime.device import Device, UnusableEngineError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Messages for what TensorRT-RTX finds wrong with a plan (EngineInvalidityDiagnostics). The messages for another version and
# another GPU also name what is needed and what is here, see `explain_refusal`.
_FINDING_MESSAGES = {
    "OLD_CUDA_DRIVER": "the NVIDIA driver of this machine is too old for it; update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime of this machine is too old for it; update it",
    "INSUFFICIENT_GPU_MEMORY": "this GPU has too little free memory for it",
    "CUDA_ERROR": "the CUDA driver or runtime of this machine does not work",
    "MALFORMED_ENGINE": "TensorRT-RTX does not take it for an engine",
}
_NUMPY = {"HALF": np.float16, "FLOAT": np.float32, "BF16": ml_dtypes.bfloat16, "INT64": np.int64, "INT32": np.int32}


class Engine:
    """A deserialized plan with its execution context and device buffers.

    trt: the module tensorrt or tensorrt_rtx. role: vision_plan or language_plan. Raises UnusableEngineError when the plan
    cannot run here, and UserError when the file was changed.
    """

    def __init__(self, trt: Any, device: Device, manifest: Manifest, role: str) -> None:
        plan = verify_file(manifest, role)
        self._device, self._log = device, make_log(trt, trt.ILogger.ERROR)
        self._runtime = trt.Runtime(self._log)
        data = plan.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            error, findings = self._first_error(), _read_findings(trt, self._runtime, data)
            reason = explain_refusal(manifest.backend, trt.__version__, device.capability(), findings, error)
            raise UnusableEngineError(f"{plan.name}: {reason}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UnusableEngineError(f"{plan.name}: no memory on this GPU for its execution context; free some")
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes

    def dtype(self, name: str) -> np.dtype:
        """Returns the numpy type of an input or output."""
        return np.dtype(_NUMPY[self._engine.get_tensor_dtype(name).name])

    def run(self, inputs: Mapping[str, np.ndarray], bindings: Mapping[str, int], output: str) -> np.ndarray:
        """Runs the engine once and returns its output `output`.

        inputs: name -> array, which is uploaded. bindings: tensor name -> address of device memory that is used in place.
        Raises UserError when a shape is outside the profile or the engine fails.
        """
        for name, array in inputs.items():
            typed = np.ascontiguousarray(array, self.dtype(name))
            if not self._context.set_input_shape(name, tuple(typed.shape)):
                raise UserError(f"{name}: shape {list(typed.shape)} is outside what the engine was built for")
            address = self._reserve_buffer(name, typed.nbytes)
            self._device.upload(address, typed)
            self._context.set_tensor_address(name, address)
        for name, address in bindings.items():
            self._context.set_tensor_address(name, address)
        result = np.empty(tuple(self._context.get_tensor_shape(output)), self.dtype(output))
        address = self._reserve_buffer(output, result.nbytes)
        self._context.set_tensor_address(output, address)
        if not self._context.execute_async_v3(self._device.stream):
            raise UserError(f"TensorRT could not run the engine ({self._first_error() or 'no reason given'})")
        self._device.download(result, address)
        return result

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Sets the shape of an input that is bound to device memory."""
        self._context.set_input_shape(name, shape)

    def _first_error(self) -> str:
        """Returns the first error that TensorRT logged; later ones are consequences of it."""
        return next((text for _, text in self._log.lines), "")

    def _reserve_buffer(self, name: str, count_bytes: int) -> int:
        """Returns the address of the buffer of `name`, which is replaced by a larger one when it is too small."""
        address, size = self._buffers.get(name, (0, 0))
        if size < count_bytes:
            if address:
                self._device.synchronize()
                self._device.free(address)
            address = self._device.allocate(count_bytes)
            self._buffers[name] = (address, count_bytes)
        return address


class Cache:
    """Device memory for the keys and values of all layers, of one batch; it is freed with the object.

    shape: (batch, kv_heads, max_length, head_dim). address: key_values.{i}.{key|value} -> device address. Raises
    UnusableEngineError when there is too little memory.
    """

    def __init__(self, device: Device, manifest: Manifest, dtype: np.dtype, batch: int) -> None:
        text = manifest.config.text
        self.shape = (batch, text.num_kv_heads, manifest.limits.max_length, text.head_dim)
        count_bytes = int(np.prod(self.shape)) * dtype.itemsize
        self._device, self.address = device, dict[str, int]()  # set before memory can run out, because __del__ reads them
        for name in (f"key_values.{i}.{part}" for i in range(text.num_layers) for part in ("key", "value")):
            self.address[name] = device.allocate(count_bytes)

    def fill(self, arrays: Sequence[np.ndarray]) -> None:
        """Copies key and value of every layer, [kv_heads, p, head_dim], into the first slots of all sequences, and waits."""
        batch, heads, length, width = self.shape
        for address, array in zip(self.address.values(), arrays, strict=True):
            pitch = length * width * array.itemsize  # bytes from one head to the next
            for row in range(batch):
                self._device.upload_rows(address + row * heads * pitch, pitch, array)
        self._device.synchronize()

    def __del__(self) -> None:
        for address in self.address.values():
            if self._device.holds(address):
                self._device.free(address)


class TensorRTRunner:
    """Runs the vision and language engine of an export on this machine's GPU.

    name: tensorrt or tensorrt-rtx. load: imports a module. open_device: opens the GPU. Raises UnusableEngineError when the
    engines cannot run here, and UserError when a plan was changed.
    """

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
        except (ImportError, OSError) as error:  # OSError: one of its shared libraries is missing
            raise UnusableEngineError(f"{name} cannot be loaded ({error})") from error
        self._manifest, self._device = manifest, open_device()
        self._prefix: PrefixCache | None = None  # the last one, and its arrays in the engine's type
        self._prefix_arrays: list[np.ndarray] = []
        try:
            self._vision = Engine(trt, self._device, manifest, "vision_plan")
            self._language = Engine(trt, self._device, manifest, "language_plan")
        except UserError:
            self._device.close()
            raise

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Returns image embeddings [n * tokens, hidden] of pixels float32 [n, 3, R, R]; one dummy row when n is 0."""
        if len(pixel_values) == 0:
            return np.zeros((1, self._manifest.config.text.hidden_size), self._vision.dtype("image_embeds"))
        return self._vision.run({"pixel_values": pixel_values}, {}, "image_embeds")

    def new_cache(self, batch: int, prefix: PrefixCache | None = None) -> Cache:
        """Returns a cache for `batch` sequences, empty but for the prefix's keys and values in the first slots of each."""
        dtype = self._language.dtype("past_key_values.0.key")
        cache = Cache(self._device, self._manifest, dtype, batch)
        if prefix is not None:
            if self._prefix is not prefix:
                self._prefix, self._prefix_arrays = prefix, [np.ascontiguousarray(a, dtype) for a in prefix.arrays()]
            cache.fill(self._prefix_arrays)
        return cache

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Cache
    ) -> np.ndarray:
        """Runs one forward pass, which writes into `cache`; returns the logits, float32 [B, S, vocab].

        ids, positions: int64 [B, S]. embeds: image embeddings [n, hidden]. index: int64 [B], the first cache slot to write.
        """
        bindings: dict[str, int] = {}
        for name, address in cache.address.items():
            self._language.set_shape(f"past_{name}", cache.shape)
            bindings |= {f"past_{name}": address, f"present_{name}": address}
        inputs = {"input_ids": ids, "image_embeds": embeds, "position_ids": positions, "write_index": index}
        return self._language.run(inputs, bindings, "logits")

    def close(self) -> None:
        """Releases the engines and all device memory."""
        del self._vision, self._language
        self._device.close()


def _read_findings(trt: Any, runtime: Any, plan: bytes) -> list[str]:
    """Returns the names of what TensorRT-RTX finds wrong with a plan; empty for the full TensorRT, which cannot tell."""
    if not hasattr(runtime, "get_engine_validity"):
        return []
    _, flags = runtime.get_engine_validity(plan)
    diagnostics = trt.EngineInvalidityDiagnostics.__members__
    return [name for name, flag in diagnostics.items() if int(flags) & int(flag)]


def explain_refusal(
    backend: Mapping[str, Any], version: str, capability: str, findings: Sequence[str], error: str = ""
) -> str:
    """Returns one sentence that says why a plan does not run here.

    backend: the manifest's entry on what built it. version, capability: of this machine, such as 1.7.1.116 and sm89.
    findings: names from EngineInvalidityDiagnostics. error: TensorRT's own message.
    """
    name, targets = backend["name"], backend["targets"]
    other_version = backend["version"] != version
    other_gpu = bool(targets) and "current" not in targets and capability not in targets
    # TensorRT-RTX reports nothing, or MALFORMED_ENGINE, for plans of some other versions.
    unreadable = not findings or "MALFORMED_ENGINE" in findings
    if "VERSION_MISMATCH" in findings or (unreadable and other_version):
        return f"was built with {name} {backend['version']}, here is {version}, and a plan runs on the version that built it"
    if "UNSUPPORTED_CC" in findings or (not findings and other_gpu):
        return f"was built for {', '.join(targets) or 'another GPU'}, the GPU here is {capability}"
    if findings:
        return "; ".join(_FINDING_MESSAGES.get(finding, finding) for finding in findings)
    return f"{name} {version} does not take it on this GPU, {capability} ({error or 'no reason given'})"
