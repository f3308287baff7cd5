"""Sessions on torch: the manifest that they need for a model that was not exported, and the float model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.checkpoints.checkpoint import Checkpoint
from qvlm_export.engines.config import Limits, ModelConfig
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.session import Session
from qvlm_export.inference.torch_runner import DTYPES, TorchRunner

TORCH_BATCH = 8
# The context length of the torch forms, in tokens: at least this much in all, and this much text beside the largest image.
# Caches grow as needed.
MIN_CONTEXT_LENGTH, TEXT_LENGTH = 4096, 1024
MAX_LOGITS_BYTES = 2**30  # of a torch batch, over all positions


def open_float_session(checkpoint: Checkpoint, device: str, batch: int | None = None) -> Session:
    """Opens the float model with all its weights in memory; the result is a context manager that frees them.

    device, batch: as for `torch_manifest`. Raises UserError for weights that are not finite.
    """
    runner = TorchRunner(make_blocks(checkpoint.hf_config), checkpoint.source, checkpoint.config, {}, device)
    manifest = torch_manifest(checkpoint.folder, checkpoint.config, batch, device, checkpoint.end_tokens)
    return Session(manifest, runner, "the checkpoint")


def torch_manifest(
    folder: Path, config: ModelConfig, batch: int | None, device: str = "cpu", end_tokens: tuple[int, ...] = ()
) -> Manifest:
    """Returns the manifest that a session needs, for a model that was not exported: configuration, limits and end tokens."""
    length = min(config.text.max_position_embeddings, max(MIN_CONTEXT_LENGTH, config.most_image_tokens + TEXT_LENGTH))
    max_batch = batch or choose_batch(config, TORCH_BATCH)
    limits, dtype = Limits(length, max_batch, 4 * max_batch), str(DTYPES[device]).removeprefix("torch.")
    empty: dict[str, Any] = {}
    generation = {"eos_token_ids": end_tokens}
    return Manifest(folder, empty, config, limits, dtype, "", empty, empty, empty, (), empty, empty, empty, generation)


def choose_batch(config: ModelConfig, at_most: int) -> int:
    """Returns how many prompts, each with the largest image, run at once, so that their logits fit in MAX_LOGITS_BYTES."""
    prompt_logits_bytes = 4 * config.text.vocab_size * (config.most_image_tokens + TEXT_LENGTH // 8)
    return max(1, min(at_most, MAX_LOGITS_BYTES // prompt_logits_bytes))
