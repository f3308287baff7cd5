"""Opens a checkpoint: finds its folder, converts its configuration, and checks the name, shape and dtype of every tensor.

Only headers are read, no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.families import find_family, find_layout, make_renamer
from qvlm_export.checkpoints.files.headers import find_downloads
from qvlm_export.checkpoints.files.hub import find_checkpoint, read_config
from qvlm_export.checkpoints.files.source_kinds import ADAPTER_CONFIG, MERGE_OR_REMOVE, explain_names, refuse_quantized
from qvlm_export.checkpoints.files.weights import Location, open_weights
from qvlm_export.checkpoints.generation import read_end_tokens
from qvlm_export.checkpoints.model_config import model_config
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.graph.float_graphs import TIED_HEAD, TIED_TABLE, expected_shapes

SETTINGS = ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype("bfloat16"))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, in the layout of llava-hf whatever its own is.

    name: as the user gave it. location: where its files are. config_json: config.json in llava-hf's form, end tokens
    included. hf_config: what transformers makes of config.json, with its defaults. config: the geometry that the graphs
    need. source: all tensors by canonical names; their weights can be loaded when `find_downloads(source)` is empty.
    end_tokens: the ids that end an answer; empty when the checkpoint names none but its tokenizer's.
    """

    name: str
    location: Location
    config_json: dict[str, Any]
    hf_config: PreTrainedConfig
    config: ModelConfig
    source: TensorSource
    end_tokens: tuple[int, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of config.json and the processor's files."""
        return self.location.folder


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Opens the checkpoint `model`: an alias, a local folder, or a Hugging Face id at a `revision`.

    Weights on the Hub that are not in the cache are not downloaded: their headers are read, and `reopen_checkpoint` opens
    them once they are there. Raises UserError when it is not a supported LLaVA with complete, well-formed weights.
    """
    return _open(model, find_checkpoint(model, revision))


def reopen_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint after its weights were downloaded, when all that is checked by headers is checked again."""
    opened = _open(checkpoint.name, checkpoint.location)
    if missing := find_downloads(opened.source):
        raise UserError(f"{checkpoint.name}: {missing[0].name} is not in the cache any more; run the same command again")
    return opened


def _open(model: str, location: Location) -> Checkpoint:
    folder = location.folder
    for path in (path for path in folder.glob("*.json") if not path.is_dir()):  # transformers would wait for ever for a pipe
        check_regular_file(path, "a file of a checkpoint")
    where, stored_config = str(folder / "config.json"), read_config(folder)
    refuse_quantized(stored_config, where)
    layout = find_layout(stored_config)
    config_json = stored_config if layout.convert is None else layout.convert(stored_config, folder)
    hf_config = complete_config(config_json, where)
    config = model_config(hf_config, where)
    end_tokens = read_end_tokens(folder, config.text.vocab_size)
    if end_tokens:  # so that a calibrated checkpoint, which has no generation_config.json, ends its answers the same
        config_json = {**config_json, "eos_token_id": list(end_tokens)}
    source = open_weights(location, make_renamer(layout))
    if config.text.tie_word_embeddings and TIED_TABLE not in source and TIED_HEAD in source:  # stored under the other name
        source = open_weights(location, _name_table(make_renamer(layout)))
    if location.has(ADAPTER_CONFIG):
        raise UserError(f"{folder}: holds {ADAPTER_CONFIG}, so that transformers would add an adapter; {MERGE_OR_REMOVE}")
    if layout.open_source is not None:
        source = layout.open_source(source, stored_config, folder)
    check_tensors(source, config, folder)
    return Checkpoint(model, location, config_json, hf_config, config, source, end_tokens)


def complete_config(config_json: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """Returns the configuration object that transformers makes of a llava-hf config.json, defaults filled in.

    where: the path of config.json, for errors. Raises UserError when transformers cannot read it.
    """
    family = find_family(config_json, where)
    try:
        return family.config_class.from_dict(_drop_settings(config_json))
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{where}: not a valid configuration ({message}); download it again") from error


def _drop_settings(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without settings that change no result here: float type, and attention kernels.

    transformers reads some of their values in `from_pretrained` only, and kernels may be code that it would load.
    """
    return {
        key: _drop_settings(value) if isinstance(value, dict) else value
        for key, value in config_json.items()
        if key not in SETTINGS
    }


def _name_table(rename: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Returns a renaming that takes the output head for the embedding table that it is tied to."""

    def rename_head(name: str) -> str | None:
        canonical = rename(name)
        return TIED_TABLE if canonical == TIED_HEAD else canonical

    return rename_head


def check_tensors(source: TensorSource, config: ModelConfig, folder: Path) -> None:
    """Raises UserError when a tensor that the graphs need is missing, or is not of the expected shape and a float dtype."""
    for name, expected_shape in expected_shapes(config).items():
        if name not in source:
            if (kind := explain_names(source)) is not None:
                raise UserError(f"{folder}: {kind}")
            if name == TIED_HEAD:
                raise UserError(f"{folder}: lacks {name} though config.json does not tie it to the embeddings")
            raise UserError(f"{folder}: lacks the tensor {name}; the checkpoint is incomplete, download it again")
        if source.shape(name) != expected_shape:
            raise UserError(
                f"{folder}: {name} has shape {list(source.shape(name))}, but config.json says {list(expected_shape)}; "
                "weights and config do not belong together"
            )
        if source.dtype(name) not in _FLOATS:
            raise UserError(
                f"{folder}: {name} is {source.dtype(name)}; give an unquantized checkpoint (float16, bfloat16 or float32)"
            )
