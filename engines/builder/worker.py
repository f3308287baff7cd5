"""The build process: JSON order on stdin, JSON lines on stdout. Run as `python -m qvlm_export.engines.builder.worker`."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from qvlm_export.engines.backend import make_log

# A graph input that TensorRT drops still builds, and gives wrong answers: that is an error. The parser says some of it, and
# the builder (whose other warnings are about the machine) the rest.
_FATAL_IN_PARSER = re.compile(r"unused input|not supported|ignored", re.IGNORECASE)
_FATAL_IN_BUILDER = re.compile(r"unused input", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+)")


def main() -> int:
    _end_with_parent()
    order = json.load(sys.stdin)
    trt = importlib.import_module(order["module"])
    log = make_log(trt, trt.ILogger.INFO)
    for job in order["jobs"]:
        log.lines.clear()
        error = _build(trt, log, order["targets"], job)
        if error is not None:
            _say({"error": error})
            return 1
    return 0


def _build(trt: Any, log: Any, targets: list[str], job: dict[str, Any]) -> str | None:
    """Builds one plan; returns what went wrong in one line, or None."""
    began, name = time.monotonic(), Path(job["onnx"]).name
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        first = parser.get_error(0)
        return f"{name}: TensorRT cannot parse node {first.node_name()} ({first.node_operator()}): {_line(first.desc())}"
    if dropped := _first(_FATAL_IN_PARSER, log.texts(trt.ILogger.WARNING)):
        return f"{name}: TensorRT would drop a part of the graph: {_line(dropped)}"
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    config.add_optimization_profile(_profile(builder, network, job["profile"]))
    config.progress_monitor = _make_monitor(trt, job["plan"])
    written = _write_plan(trt, builder, network, config, job["plan"])
    if not written:
        errors = log.texts(trt.ILogger.ERROR) or ["no reason given"]  # those after the first come of it
        return f"{name}: TensorRT cannot build it: {_line(errors[0])}"
    if dropped := _first(_FATAL_IN_BUILDER, log.texts(trt.ILogger.WARNING)):
        return f"{name}: TensorRT dropped a part of the graph: {_line(dropped)}"
    weights = next((int(m.group(1)) for text in log.all_texts() if (m := _WEIGHTS.search(text))), None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {"plan": job["plan"], "seconds": time.monotonic() - began, "plan_bytes": written}
    _say({"report": {**report, "weights_bytes": weights, "peak_bytes": peak}})
    return None


def _end_with_parent() -> None:
    """A killed export takes its build along (Linux; elsewhere the build ends when it next says something)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _first(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    return next((text for text in texts if pattern.search(text)), None)


def _network_flags(trt: Any) -> int:
    """Strong typing where it must still be asked for; since TensorRT 11 there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, network: Any, shapes: dict[str, list[list[int]]]) -> Any:
    profile = builder.create_optimization_profile()
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    for name, (smallest, usual, largest) in shapes.items():
        if name in names:
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
    return profile


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, path: str) -> int:
    """Streams the plan into `path` (never a second copy in memory); returns its size, 0 when the build failed."""

    class Writer(trt.IStreamWriter):
        def __init__(self, file: Any) -> None:
            trt.IStreamWriter.__init__(self)
            self._file = file

        def write(self, data: bytes) -> int:
            return int(self._file.write(data))

    temporary = f"{path}.{os.getpid()}.tmp"  # of its own: a killed export's worker may still be at work
    with open(temporary, "wb") as file:
        ok = builder.build_serialized_network_to_stream(network, config, Writer(file))
        file.flush()
        os.fsync(file.fileno())
        written = file.tell() if ok else 0
    os.replace(temporary, path) if written else os.remove(temporary)
    return written


def _make_monitor(trt: Any, plan: str) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports the outermost phase only; TensorRT nests several."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self._steps[phase] = max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                _say({"plan": plan, "progress": min(1.0, (step + 1) / self._steps[phase])})
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main())
