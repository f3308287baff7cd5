"""Runs the ONNX graphs of an export on ONNX Runtime: on CPU as their float32 copies, with CUDA as they are written.

`open_runner` tries CUDA where it is available and falls back to the CPU with a reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from qvlm_export.calibrate.checkpoint.prefix import PrefixCache, put_first
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import gpu_present
from qvlm_export.engines.manifest import Manifest, verify_file
from qvlm_export.engines.runtime.float32_graph import locate, read_graph, to_float32

# Weights up to this size are passed to ONNX Runtime inside the graph, larger ones as arrays.
INLINE_BYTES = 1024
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Operators that must run on the GPU: with one of them on the CPU, weights or caches would be copied between the two at every
# token, which is slower than using no GPU. ONNX Runtime leaves arithmetic on shapes on the CPU by design.
HEAVY_OPS = frozenset(
    {"Attention", "Conv", "Gemm", "MatMul", "QuantizeLinear", "DequantizeLinear", "TensorScatter"}
    | {"LayerNormalization", "RMSNormalization", "RotaryEmbedding"}
)
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
# ONNX Runtime's errors have no common base class; its CUDA code raises RuntimeError.
_ORT_ERRORS = (
    errors.EPFail,
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
    RuntimeError,
)

Cache = list[ort.OrtValue]


class NoCudaError(UserError):
    """CUDA cannot be used for these graphs; the message is a reason, which `open_runner` prefixes with `CUDA: `."""


@dataclass(frozen=True)
class Cuda:
    """How ONNX Runtime is asked for CUDA; tests replace the parts.

    providers: names of the available execution providers. gpu: whether there is an NVIDIA GPU. create: opens a session.
    memory: ONNX Runtime's name of the device that holds the caches.
    """

    providers: Callable[[], Sequence[str]] = ort.get_available_providers
    gpu: Callable[[], bool] = gpu_present
    create: Callable[..., ort.InferenceSession] = ort.InferenceSession
    memory: str = "cuda"

    def obstacle(self) -> str | None:
        """Returns None when CUDA can be tried, otherwise the reason; it is empty on a machine where CUDA is not expected."""
        if CUDA in self.providers():
            return None if self.gpu() else "no NVIDIA GPU is here"
        return "for the GPU, install onnxruntime-gpu in place of onnxruntime" if self.gpu() else ""


class OnnxRunner:
    """Runs an export on two ONNX Runtime sessions, vision and language.

    Caches belong to the caller; `step` writes into them. device: cpu or cuda. memory: ONNX Runtime's name of the device that
    holds the caches. When ONNX Runtime fails, UserError is raised with the first line of its message.
    """

    name = "onnxruntime"

    def __init__(
        self,
        manifest: Manifest,
        vision: ort.InferenceSession,
        language: ort.InferenceSession,
        device: str = "cpu",
        memory: str = "cpu",
    ) -> None:
        self.device, self._memory = device, memory
        self._manifest, self._vision, self._language = manifest, vision, language
        self._dtypes = {value.name: _NUMPY[value.type] for value in (*vision.get_inputs(), *language.get_inputs())}

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Returns image embeddings [n * tokens, hidden] of pixels float32 [n, 3, R, R]; one dummy row when n is 0."""
        if len(pixel_values) == 0:
            return np.zeros((1, self._manifest.config.text.hidden_size), np.float32)
        pixels = np.ascontiguousarray(pixel_values, self._dtypes["pixel_values"])
        with _translate_errors(self.device):
            embeds: np.ndarray = self._vision.run(["image_embeds"], {"pixel_values": pixels})[0]
        return embeds

    def new_cache(self, batch: int, prefix: PrefixCache | None = None) -> Cache:
        """Returns caches, key and value of each layer: [batch, kv_heads, max_length, head_dim] in the graph's type.

        They are empty but for the prefix's keys and values in the first slots.
        """
        text, length = self._manifest.config.text, self._manifest.limits.max_length
        shape, dtype = (batch, text.num_kv_heads, length, text.head_dim), self._dtypes["past_key_values.0.key"]
        with _translate_errors(self.device):
            arrays = (np.zeros(shape, dtype) for _ in range(2 * text.num_layers))
            filled = arrays if prefix is None else map(put_first, arrays, prefix.arrays())
            return [ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0) for array in filled]

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Cache
    ) -> np.ndarray:
        """Runs one forward pass, which writes into `cache`; returns the logits, float32 [B, S, vocab].

        ids, positions: int64 [B, S]. embeds: image embeddings [n, hidden]. index: int64 [B], the first cache slot to write.
        Every cache is bound as input and as output, so that ONNX Runtime scatters in place and copies no cache.
        """
        binding = self._language.io_binding()
        inputs = {"input_ids": ids, "image_embeds": embeds, "position_ids": positions, "write_index": index}
        with _translate_errors(self.device):
            for name, array in inputs.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array, self._dtypes[name]))
            for number, value in enumerate(cache):
                name = f"key_values.{number // 2}.{('key', 'value')[number % 2]}"
                binding.bind_ortvalue_input(f"past_{name}", value)
                binding.bind_ortvalue_output(f"present_{name}", value)
            binding.bind_output("logits")
            self._language.run_with_iobinding(binding)
            logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits.astype(np.float32, copy=False)

    def close(self) -> None:
        """Releases both sessions and their memory."""
        del self._vision, self._language


@contextmanager
def _translate_errors(device: str) -> Iterator[None]:
    """Turns errors of ONNX Runtime into UserErrors."""
    try:
        yield
    except _ORT_ERRORS as error:
        remedy = "" if device == "cpu" else "; use --runtime onnxruntime:cpu"
        raise UserError(f"ONNX Runtime failed on {device.upper()} ({_first_line(error)}){remedy}") from error


def open_runner(
    manifest: Manifest, threads: int | None = None, fast: bool = False, cuda: Cuda | None = None
) -> tuple[OnnxRunner, str]:
    """Returns a runner and why it does not use CUDA; the reason is empty when it does, and where CUDA is not expected.

    cuda: None to use the CPU. threads, fast: on CPU, see `open_float32_session`. CUDA runs the float16 graphs as they are
    written. It is used only when ONNX Runtime has a CUDA kernel for every heavy operator and a first pass through both
    graphs succeeds; after any failure the CPU is used.
    """
    files = [
        (verify_file(manifest, f"{part}_onnx"), verify_file(manifest, f"{part}_data")) for part in ("vision", "language")
    ]
    reason = "" if cuda is None else cuda.obstacle()
    if cuda is not None and reason is None:
        try:
            return _open_on_cuda(manifest, [graph for graph, _ in files], cuda), ""
        except NoCudaError as error:
            reason = f"CUDA: {error}"
    vision, language = (open_float32_session(graph, data, threads, fast) for graph, data in files)
    return OnnxRunner(manifest, vision, language), reason or ""


def _open_on_cuda(manifest: Manifest, graphs: Sequence[Path], cuda: Cuda) -> OnnxRunner:
    """Returns a runner on CUDA that has run one token and one image. Raises NoCudaError."""
    if manifest.float_type == "bfloat16":
        raise NoCudaError("numpy has no bfloat16 to hand over")
    vision, language = (_open_cuda_session(graph, cuda.create) for graph in graphs)
    config = manifest.config
    try:
        runner = OnnxRunner(manifest, vision, language, "cuda", cuda.memory)
        embeds = runner.embed_images(np.zeros((1, 3, config.vision.image_size, config.vision.image_size), np.float32))
        zero = np.zeros((1, 1), np.int64)
        runner.step(zero, embeds, zero, zero[0], runner.new_cache(1))
    except UserError as error:
        raise NoCudaError(_first_line(error.__cause__ or error)) from error
    return runner


def _open_cuda_session(graph: Path, create: Callable[..., ort.InferenceSession]) -> ort.InferenceSession:
    """Returns a session over the graph as it is written, all heavy operators on the GPU. Raises NoCudaError."""
    options = _make_options(fast=False)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # Without enable_fallback=0, ONNX Runtime would print to stdout and continue on the CPU.
        session = create(str(graph), options, providers=[CUDA, CPU], enable_fallback=0)
        assignment = session.get_provider_graph_assignment_info()
    except _ORT_ERRORS as error:
        raise NoCudaError(_first_line(error)) from error
    if CUDA not in session.get_providers():
        raise NoCudaError("its libraries cannot be loaded")
    if cpu_operators := find_ops_outside(assignment, CUDA) & HEAVY_OPS:
        raise NoCudaError(f"this ONNX Runtime has no kernel for {', '.join(sorted(cpu_operators))}")
    return session


def find_ops_outside(assignment: Sequence[Any], provider: str) -> set[str]:
    """Returns the operators of nodes assigned to other providers. assignment: OrtEpAssignedSubgraph objects of a session."""
    return {node.op_type for subgraph in assignment if subgraph.ep_name != provider for node in subgraph.get_nodes()}


def open_float32_session(
    graph: Path, data: Path, threads: int | None = None, fast: bool = False, profile: Path | None = None
) -> ort.InferenceSession:
    """Returns a CPU session over the float32 copy of a written graph, see `open_float32_model`."""
    return open_float32_model(read_graph(graph, data), data, threads, fast, profile)


def open_float32_model(
    graph: ir.Model, data: Path, threads: int | None = None, fast: bool = False, profile: Path | None = None
) -> ort.InferenceSession:
    """Returns a CPU session over the float32 copy of a graph, which is changed in place.

    data: its external data file, which ONNX Runtime maps for the integer weights; float weights are widened and handed over
    in memory. threads: None for all cores of the process. fast: INT4 products round their activations to 8 bits, block by
    block, which decodes faster but is not what an engine computes. profile: prefix of ONNX Runtime's profile file, None for
    no profile. Raises UserError when ONNX Runtime cannot load the graph.
    """
    real = data.resolve()  # ONNX Runtime opens no file that a link leads to outside the folder it is given
    model, widened = to_float32(graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = locate(value.const_value, real.name)
    large = {name: array for name, array in widened.items() if array.nbytes > INLINE_BYTES}
    for name, array in large.items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            real.name, 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name
        )
    options = _make_options(fast)
    # x64 processors without VNNI add pairs of INT8 products in 16 bits, which can overflow; this option keeps them exact.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(real.parent))
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in large.values()]
    options.add_external_initializers(list(large), values)
    proto = ir.to_proto(model).SerializeToString()
    try:
        return ort.InferenceSession(
            proto,
            options,
            providers=[CPU],
            # It would merge the quantizers that the float32 copy keeps apart so that INT8 products fuse.
            disabled_optimizers=["CommonSubexpressionElimination"],
        )
    except (errors.Fail, errors.InvalidGraph) as error:
        raise UserError(f"{data}: ONNX Runtime cannot load its graph ({_first_line(error)}); export again") from error


def _make_options(fast: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # 0: INT4 products with float activations, as the engine computes them. 4: with activations rounded to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4" if fast else "0")
    return options


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
