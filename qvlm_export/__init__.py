"""Exports LLaVA checkpoints to TensorRT INT4/INT8 engines with searched quantization.

import qvlm_export
qvlm_export.export("tiny", "engine.plan")
qvlm_export.load("engine.plan").generate("How many objects are there?", [image])
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvlm_export.calibrate.errors import UserError

if TYPE_CHECKING:
    from qvlm_export.inference.model import LoadedModel
    from qvlm_export.pipeline.export import ExportResult

__all__ = ["UserError", "__version__", "export", "load"]


def __getattr__(name: str) -> str:
    """Returns `__version__` from the installed package's metadata, which is read only when it is asked for."""
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("qvlm-export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def export(model: str | Path, out: str | Path, **options: Any) -> ExportResult:
    """Exports `model` to `out` and returns what was written.

    model: a folder, an alias or a Hugging Face id. out: the path of the engine file, X.plan. options: fields of
    `prepare.ExportOptions`, named as on the command line. Raises UserError for bad input.
    """
    from dataclasses import fields

    from qvlm_export.calibrate.numerics.memory import request_huge_pages

    request_huge_pages()
    from qvlm_export.pipeline import export as pipeline
    from qvlm_export.pipeline.preparation.prepare import ExportOptions
    from qvlm_export.pipeline.progress import Reporter

    names = [field.name for field in fields(ExportOptions) if field.name not in ("model", "out")]
    if unknown := sorted(set(options) - set(names)):
        raise UserError(f"{unknown[0]}: is no option of an export; there are {', '.join(names)}")
    paths = {key: Path(options[key]) for key in ("recipe", "calib_data", "work_dir") if options.get(key) is not None}
    export_options = ExportOptions(model=str(model), out=Path(out), **{**options, **paths})
    return pipeline.export(export_options, Reporter(quiet=True))


def load(path: str | Path, runtime: str = "auto", fast: bool = False) -> LoadedModel:
    """Opens an export for logits and generation; see `qvlm_export.inference.model.load`."""
    from qvlm_export.inference import model as loading

    return loading.load(path, runtime, fast)
