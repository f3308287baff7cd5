"""Comparison of graphs and engines with NVIDIA Polygraphy: its runners, its comparator and its file formats.

A sample goes in; a verdict on every output comes out, on request with files and command lines that repeat the comparison by
hand. Graphs run as float32 copies (engines/runtime/float32_graph.py).

Polygraphy is imported when it is used: an environment variable that it reads at that moment decides whether it drives
TensorRT or TensorRT-RTX, as for its own command line.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

from qvlm_export.calibrate.checkpoint.prefix import PrefixCache, count_shared, put_first
from qvlm_export.calibrate.checkpoint.samples import Sample, place_features
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest, open_prefix
from qvlm_export.engines.runtime.float32_graph import read_graph, to_float32
from qvlm_export.engines.runtime.onnx_runner import open_float32_session

OUTPUTS = {"vision": "image_embeds", "language": "logits"}
RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
# In float16 some activations round to the neighbouring INT8 code, an error of a whole step. 20 dB is Polygraphy's default.
MIN_SNR_DB = 20.0
# A graph repeats its outputs exactly on the same machine; the tolerance is for other versions of ONNX Runtime.
REPEAT_TOLERANCE = 1e-3
NO_FUSION = "ORT_DISABLE_ALL"  # by default ONNX Runtime would round the activations of INT4 products to int8

Runners = Mapping[str, Any]  # part -> Polygraphy runner


@dataclass(frozen=True)
class Verdict:
    """The result of Polygraphy's comparator for one output.

    part: vision or language. runners: names of the reference and of the runner compared with it. snr_db: signal-to-noise
    ratio in dB, inf where both are equal. passed: whether it is at least MIN_SNR_DB.
    """

    part: str
    output: str
    runners: tuple[str, str]
    snr_db: float
    passed: bool


@dataclass(frozen=True)
class SavedComparison:
    """The verdicts of a comparison and, with --save-polygraphy, what is needed to repeat it by hand.

    folder: holds the saved graphs, inputs and outputs, None when nothing was saved. commands: shell command lines that work
    from any folder.
    """

    folder: Path | None
    commands: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def vision_feed(sample: Sample) -> dict[str, np.ndarray]:
    """Returns the inputs of the vision graph: pixel_values float32 [n, 3, R, R]."""
    return {"pixel_values": np.ascontiguousarray(sample.pixel_values, np.float32)}


@dataclass(frozen=True)
class Caches:
    """The caches that a prefill starts with, by name of the input, in types that numpy has.

    prefix: of the export, None without one. filled: with the prefix in the first slots; empty: one array of zeros for all.
    """

    prefix: PrefixCache | None
    filled: Mapping[str, np.ndarray]
    empty: Mapping[str, np.ndarray]


def make_caches(manifest: Manifest) -> Caches:
    """Returns the caches of a prefill with this export, which all samples can share, as runners do not write into inputs."""
    text, prefix = manifest.config.text, open_prefix(manifest)
    # Polygraphy saves numpy arrays, and numpy has no bfloat16.
    dtype = np.float16 if manifest.float_type == "float16" else np.float32
    zeros = np.zeros((1, text.num_kv_heads, manifest.limits.max_length, text.head_dim), dtype)
    names = [f"past_key_values.{i}.{part}" for i in range(text.num_layers) for part in ("key", "value")]
    arrays = [zeros] * len(names) if prefix is None else [put_first(zeros.copy(), array) for array in prefix.arrays()]
    return Caches(prefix, dict(zip(names, arrays, strict=True)), dict.fromkeys(names, zeros))


def language_feed(
    manifest: Manifest, sample: Sample, image_embeds: np.ndarray, caches: Caches | None = None
) -> dict[str, np.ndarray]:
    """Returns the inputs of the language graph for the prefill of a sample, in the engine's types.

    Caches are empty but for the export's prefix, behind which the sample starts. image_embeds: [n, hidden], the output of
    the vision graph, or the dummy row of `make_empty_image_embeds`. caches: of `make_caches`; None makes them anew.
    """
    caches, length = caches or make_caches(manifest), len(sample.input_ids)
    start = 0 if caches.prefix is None else count_shared(caches.prefix.token_ids, sample.input_ids)
    dtype = np.float16 if manifest.float_type == "float16" else np.float32
    return {
        "input_ids": sample.input_ids[None, start:],
        "image_embeds": place_features(image_embeds, sample.placement).astype(dtype),
        "position_ids": np.arange(start, length, dtype=np.int64)[None],
        "write_index": np.full(1, start, np.int64),
        **(caches.filled if start else caches.empty),
    }


def make_empty_image_embeds(manifest: Manifest) -> np.ndarray:
    """Returns the dummy row, zeros float32 [1, hidden], that stands for image_embeds in a prompt without images."""
    return np.zeros((1, manifest.config.text.hidden_size), np.float32)


def write_float32_graph(graph: Path, target: Path, output: str) -> None:
    """Writes the float32 copy of an exported graph, with `output` as its only output, to `target` and `target`.data."""
    model, _ = to_float32(read_graph(graph))
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name == output]
    ir.save(model, target, external_data=f"{target.name}.data")


def float32_runners(folder: Path) -> dict[str, Any]:
    """Returns part -> ONNX Runtime runner of the float32 copies written to `folder`, without any graph optimization."""
    import onnxruntime as ort
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))  # the same number that Polygraphy's command line uses
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, NO_FUSION)

    def make_opener(part: str) -> Any:
        return lambda: ort.InferenceSession(str(folder / part / "model.onnx"), options, providers=["CPUExecutionProvider"])

    return {part: OnnxrtRunner(make_opener(part), "graph") for part in OUTPUTS}


def session_runners(manifest: Manifest) -> dict[str, Any]:
    """Returns part -> ONNX Runtime runner of the graphs as the session opens them, optimized and fused."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def make_opener(part: str) -> Any:
        return lambda: open_float32_session(manifest.file(f"{part}_onnx"), manifest.file(f"{part}_data"))

    return {part: OnnxrtRunner(make_opener(part), "session") for part in OUTPUTS}


def engine_runners(manifest: Manifest) -> dict[str, Any]:
    """Returns part -> TensorRT runner of the engines, on the runtime that built them.

    Raises UserError when this process already uses Polygraphy with the other TensorRT.
    """
    _select_runtime(manifest)
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return {
        part: TrtRunner(EngineFromBytes(BytesFromPath(str(manifest.file(f"{part}_plan")))), "engine") for part in OUTPUTS
    }


def _select_runtime(manifest: Manifest) -> None:
    """Sets Polygraphy's environment variable; it is read at the first import, so a process is bound to one runtime."""
    use_rtx = manifest.backend["name"] == "tensorrt-rtx"
    os.environ[RTX_SWITCH] = "1" if use_rtx else "0"
    from polygraphy import config

    if bool(config.USE_TENSORRT_RTX) != use_rtx:
        raise UserError(
            f"Polygraphy already runs another TensorRT in this process; start a new one for {manifest.path.name}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Polygraphy's log, which goes to stdout, and turns its exceptions into UserErrors."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        raise UserError(f"Polygraphy: {' '.join(str(error).split())}; its own command line says more") from error


class RunnerPair:
    """A context manager that runs samples through a vision and a language runner, which are active inside it."""

    def __init__(self, manifest: Manifest, runners: Runners) -> None:
        self._manifest, self._runners, self._stack = manifest, runners, ExitStack()
        self._caches = make_caches(manifest)

    def __enter__(self) -> RunnerPair:
        with quiet():
            for runner in self._runners.values():
                self._stack.enter_context(runner)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with quiet():
            self._stack.close()

    def logits(self, sample: Sample) -> np.ndarray:
        """Returns the logits of a sample at every position behind the prefix, float32 [S - p, vocab]."""
        embeds = make_empty_image_embeds(self._manifest)
        if len(sample.pixel_values):
            embeds = self._infer("vision", vision_feed(sample))
        logits: np.ndarray = self._infer("language", language_feed(self._manifest, sample, embeds, self._caches))[0]
        return logits

    def _infer(self, part: str, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        runner = self._runners[part]
        dtypes = {name: dtype for name, (dtype, _) in runner.get_input_metadata(use_numpy_dtypes=True).items()}
        with quiet():
            outputs = runner.infer({name: array.astype(dtypes[name], copy=False) for name, array in feed.items()})
        return np.array(outputs[OUTPUTS[part]], np.float32)  # a copy, because the runner reuses its buffers


def save_case(
    manifest: Manifest, sample: Sample, folder: Path, others: Sequence[Runners], with_engine: bool
) -> SavedComparison:
    """Saves a comparison: the float32 copies of the graphs, inputs.json and outputs.json, in a subfolder for each graph.

    The copies, run without graph optimization, are the reference for `others`. with_engine: whether this export has engines,
    which adds their command lines. Returns the verdicts and the command lines.
    """
    for part in parts_of(sample):
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_float32_graph(manifest.file(f"{part}_onnx"), folder / part / "model.onnx", OUTPUTS[part])
    golden, verdicts = compare_runs(manifest, sample, float32_runners(folder), others, folder)
    commands = [c for part, output in golden.items() for c in _shell_commands(manifest, part, folder, output, with_engine)]
    return SavedComparison(folder, tuple(commands), tuple(verdicts))


def parts_of(sample: Sample) -> list[str]:
    """Returns the names of the graphs that a sample runs through: language alone when it has no images."""
    return list(OUTPUTS) if len(sample.pixel_values) else ["language"]


def compare_runs(
    manifest: Manifest, sample: Sample, reference: Runners, others: Sequence[Runners], save_to: Path | None = None
) -> tuple[dict[str, np.ndarray], list[Verdict]]:
    """Runs a sample on the reference and on `others`, graph by graph, all on the same inputs.

    Returns the reference's outputs (part -> float32 array) and the verdicts. Inputs and reference outputs are saved below
    `save_to` in Polygraphy's format.
    """
    golden: dict[str, np.ndarray] = {}
    verdicts: list[Verdict] = []
    with quiet():
        from polygraphy.comparator import Comparator

        for part in parts_of(sample):
            embeds = golden.get("vision", make_empty_image_embeds(manifest))
            feed = vision_feed(sample) if part == "vision" else language_feed(manifest, sample, embeds)
            part_folder = None if save_to is None else save_to / part
            results = Comparator.run(
                [reference[part]],
                data_loader=[feed],
                save_inputs_path=None if part_folder is None else str(part_folder / "inputs.json"),
                save_outputs_path=None if part_folder is None else str(part_folder / "outputs.json"),
            )
            golden[part] = np.array(results[0][1][0][OUTPUTS[part]], np.float32)
            verdicts += [compare(part, results, feed, runners[part]) for runners in others]
    return golden, verdicts


def compare(part: str, reference: Any, feed: Mapping[str, np.ndarray], runner: Any) -> Verdict:
    """Runs `runner` on `feed` and returns the comparator's verdict on its output. reference: RunResults on the same feed."""
    from polygraphy.comparator import Comparator, SnrCompareFunc

    results = Comparator.run([runner], data_loader=[dict(feed)])
    func = SnrCompareFunc(snr_threshold=MIN_SNR_DB)
    (accuracy,) = Comparator.compare_accuracy([reference, results], compare_func=func)
    ((names, (iteration,)),) = accuracy.items()
    result = iteration[OUTPUTS[part]]
    runners = tuple(name.split("-N")[0] for name in names)
    return Verdict(part, OUTPUTS[part], (runners[0], runners[1]), float(getattr(result, "snr", -np.inf)), bool(result))


def _shell_commands(manifest: Manifest, part: str, folder: Path, golden: np.ndarray, with_engine: bool) -> list[str]:
    """Returns shell command lines that compare the graph, and the engine if there is one, with the saved outputs."""
    part_folder = folder / part
    paths = [str((part_folder / f"{kind}.json").resolve()) for kind in ("inputs", "outputs")]
    saved = ["--load-inputs", paths[0], "--load-outputs", paths[1]]
    atol = f"{REPEAT_TOLERANCE * float(np.abs(golden).max()):.1e}"
    tolerance = ["--atol", atol, "--rtol", f"{REPEAT_TOLERANCE:.0e}"]
    model = str((part_folder / "model.onnx").resolve())
    commands = [
        shlex.join(["polygraphy", "run", model, "--onnxrt", "--graph-optimization-level", NO_FUSION, *saved, *tolerance])
    ]
    if with_engine:
        plan = str(manifest.file(f"{part}_plan").resolve())
        command = ["polygraphy", "run", plan, "--model-type", "engine", "--trt", *saved]
        command += ["--compare", "snr", "--snr-threshold", f"{MIN_SNR_DB:g}"]
        switch = f"{RTX_SWITCH}=1 " if manifest.backend["name"] == "tensorrt-rtx" else ""
        commands.append(switch + shlex.join(command))
    return commands
