"""The process that builds TensorRT engines, run as `python -m qvlm_export.engines.builder.worker`.

It reads one JSON request from stdin and writes JSON lines to stdout: progress, a report on each plan, or one error. The
other side is engines/builder/build.py.
"""

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

# When TensorRT drops an input of the graph, the engine builds but computes wrong results, so these warnings are errors. The
# parser reports some of them and the builder the rest; the builder's other warnings are about the machine.
_FATAL_IN_PARSER = re.compile(r"unused input|not supported|ignored", re.IGNORECASE)
_FATAL_IN_BUILDER = re.compile(r"unused input", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+)")


def main() -> int:
    """Builds the jobs of the request on stdin one after another; returns the exit code, 1 after the first error."""
    _end_with_parent()
    request = json.load(sys.stdin)
    trt = importlib.import_module(request["module"])
    log = make_log(trt, trt.ILogger.INFO)
    for job in request["jobs"]:
        log.lines.clear()
        error = _build_plan(trt, log, request["targets"], job)
        if error is not None:
            _send({"error": error})
            return 1
    return 0


def _build_plan(trt: Any, log: Any, targets: list[str], job: dict[str, Any]) -> str | None:
    """Builds one plan and sends its report; returns an error message of one line, or None."""
    start, name = time.monotonic(), Path(job["onnx"]).name
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        parse_error = parser.get_error(0)
        node = f"{parse_error.node_name()} ({parse_error.node_operator()})"
        return f"{name}: TensorRT cannot parse node {node}: {_one_line(parse_error.desc())}"
    if dropped := _first_match(_FATAL_IN_PARSER, log.texts(trt.ILogger.WARNING)):
        return f"{name}: TensorRT would drop a part of the graph: {_one_line(dropped)}"
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    config.add_optimization_profile(_make_profile(builder, network, job["profile"]))
    config.progress_monitor = _make_monitor(trt, job["plan"])
    plan_bytes = _write_plan(trt, builder, network, config, job["plan"])
    if not plan_bytes:
        errors = log.texts(trt.ILogger.ERROR) or ["no reason given"]  # later errors are consequences of the first
        return f"{name}: TensorRT cannot build it: {_one_line(errors[0])}"
    if dropped := _first_match(_FATAL_IN_BUILDER, log.texts(trt.ILogger.WARNING)):
        return f"{name}: TensorRT dropped a part of the graph: {_one_line(dropped)}"
    weights_bytes = next((int(m.group(1)) for text in log.all_texts() if (m := _WEIGHTS.search(text))), None)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {"plan": job["plan"], "seconds": time.monotonic() - start, "plan_bytes": plan_bytes}
    _send({"report": {**report, "weights_bytes": weights_bytes, "peak_bytes": peak_bytes}})
    return None


def _end_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies (Linux only; elsewhere the next write to stdout fails)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _first_match(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    return next((text for text in texts if pattern.search(text)), None)


def _network_flags(trt: Any) -> int:
    """Returns the flag for a strongly typed network, or 0 since TensorRT 11, where every network is strongly typed."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _make_profile(builder: Any, network: Any, shapes: dict[str, list[list[int]]]) -> Any:
    profile = builder.create_optimization_profile()
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    for name, (smallest, usual, largest) in shapes.items():
        if name in names:
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
    return profile


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, path: str) -> int:
    """Builds and streams the plan into `path`, which saves a copy in memory; returns its bytes, 0 when the build failed."""

    class Writer(trt.IStreamWriter):
        def __init__(self, file: Any) -> None:
            trt.IStreamWriter.__init__(self)
            self._file = file

        def write(self, data: bytes) -> int:
            return int(self._file.write(data))

    temporary = f"{path}.{os.getpid()}.tmp"  # named after the process: the worker of a killed export may still write
    with open(temporary, "wb") as file:
        succeeded = builder.build_serialized_network_to_stream(network, config, Writer(file))
        file.flush()
        os.fsync(file.fileno())
        plan_bytes = file.tell() if succeeded else 0
    os.replace(temporary, path) if plan_bytes else os.remove(temporary)
    return plan_bytes


def _make_monitor(trt: Any, plan: str) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Sends the progress of the outermost phase only, as TensorRT nests several."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self._steps[phase] = max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                _send({"plan": plan, "progress": min(1.0, (step + 1) / self._steps[phase])})
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def _send(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main())
