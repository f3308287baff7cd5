"""The rungs that can be asked questions: the checkpoint in torch, its simulated quantization, the ONNX graph, the engine.

Each is opened as a session with a processor (`LoadedModel`), so all of them are asked in the same way.
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
from qvlm_export.checkpoints.checkpoint import Checkpoint, completed_config, open_checkpoint
from qvlm_export.checkpoints.hub import read_config
from qvlm_export.checkpoints.model_config import model_config
from qvlm_export.engines.config import Limits, ModelConfig
from qvlm_export.engines.manifest import Manifest, describe_file, read_manifest, verify_file
from qvlm_export.engines.runtime.open import choose_runtime, open_session
from qvlm_export.engines.runtime.session import Session
from qvlm_export.inference.model import LoadedModel
from qvlm_export.inference.torch_runner import TorchRunner, check_device
from qvlm_export.inputs.samples import check_processor, load_processor
from qvlm_export.validation.compare import open_calibrated
from qvlm_export.validation.validate import open_reference

TORCH, SIMULATED, GRAPH, ENGINE = "torch", "simulated", "graph", "engine"
RUNGS = (TORCH, SIMULATED, GRAPH, ENGINE)
IN_TORCH = (TORCH, SIMULATED)
TORCH_BATCH = 8
LONGEST, TEXT_LENGTH = 4096, 1024  # tokens in torch, of all or beside the largest picture; caches grow as needed
LOGITS_BYTES = 2**30  # which a torch batch may have, of all positions
CONFIG_FILE, PROCESSOR_FILE = "config.json", "tokenizer_config.json"
PIECES, PIECE_BYTES = 64, 2**16  # of every weight file, read to know it again


@dataclass(frozen=True)
class EvalModel:
    """What `qvlm-eval` was given. identity: what tells it from others, for the fingerprint.

    manifest: of an export; checkpoint, calibrated: of the torch rungs, what they are opened from.
    """

    name: str
    rung: str
    identity: str
    config: ModelConfig
    manifest: Manifest | None = None
    checkpoint: Checkpoint | None = None
    calibrated: CalibratedModel | None = None


@dataclass(frozen=True)
class CalibratedModel:
    """A calibrated checkpoint, opened. hf_config: of the float model that it simulates."""

    checkpoint: CalibratedCheckpoint
    hf_config: PreTrainedConfig
    processor: Path


def find_eval_model(given: str, rung: str) -> EvalModel:
    """Decides what `given` is: an export (X.plan, X.json), a calibrated checkpoint, or `--model` of an export.

    rung: one of RUNGS, or auto for what it is. Opens headers only. Raises UserError where it has no such rung.
    """
    if rung not in ("auto", *RUNGS):
        raise UserError(f"--rung {rung}: unknown; choose auto, {', '.join(RUNGS)}")
    path = Path(given).expanduser()
    if path.suffix in (".plan", ".json"):
        return _export_subject(path, rung)
    if (path / RECORD_FILE).is_file():
        _require(rung, (SIMULATED,), f"{given} is a calibrated checkpoint")
        opened = _open_calibrated(path, _processor_beside(path))
        config = model_config(opened.hf_config, str(path / CONFIG_FILE))
        return EvalModel(path.name, SIMULATED, folder_identity(path), config, calibrated=opened)
    _require(rung, (TORCH,), f"{given} is no export; export it first, or give X.plan")
    checkpoint = open_checkpoint(given)
    return EvalModel(path.name or given, TORCH, checkpoint_identity(checkpoint), checkpoint.config, checkpoint=checkpoint)


def _require(rung: str, there: tuple[str, ...], what: str) -> None:
    if rung not in ("auto", *there):
        raise UserError(f"--rung {rung}: {what}")


def _export_subject(path: Path, rung: str) -> EvalModel:
    manifest = read_manifest(path.with_suffix(".json"))
    identity, config = str(describe_file(manifest.path)["sha256"]), manifest.config
    if rung == "auto":
        rung = GRAPH if choose_runtime(manifest, "auto")[0] == "onnxruntime" else ENGINE
    if rung == TORCH:
        checkpoint = open_reference(manifest, None)
        return EvalModel(path.stem, TORCH, checkpoint_identity(checkpoint), config, manifest, checkpoint)
    if rung == SIMULATED:
        calibrated, reason = open_calibrated(manifest)
        if calibrated is None:
            raise UserError(f"--rung simulated: {reason}")
        opened = _open_calibrated(calibrated.folder, verify_file(manifest, "processor"))
        return EvalModel(path.stem, SIMULATED, identity, config, manifest, calibrated=opened)
    return EvalModel(path.stem, rung, identity, config, manifest)


def _open_calibrated(folder: Path, processor: Path) -> CalibratedModel:
    stored = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    hf_config = completed_config(stored, str(folder / CONFIG_FILE))
    return CalibratedModel(CalibratedCheckpoint(folder), hf_config, processor)


def _processor_beside(folder: Path) -> Path:
    for place in (folder, folder.with_suffix(".processor")):
        if (place / PROCESSOR_FILE).is_file():
            return place
    raise UserError(f"{folder}: no processor is in it or beside it; copy the model's tokenizer and processor files there")


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """As `folder_identity`, of the folder and of another that holds the tower."""
    folders = dict.fromkeys((checkpoint.folder, *(path.parent for path in checkpoint.source.files())))
    return hashlib.sha256("".join(map(folder_identity, folders)).encode()).hexdigest()


def folder_identity(folder: Path) -> str:
    """sha256 over configuration files and, of every weight file, its size and pieces spread over all of it.

    Reading all of a 13B model only to know it again would cost as much as loading it.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
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
    subject: EvalModel, runtime: str = "auto", device: str = "auto", fast: bool = False, batch: int | None = None
) -> LoadedModel:
    """The model, ready to be asked; close it, as it is a context manager. Raises UserError where it cannot run here.

    runtime, fast: of graph and engine, see `open_session`; device, batch: of the torch rungs.
    """
    if subject.checkpoint is not None:
        return _float_model(subject.checkpoint, check_device(device), batch)
    if subject.calibrated is not None:
        return _simulated(subject.calibrated, subject, check_device(device), batch)
    if subject.manifest is None:
        raise RuntimeError(f"{subject}: has nothing to open")
    chosen = _runtime(subject.manifest, subject.rung, runtime)
    processor = load_processor(verify_file(subject.manifest, "processor"))
    return LoadedModel(open_session(subject.manifest, chosen, fast=fast), processor)


def _runtime(manifest: Manifest, rung: str, runtime: str) -> str:
    """What `open_session` is asked for: never auto, as a rung is what it is called. Raises UserError where they differ."""
    if rung == GRAPH:
        if runtime == "auto":
            return "onnxruntime"
        if runtime.startswith("onnxruntime"):
            return runtime
        raise UserError(f"--runtime {runtime}: is of engines, --rung graph runs on onnxruntime or onnxruntime:cpu")
    chosen = str(manifest.backend["name"]) if runtime == "auto" else runtime
    if chosen.startswith("onnx"):
        raise UserError(f"--rung engine: {manifest.path.name} has no engine to run with {chosen}; use --rung graph")
    return chosen


def _float_model(checkpoint: Checkpoint, device: str, batch: int | None) -> LoadedModel:
    processor = _fitting_processor(checkpoint.folder, checkpoint.config)
    runner = TorchRunner(make_blocks(checkpoint.hf_config), checkpoint.source, checkpoint.config, {}, device)
    return LoadedModel(Session(_bare(checkpoint.folder, checkpoint.config, batch), runner, "the checkpoint"), processor)


def _simulated(model: CalibratedModel, subject: EvalModel, device: str, batch: int | None) -> LoadedModel:
    """The calibrated checkpoint in torch, with the roundings of its graph where it belongs to an export."""
    calibrated, config = model.checkpoint, subject.config
    processor = _fitting_processor(model.processor, config)
    float_type = None if subject.manifest is None else subject.manifest.float_type
    blocks = make_blocks(model.hf_config)
    if float_type is not None:
        blocks = round_rotary_tables(blocks, float_type)
    quantizers = {name: q for name in calibrated.schemes if (q := calibrated.input_quantizer(name)) is not None}
    runner = TorchRunner(blocks, DequantizedSource(calibrated, float_type), config, quantizers, device)
    return LoadedModel(Session(_bare(calibrated.folder, config, batch), runner, "the calibrated checkpoint"), processor)


def _fitting_processor(folder: Path, config: ModelConfig) -> Any:
    processor = load_processor(folder)
    check_processor(processor, config, folder)
    return processor


def _bare(folder: Path, config: ModelConfig, batch: int | None) -> Manifest:
    """What a session must know of a model that was not exported."""
    length = min(config.text.max_position_embeddings, max(LONGEST, config.most_image_tokens + TEXT_LENGTH))
    usual = 4 * config.text.vocab_size * (config.most_image_tokens + TEXT_LENGTH // 8)
    most = batch or max(1, min(TORCH_BATCH, LOGITS_BYTES // usual))
    limits = Limits(length, most, 4 * most)
    nothing: dict[str, Any] = {}
    return Manifest(folder, nothing, config, limits, "float32", "", nothing, nothing, nothing, (), nothing, nothing, nothing)
