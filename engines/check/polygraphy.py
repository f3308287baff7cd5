"""Graphs and engines through NVIDIA Polygraphy: its runners, its comparator, its files.

Polygraphy is imported when it is used; an environment variable read at that moment decides whether it drives TensorRT or
TensorRT-RTX, as for its own command line. Graphs run as float32 twins (engines/runtime/float32_graph.py).
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

from qvlm_export.calibrate.checkpoint.samples import Sample, place_features
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.float32_graph import to_float32
from qvlm_export.engines.runtime.onnx_runner import open_float32_session

OUTPUTS = {"vision": "image_embeds", "language": "logits"}
RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
# Float16 makes INT8 roundings fall the other way here and there, and each is a whole step; Polygraphy's own default.
MIN_SNR_DB = 20.0
# A graph repeats what it gave on the same machine; the tolerance is for other versions of ONNX Runtime.
REPEAT_TOLERANCE = 1e-3
NO_FUSION = "ORT_DISABLE_ALL"  # by default ONNX Runtime would round the activations of INT4 products to int8

Runners = Mapping[str, Any]  # part -> Polygraphy runner


@dataclass(frozen=True)
class Verdict:
    """What Polygraphy's comparator says of one output. snr_db: inf where both are equal."""

    part: str
    output: str
    runners: tuple[str, str]
    snr_db: float
    passed: bool


@dataclass(frozen=True)
class Saved:
    """What Polygraphy said; with --save-polygraphy also what is left for repeating it by hand.

    commands: lines for a shell, from any folder.
    """

    folder: Path | None
    commands: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def vision_feed(sample: Sample) -> dict[str, np.ndarray]:
    return {"pixel_values": np.ascontiguousarray(sample.pixel_values, np.float32)}


def language_feed(manifest: Manifest, sample: Sample, image_embeds: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of the first pass over a sample, caches empty, in the engine's own types.

    image_embeds: [n, hidden] as the vision graph put them out, or the dummy row of `no_image`.
    """
    text, length = manifest.config.text, len(sample.input_ids)
    narrow = np.float16 if manifest.float_type == "float16" else np.float32  # numpy's files know no bfloat16
    cache = np.zeros((1, text.num_kv_heads, manifest.limits.max_length, text.head_dim), narrow)
    return {
        "input_ids": sample.input_ids[None],
        "image_embeds": place_features(image_embeds, sample.placement).astype(narrow),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "write_index": np.zeros(1, np.int64),
        **{f"past_key_values.{i}.{part}": cache for i in range(text.num_layers) for part in ("key", "value")},
    }


def no_image(manifest: Manifest) -> np.ndarray:
    """The dummy row that a text-only prompt is given for image_embeds."""
    return np.zeros((1, manifest.config.text.hidden_size), np.float32)


def write_float32_graph(graph: Path, target: Path, output: str) -> None:
    """Writes the float32 twin of a shipped graph, with `output` as its only output, to `target` and `target`.data."""
    model, _ = to_float32(ir.load(graph))
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name == output]
    ir.save(model, target, external_data=f"{target.name}.data")


def float32_runners(folder: Path) -> dict[str, Any]:
    """Runners of the written twins, node by node as they stand in the file."""
    import onnxruntime as ort
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))  # as Polygraphy's command line does
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, NO_FUSION)

    def opener(part: str) -> Any:
        return lambda: ort.InferenceSession(str(folder / part / "model.onnx"), options, providers=["CPUExecutionProvider"])

    return {part: OnnxrtRunner(opener(part), "graph") for part in OUTPUTS}


def session_runners(manifest: Manifest) -> dict[str, Any]:
    """Runners of the session's own fused graphs."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def opener(part: str) -> Any:
        return lambda: open_float32_session(manifest.file(f"{part}_onnx"), manifest.file(f"{part}_data"))

    return {part: OnnxrtRunner(opener(part), "session") for part in OUTPUTS}


def engine_runners(manifest: Manifest) -> dict[str, Any]:
    """Runners of the engines, on the runtime that built them."""
    _select_runtime(manifest)
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return {
        part: TrtRunner(EngineFromBytes(BytesFromPath(str(manifest.file(f"{part}_plan")))), "engine") for part in OUTPUTS
    }


def _select_runtime(manifest: Manifest) -> None:
    """Sets Polygraphy's own switch. It is read at the first import, so a process stays with one runtime."""
    wanted = manifest.backend["name"] == "tensorrt-rtx"
    os.environ[RTX_SWITCH] = "1" if wanted else "0"
    from polygraphy import config

    if bool(config.USE_TENSORRT_RTX) != wanted:
        raise UserError(
            f"Polygraphy already runs another TensorRT in this process; start a new one for {manifest.path.name}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Polygraphy's log off stdout and turns its exceptions into UserErrors."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        raise UserError(f"Polygraphy: {' '.join(str(error).split())}; its own command line says more") from error


class RunnerPair:
    """Runs samples through a vision and a language runner, active for as long as the context is open."""

    def __init__(self, manifest: Manifest, runners: Runners) -> None:
        self._manifest, self._runners, self._stack = manifest, runners, ExitStack()

    def __enter__(self) -> RunnerPair:
        with quiet():
            for runner in self._runners.values():
                self._stack.enter_context(runner)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with quiet():
            self._stack.close()

    def logits(self, sample: Sample) -> np.ndarray:
        """float32 [S, vocab], every position."""
        embeds = no_image(self._manifest)
        if len(sample.pixel_values):
            embeds = self._infer("vision", vision_feed(sample))
        logits: np.ndarray = self._infer("language", language_feed(self._manifest, sample, embeds))[0]
        return logits

    def _infer(self, part: str, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        runner = self._runners[part]
        types = {name: dtype for name, (dtype, _) in runner.get_input_metadata(use_numpy_dtypes=True).items()}
        with quiet():
            outputs = runner.infer({name: array.astype(types[name], copy=False) for name, array in feed.items()})
        return np.array(outputs[OUTPUTS[part]], np.float32)  # a copy: the runner's buffers are used again


def save_case(manifest: Manifest, sample: Sample, folder: Path, others: Sequence[Runners], with_engine: bool) -> Saved:
    """Writes twins, inputs.json and outputs.json of a sample into `folder`, a subfolder for each graph, and compares.

    The twins, run node by node, are the reference for `others`. with_engine: whether this export has engines.
    """
    for part in parts_of(sample):
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_float32_graph(manifest.file(f"{part}_onnx"), folder / part / "model.onnx", OUTPUTS[part])
    golden, verdicts = compare_runs(manifest, sample, float32_runners(folder), others, folder)
    commands = [line for part, output in golden.items() for line in _commands(manifest, part, folder, output, with_engine)]
    return Saved(folder, tuple(commands), tuple(verdicts))


def parts_of(sample: Sample) -> list[str]:
    """The graphs that a sample runs through."""
    return list(OUTPUTS) if len(sample.pixel_values) else ["language"]


def compare_runs(
    manifest: Manifest, sample: Sample, reference: Runners, others: Sequence[Runners], save_to: Path | None = None
) -> tuple[dict[str, np.ndarray], list[Verdict]]:
    """Runs a sample on the reference and on others, graph by graph and all from the same inputs; the reference's outputs.

    Inputs and the reference's outputs are saved below `save_to`, as Polygraphy saves them.
    """
    golden: dict[str, np.ndarray] = {}
    verdicts: list[Verdict] = []
    with quiet():
        from polygraphy.comparator import Comparator

        for part in parts_of(sample):
            embeds = golden.get("vision", no_image(manifest))
            feed = vision_feed(sample) if part == "vision" else language_feed(manifest, sample, embeds)
            place = None if save_to is None else save_to / part
            results = Comparator.run(
                [reference[part]],
                data_loader=[feed],
                save_inputs_path=None if place is None else str(place / "inputs.json"),
                save_outputs_path=None if place is None else str(place / "outputs.json"),
            )
            golden[part] = np.array(results[0][1][0][OUTPUTS[part]], np.float32)
            verdicts += [compare(part, results, feed, runners[part]) for runners in others]
    return golden, verdicts


def compare(part: str, reference: Any, feed: Mapping[str, np.ndarray], runner: Any) -> Verdict:
    """Runs `runner` on the same inputs and lets Polygraphy's comparator judge its output. reference: RunResults."""
    from polygraphy.comparator import Comparator, SnrCompareFunc

    results = Comparator.run([runner], data_loader=[dict(feed)])
    func = SnrCompareFunc(snr_threshold=MIN_SNR_DB)
    (accuracy,) = Comparator.compare_accuracy([reference, results], compare_func=func)
    ((names, (iteration,)),) = accuracy.items()
    result = iteration[OUTPUTS[part]]
    runners = tuple(name.split("-N")[0] for name in names)
    return Verdict(part, OUTPUTS[part], (runners[0], runners[1]), float(getattr(result, "snr", -np.inf)), bool(result))


def _commands(manifest: Manifest, part: str, folder: Path, golden: np.ndarray, with_engine: bool) -> list[str]:
    """The lines that repeat a comparison by hand: the graph against saved outputs, and the engine against them."""
    place = folder / part
    files = [str((place / f"{kind}.json").resolve()) for kind in ("inputs", "outputs")]
    saved = ["--load-inputs", files[0], "--load-outputs", files[1]]
    atol = f"{REPEAT_TOLERANCE * float(np.abs(golden).max()):.1e}"
    tolerance = ["--atol", atol, "--rtol", f"{REPEAT_TOLERANCE:.0e}"]
    model = str((place / "model.onnx").resolve())
    lines = [
        shlex.join(["polygraphy", "run", model, "--onnxrt", "--graph-optimization-level", NO_FUSION, *saved, *tolerance])
    ]
    if with_engine:
        plan = str(manifest.file(f"{part}_plan").resolve())
        line = ["polygraphy", "run", plan, "--model-type", "engine", "--trt", *saved]
        line += ["--compare", "snr", "--snr-threshold", f"{MIN_SNR_DB:g}"]
        switch = f"{RTX_SWITCH}=1 " if manifest.backend["name"] == "tensorrt-rtx" else ""
        lines.append(switch + shlex.join(line))
    return lines
