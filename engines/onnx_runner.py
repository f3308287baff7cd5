"""Runs an export's ONNX graphs on ONNX Runtime's CPU kernels, as their float32 twins."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from calibrate.errors import UserError
from engines.float32_twin import to_float32
from engines.manifest import Manifest, verified_file

# Below this size a weight travels inside the graph; above, ONNX Runtime is given the array itself.
INLINE_BYTES = 1024

Cache = list[ort.OrtValue]


class OnnxRunner:
    """Two sessions, vision and language. Caches belong to the caller; `step` writes into them."""

    name = "onnxruntime"

    def __init__(self, manifest: Manifest, threads: int | None = None, fast: bool = False) -> None:
        self._manifest = manifest
        self._vision, self._language = (
            open_twin(verified_file(manifest, f"{part}_onnx"), verified_file(manifest, f"{part}_data"), threads, fast)
            for part in ("vision", "language")
        )

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [n, 3, R, R] -> float32 [n * tokens, hidden]; one dummy row for no image."""
        if len(pixel_values) == 0:
            return np.zeros((1, self._manifest.config.text.hidden_size), np.float32)
        pixels = np.ascontiguousarray(pixel_values, np.float32)
        embeds: np.ndarray = self._vision.run(["image_embeds"], {"pixel_values": pixels})[0]
        return embeds

    def new_cache(self, batch: int) -> Cache:
        """Empty caches, one key and one value a layer: float32 [batch, kv_heads, max_length, head_dim]."""
        text, length = self._manifest.config.text, self._manifest.limits.max_length
        shape = (batch, text.num_kv_heads, length, text.head_dim)
        return [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in range(2 * text.num_layers)]

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Cache
    ) -> np.ndarray:
        """One pass, writing into `cache`. ids, positions: int64 [B, S]; index: int64 [B] -> logits float32 [B, S, vocab].

        Every cache is bound as input and output at once: ONNX Runtime then scatters in place instead of copying it.
        """
        binding = self._language.io_binding()
        given = {"input_ids": ids, "image_embeds": embeds, "position_ids": positions, "write_index": index}
        for name, array in given.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for number, value in enumerate(cache):
            name = f"key_values.{number // 2}.{('key', 'value')[number % 2]}"
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_output("logits")
        self._language.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits

    def close(self) -> None:
        """Gives the memory of both sessions back."""
        del self._vision, self._language


def open_twin(graph: Path, data: Path, threads: int | None = None, fast: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session over the float32 twin of a written graph.

    fast: INT4 products round their activations to 8 bits, block by block, which no engine does, and decode faster.

    Integer weights are mapped from `data` by ONNX Runtime itself; widened float weights are handed over in memory.
    """
    model, widened = to_float32(ir.load(graph))
    large = {name: array for name, array in widened.items() if array.nbytes > INLINE_BYTES}
    for name, array in large.items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            data.name, 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    # 0: INT4 products with float activations, as the engine computes them. 4: with activations rounded to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4" if fast else "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent.resolve()))
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in large.values()]
    options.add_external_initializers(list(large), values)
    proto = ir.to_proto(model).SerializeToString()
    try:
        return ort.InferenceSession(
            proto,
            options,
            providers=["CPUExecutionProvider"],
            # It would merge the quantizers that the twin keeps apart so that INT8 products fuse.
            disabled_optimizers=["CommonSubexpressionElimination"],
        )
    except (ort.capi.onnxruntime_pybind11_state.Fail, ort.capi.onnxruntime_pybind11_state.InvalidGraph) as error:
        raise UserError(f"{graph}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}); export again") from error
