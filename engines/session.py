"""Runs an exported LLaVA on token ids: logits at every position, and greedy generation through the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from calibrate.errors import UserError
from engines.manifest import Manifest
from engines.onnx_runner import OnnxRunner


class Runner(Protocol):
    """What a session needs of a runtime. A cache is whatever the runner makes of it."""

    name: str

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray: ...

    def new_cache(self, batch: int) -> Any: ...

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Any
    ) -> tuple[np.ndarray, Any]: ...


class Session:
    """A context manager over one runner. All lengths are checked here, before anything is written into a cache."""

    def __init__(self, manifest: Manifest, runner: Runner) -> None:
        self.manifest = manifest
        self.runner = runner

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self.runner

    def logits(self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None) -> np.ndarray:
        """int64 [1, S] and float32 [n, 3, R, R] -> float32 [1, S, vocab], every position."""
        ids = np.asarray(input_ids, np.int64)
        if ids.ndim != 2 or len(ids) != 1:
            raise UserError(f"input_ids has shape {list(ids.shape)}; give [1, tokens]")
        embeds = self._embeds([ids[0]], pixel_values)
        logits, _ = self._prefill([ids[0]], embeds)
        return logits

    def generate_ids(
        self,
        prompts: Sequence[np.ndarray],
        pixel_values: np.ndarray | None,
        max_new_tokens: int,
        stop_ids: frozenset[int],
    ) -> Iterator[list[int | None]]:
        """Greedy decoding of a batch of prompts of any lengths, int64 [S_b] each, their images in order in pixel_values.

        Yields one token a sequence and step, None for sequences that have ended; a stop token is yielded, then nothing more.
        """
        lengths = np.array([len(p) for p in prompts], np.int64)
        room = self.manifest.limits.max_length - int(lengths.max())
        embeds = self._embeds(prompts, pixel_values)
        logits, cache = self._prefill(prompts, embeds)
        last = logits[np.arange(len(prompts)), lengths - 1]
        dummy = embeds[:1]
        alive = [True] * len(prompts)
        for number in range(min(max_new_tokens, room)):
            tokens = last.argmax(-1).astype(np.int64)
            yield [int(t) if on else None for t, on in zip(tokens, alive, strict=True)]
            alive = [on and int(t) not in stop_ids for t, on in zip(tokens, alive, strict=True)]
            if not any(alive) or number + 1 == min(max_new_tokens, room):
                return
            logits, cache = self.runner.step(tokens[:, None], dummy, lengths[:, None], lengths, cache)
            last, lengths = logits[:, -1], lengths + 1

    def _embeds(self, prompts: Sequence[np.ndarray], pixel_values: np.ndarray | None) -> np.ndarray:
        config, limits = self.manifest.config, self.manifest.limits
        images = 0 if pixel_values is None else len(pixel_values)
        tokens = sum(int((p == config.image_token_id).sum()) for p in prompts)
        if tokens != images * config.vision.tokens_per_image:
            raise UserError(
                f"the prompt has {tokens} image tokens, {images} images make {images * config.vision.tokens_per_image}; "
                "give one image for each <image>"
            )
        if images > limits.max_images:
            raise UserError(f"{images} images at once, the engine was built for {limits.max_images}")
        if pixel_values is None:
            pixel_values = np.zeros((0, 3, config.vision.image_size, config.vision.image_size), np.float32)
        return self.runner.embed_images(pixel_values)

    def _prefill(self, prompts: Sequence[np.ndarray], embeds: np.ndarray) -> tuple[np.ndarray, Any]:
        """Right-pads the prompts; what padding writes into the cache is overwritten before it can be seen."""
        limits, longest = self.manifest.limits, max(len(p) for p in prompts)
        if longest > limits.max_length:
            raise UserError(f"the prompt is {longest} tokens long, the engine was built for {limits.max_length}")
        if min(len(p) for p in prompts) == 0:
            raise UserError("the prompt is empty; give at least one token")
        if len(prompts) > limits.max_batch:
            raise UserError(f"{len(prompts)} prompts at once, the engine was built for {limits.max_batch}")
        ids = np.full((len(prompts), longest), _filler(self.manifest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(longest, dtype=np.int64), ids.shape)
        cache = self.runner.new_cache(len(prompts))
        return self.runner.step(ids, embeds, positions, np.zeros(len(prompts), np.int64), cache)


def _filler(manifest: Manifest) -> int:
    """A padding token that is no image token."""
    return 0 if manifest.config.image_token_id != 0 else 1


def open_session(manifest: Manifest, runtime: str = "auto", threads: int | None = None) -> Session:
    """A session on `runtime`. Raises UserError when it cannot run here."""
    if runtime not in ("auto", "onnxruntime"):
        raise UserError(f"--runtime {runtime}: not available in this version; use onnxruntime")
    return Session(manifest, OnnxRunner(manifest, threads))
