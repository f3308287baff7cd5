"""Opens a model for evaluation in any of its forms: float or fake-quantized in torch, ONNX graph, TensorRT engine.

Takes an export, a calibrated checkpoint or the name of a checkpoint, and opens a session with a processor (`LoadedModel`),
so that every form answers questions through the same code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.calibrated import RECORD_FILE, CalibratedCheckpoint
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, round_rotary_tables
from qvlm_export.checkpoints.checkpoint import Checkpoint, complete_config, open_checkpoint
from qvlm_export.checkpoints.files.hub import read_config
from qvlm_export.checkpoints.generation import read_end_tokens
from qvlm_export.checkpoints.model_config import model_config
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.manifest import Manifest, describe_file, read_manifest, verify_file
from qvlm_export.engines.runtime.open import choose_runtime, open_session
from qvlm_export.engines.runtime.session import Session
from qvlm_export.inference.forms import ENGINE, FAKE_QUANT, FLOAT, GRAPH, MODEL_FORMS
from qvlm_export.inference.model import LoadedModel
from qvlm_export.inference.torch_runner import TorchRunner, check_device
from qvlm_export.inference.torch_session import open_float_session, torch_manifest
from qvlm_export.inputs.samples import check_processor, load_processor
from qvlm_export.pipeline.fetch import fetch_weights
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation.compare import open_calibrated
from qvlm_export.validation.validate import open_reference

CONFIG_FILE, PROCESSOR_FILE = "config.json", "tokenizer_config.json"
PIECES, PIECE_BYTES = 64, 2**16  # parts of every weight file that are hashed to identify it


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate, not opened yet.

    model_form: one of `MODEL_FORMS`. identity: a sha256 that tells this model from others, for the fingerprint of its
    predictions. manifest: of the export that it belongs to, or None. checkpoint: what the float form is opened from.
    calibrated: what the fake-quant form is opened from.
    """

    name: str
    model_form: str
    identity: str
    config: ModelConfig
    manifest: Manifest | None = None
    checkpoint: Checkpoint | None = None
    calibrated: CalibratedModel | None = None


@dataclass(frozen=True)
class CalibratedModel:
    """A calibrated checkpoint. hf_config: of its float model. processor: the folder of its tokenizer and image processor."""

    checkpoint: CalibratedCheckpoint
    hf_config: PreTrainedConfig
    processor: Path


def find_eval_model(
    source: str, model_form: str, reporter: Reporter | None = None, revision: str | None = None
) -> EvalModel:
    """Finds the model that `source` names: an export (X.plan or X.json), a calibrated checkpoint, or a float checkpoint.

    model_form: one of `MODEL_FORMS`, or "auto" for the natural form of the source; for an export that is the engine where it
    can run, else the graph. reporter: shows the download of a checkpoint's weights from the Hub, the only ones that are read
    here. revision: of a checkpoint on the Hub. Raises UserError when the source does not have this form.
    """
    reporter = reporter or Reporter(quiet=True)
    if model_form not in ("auto", *MODEL_FORMS):
        raise UserError(f"--model-form {model_form}: unknown; choose auto, {', '.join(MODEL_FORMS)}")
    path = Path(source).expanduser()
    if revision is not None and (path.suffix in (".plan", ".json") or path.exists()):
        raise UserError(f"--revision {revision}: is of a model on the Hub, and {source} is a file or folder; leave it out")
    if path.suffix in (".plan", ".json"):
        return _find_export(path, model_form, reporter)
    if (path / RECORD_FILE).is_file():
        _require_form(model_form, (FAKE_QUANT,), f"{source} is a calibrated checkpoint")
        calibrated = _open_calibrated_model(path, _find_processor(path))
        config = model_config(calibrated.hf_config, str(path / CONFIG_FILE))
        return EvalModel(path.name, FAKE_QUANT, folder_identity(path), config, calibrated=calibrated)
    _require_form(model_form, (FLOAT,), f"{source} is no export; export it first, or give X.plan")
    checkpoint = fetch_weights(open_checkpoint(source, revision), reporter)
    return EvalModel(path.name or source, FLOAT, checkpoint_identity(checkpoint), checkpoint.config, checkpoint=checkpoint)


def _require_form(model_form: str, available: tuple[str, ...], message: str) -> None:
    if model_form not in ("auto", *available):
        raise UserError(f"--model-form {model_form}: {message}")


def _find_export(path: Path, model_form: str, reporter: Reporter) -> EvalModel:
    manifest = read_manifest(path.with_suffix(".json"))
    identity, config = str(describe_file(manifest.path)["sha256"]), manifest.config
    if model_form == "auto":
        model_form = GRAPH if choose_runtime(manifest, "auto")[0] == "onnxruntime" else ENGINE
    if model_form == FLOAT:
        checkpoint = fetch_weights(open_reference(manifest, None), reporter)
        return EvalModel(path.stem, FLOAT, checkpoint_identity(checkpoint), config, manifest, checkpoint)
    if model_form == FAKE_QUANT:
        calibrated, reason = open_calibrated(manifest)
        if calibrated is None:
            raise UserError(f"--model-form fake-quant: {reason}")
        model = _open_calibrated_model(calibrated.folder, verify_file(manifest, "processor"))
        return EvalModel(path.stem, FAKE_QUANT, identity, config, manifest, calibrated=model)
    return EvalModel(path.stem, model_form, identity, config, manifest)


def _open_calibrated_model(folder: Path, processor: Path) -> CalibratedModel:
    float_config = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    hf_config = complete_config(float_config, str(folder / CONFIG_FILE))
    return CalibratedModel(CalibratedCheckpoint(folder), hf_config, processor)


def _find_processor(folder: Path) -> Path:
    """Returns the folder of the processor of a calibrated checkpoint: the checkpoint's own, or the one beside it."""
    for candidate in (folder, folder.with_suffix(".processor")):
        if (candidate / PROCESSOR_FILE).is_file():
            return candidate
    raise UserError(f"{folder}: no processor is in it or beside it; copy the model's tokenizer and processor files there")


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """Returns a sha256 that identifies a float checkpoint, over its folder and that of a vision tower stored elsewhere."""
    folders = dict.fromkeys((checkpoint.folder, *(path.parent for path in checkpoint.source.files())))
    return hashlib.sha256("".join(map(folder_identity, folders)).encode()).hexdigest()


def folder_identity(folder: Path) -> str:
    """Returns a sha256 over the configuration files and, for every weight file, its size and pieces spread over the file.

    Weight files are not hashed as a whole, as reading all of a 13B model only to identify it would cost as much as loading
    it.
    """
    digest = hashlib.sha256()
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for piece in range(PIECES):
                    file.seek(piece * max(size - PIECE_BYTES, 0) // (PIECES - 1))
                    digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def open_eval_model(
    eval_model: EvalModel, runtime: str = "auto", device: str = "auto", fast: bool = False, batch: int | None = None
) -> LoadedModel:
    """Opens the model and its processor; the result is a context manager that closes them.

    runtime, fast: of graph and engine, as in `open_session`. device, batch: of the torch forms; a batch of None is chosen by
    the size of the logits. Raises UserError when this form cannot run on this machine.
    """
    if eval_model.checkpoint is not None:
        return _open_float_model(eval_model.checkpoint, check_device(device), batch)
    if eval_model.calibrated is not None:
        return _open_fake_quant_model(eval_model.calibrated, eval_model, check_device(device), batch)
    if eval_model.manifest is None:
        raise RuntimeError(f"{eval_model}: has nothing to open")
    chosen_runtime = _choose_session_runtime(eval_model.manifest, eval_model.model_form, runtime)
    processor = load_processor(verify_file(eval_model.manifest, "processor"))
    return LoadedModel(open_session(eval_model.manifest, chosen_runtime, fast=fast), processor)


def _choose_session_runtime(manifest: Manifest, model_form: str, runtime: str) -> str:
    """Returns the runtime to open a graph or an engine with.

    Never "auto", which could open the other of the two forms. Raises UserError when the runtime does not run this form.
    """
    if model_form == GRAPH:
        if runtime == "auto":
            return "onnxruntime"
        if runtime.startswith("onnxruntime"):
            return runtime
        raise UserError(f"--runtime {runtime}: is of engines, --model-form graph runs on onnxruntime or onnxruntime:cpu")
    engine_runtime = str(manifest.backend["name"]) if runtime == "auto" else runtime
    if engine_runtime.startswith("onnx"):
        raise UserError(
            f"--model-form engine: {manifest.path.name} has no engine to run with {engine_runtime}; use --model-form graph"
        )
    return engine_runtime


def _open_float_model(checkpoint: Checkpoint, device: str, batch: int | None) -> LoadedModel:
    processor = _load_checked_processor(checkpoint.folder, checkpoint.config)
    return LoadedModel(open_float_session(checkpoint, device, batch), processor)


def _open_fake_quant_model(model: CalibratedModel, eval_model: EvalModel, device: str, batch: int | None) -> LoadedModel:
    """Opens a calibrated checkpoint in torch; when it belongs to an export, floats are rounded to the types of its graph."""
    calibrated, config = model.checkpoint, eval_model.config
    processor = _load_checked_processor(model.processor, config)
    float_type = None if eval_model.manifest is None else eval_model.manifest.float_type
    blocks = make_blocks(model.hf_config)
    if float_type is not None:
        blocks = round_rotary_tables(blocks, float_type)
    quantizers = {name: q for name in calibrated.schemes if (q := calibrated.input_quantizer(name)) is not None}
    runner = TorchRunner(blocks, DequantizedSource(calibrated, float_type), config, quantizers, device)
    if eval_model.manifest is None:
        end_tokens = read_end_tokens(calibrated.folder, config.text.vocab_size)
    else:
        end_tokens = tuple(eval_model.manifest.generation.get("eos_token_ids", ()))
    manifest = torch_manifest(calibrated.folder, config, batch, device, end_tokens)
    prefix = calibrated.read_prefix((config.text.num_layers, config.text.num_kv_heads, config.text.head_dim))
    return LoadedModel(Session(manifest, runner, "the calibrated checkpoint", prefix), processor)


def _load_checked_processor(folder: Path, config: ModelConfig) -> Any:
    processor = load_processor(folder)
    check_processor(processor, config, folder)
    return processor
