"""Writes float graphs of a checkpoint in any float type and opens a session on them, without the command line."""

from __future__ import annotations

from pathlib import Path

from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.engines.config import Limits
from qvlm_export.engines.graph.float_graphs import FLOAT_TYPES, fill_weights, language_graph, vision_graph
from qvlm_export.engines.graph.qdq import transpose_float_weights
from qvlm_export.engines.graph.write import write_graph
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.open import open_session
from qvlm_export.engines.runtime.session import Session


def export_session(checkpoint: Path, folder: Path, dtype: str, limits: Limits) -> Session:
    """Writes the float graphs of a checkpoint in `dtype` into `folder` and opens them on ONNX Runtime with one thread."""
    opened = open_checkpoint(str(checkpoint))
    kind = FLOAT_TYPES[dtype]
    graphs = {"vision": vision_graph(opened.config, kind), "language": language_graph(opened.config, limits, kind)}
    files = {}
    for part, model in graphs.items():
        fill_weights(model, opened.source)
        transpose_float_weights(model)
        write_graph(model, folder / f"{part}.onnx", lambda _: None)
        files |= {f"{part}_onnx": {"name": f"{part}.onnx"}, f"{part}_data": {"name": f"{part}.onnx.data"}}
    empty: dict[str, str] = {}
    manifest = Manifest(
        path=folder / "export.json",
        model=empty,
        config=opened.config,
        limits=limits,
        float_type=dtype,
        scheme="fp16",
        linears=empty,
        calibration=empty,
        backend=empty,
        plan_check=(),
        interface=empty,
        versions=empty,
        files=files,
    )
    return open_session(manifest, "onnxruntime:cpu", threads=1)
