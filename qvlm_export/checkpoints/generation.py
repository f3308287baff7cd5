"""The tokens that end an answer, as `generate` of transformers takes them from a checkpoint's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.hub import read_config

FILE, KEY = "generation_config.json", "eos_token_id"


def read_end_tokens(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids of the tokens that end an answer, each once; none when the files of `folder` name none.

    As in transformers, those of generation_config.json count alone where it names some. Otherwise those of config.json
    count, at its top or else in its text_config. Raises UserError for what is no token id below `vocab_size`.
    """
    config = read_config(folder)
    text = config.get("text_config")
    places = [("config.json", config, KEY), ("config.json", text, f"text_config.{KEY}")]
    if (folder / FILE).exists():
        places.insert(0, (FILE, read_config(folder, FILE), KEY))
    for file, section, key in places:
        value = section.get(KEY) if isinstance(section, dict) else None
        if value not in (None, []):
            return _check_ids(value, f"{folder / file}: {key}", vocab_size)
    return ()


def _check_ids(value: Any, where: str, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise UserError(f"{where} is {value!r:.80}; give a token id, or a list of them, from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))
