"""Runs an exported LLaVA on token ids: logits at every position, and generation through the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qvlm_export.calibrate.checkpoint.samples import Placement, place_features
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.sampling import Sampling, pick_token

if TYPE_CHECKING:
    pass


class ContextError(UserError):
    """More tokens than the engine's cache has room for."""


class Runner(Protocol):
    """What a session needs of a runtime. A cache is whatever the runner makes of it; `step` writes into it.

    name: tensorrt, tensorrt-rtx or onnxruntime. device: cpu or cuda.
    """

    name: str
    device: str

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray: ...

    def new_cache(self, batch: int) -> Any: ...

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Any
    ) -> np.ndarray: ...

    def close(self) -> None: ...


@dataclass
class Sequences:
    """A batch of sequences that lives in a cache.

    tokens: all tokens of each sequence. cached: int64 [B], how many of them the cache holds; the rest is fed next.
    """

    tokens: list[list[int]]
    cached: np.ndarray
    cache: Any
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # of the last cached token


class Session:
    """A context manager over one runner. All lengths are checked here, before anything is written into a cache.

    why: the reason for this runner, for people.
    """

    def __init__(self, manifest: Manifest, runner: Runner, why: str = "") -> None:
        self.manifest = manifest
        self.runner = runner
        self.why = why

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.runner.close()

    def logits(
        self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None, placement: Placement | None = None
    ) -> np.ndarray:
        """int64 [1, S] and float32 [n, 3, R, R] -> float32 [1, S, vocab], every position. placement: of tiles."""
        ids = np.asarray(input_ids, np.int64)
        if ids.ndim != 2 or len(ids) != 1:
            raise UserError(f"input_ids has shape {list(ids.shape)}; give [1, tokens]")
        return self._feed(self._empty(1), [ids[0]], pixel_values, placement)

    def start(
        self,
        prompts: Sequence[np.ndarray],
        pixel_values: np.ndarray | None = None,
        placement: Placement | None = None,
    ) -> Sequences:
        """Prefills prompts of any lengths, int64 [S_b] each; their images stand in order in pixel_values.

        placement: of the tiles of all prompts together, see `join_placements`.
        """
        if len(prompts) > self.manifest.limits.max_batch:
            raise UserError(f"{len(prompts)} prompts at once, the engine was built for {self.manifest.limits.max_batch}")
        sequences = self._empty(len(prompts))
        self.extend(sequences, prompts, pixel_values, placement)
        return sequences

    def extend(
        self,
        sequences: Sequences,
        added: Sequence[np.ndarray],
        pixel_values: np.ndarray | None = None,
        placement: Placement | None = None,
    ) -> None:
        """Writes new tokens behind the sequences (a chat's next turn); only they are computed.

        Raises UserError, with the sequences as they were, when they would not fit.
        """
        pending = [tokens[n:] for tokens, n in zip(sequences.tokens, sequences.cached, strict=True)]
        fed = [np.array([*p, *a], np.int64) for p, a in zip(pending, added, strict=True)]
        logits = self._feed(sequences, fed, pixel_values, placement)
        lengths = np.array([len(f) for f in fed], np.int64)
        sequences.logits = logits[np.arange(len(fed)), lengths - 1]
        sequences.cached = sequences.cached + lengths
        for tokens, new in zip(sequences.tokens, added, strict=True):
            tokens.extend(int(t) for t in new)

    def generate(
        self, sequences: Sequences, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling | None = None
    ) -> Iterator[list[int | None]]:
        """Yields one token a sequence and step, None for sequences that have ended; a stop token is yielded, then nothing.

        It ends when all sequences have stopped, after max_new_tokens, or when the longest sequence fills the cache. Stop
        tokens do not become part of the sequences.
        """
        sampling = sampling or Sampling()
        batch, dummy = len(sequences.tokens), np.zeros((1, self.manifest.config.text.hidden_size), np.float32)
        randoms = [np.random.default_rng([sampling.seed, row]) for row in range(batch)]
        alive = [True] * batch
        room = self.manifest.limits.max_length - max(len(t) for t in sequences.tokens)
        for _ in range(min(max_new_tokens, room)):
            behind = np.array([len(t) for t in sequences.tokens]) > sequences.cached
            if behind.any():
                last = np.array([[t[-1]] for t in sequences.tokens], np.int64)
                where = sequences.cached
                sequences.logits = self.runner.step(last, dummy, where[:, None], where, sequences.cache)[:, -1]
                sequences.cached = where + behind
            chosen: list[int | None] = [
                pick_token(sequences.logits[row], sequences.tokens[row], sampling, randoms[row]) if alive[row] else None
                for row in range(batch)
            ]
            for row, token in enumerate(chosen):
                if token in stop_ids or token is None:
                    alive[row] = False
                else:
                    sequences.tokens[row].append(token)
            yield chosen
            if not any(alive):
                return

    def _empty(self, batch: int) -> Sequences:
        return Sequences([[] for _ in range(batch)], np.zeros(batch, np.int64), self.runner.new_cache(batch))

    def _feed(
        self,
        sequences: Sequences,
        fed: Sequence[np.ndarray],
        pixel_values: np.ndarray | None,
        placement: Placement | None,
    ) -> np.ndarray:
        """Runs new tokens behind what the cache holds; logits float32 [B, longest, vocab].

        Rows are padded on the right; what padding writes into the cache is overwritten before it can be seen.
        """
        limits, longest = self.manifest.limits, max(len(f) for f in fed)
        if min(len(f) for f in fed) == 0:
            raise UserError("the prompt is empty; give at least one token")
        end = int((sequences.cached + np.array([len(f) for f in fed])).max())
        if end > limits.max_length:
            raise ContextError(
                f"the context would be {end} tokens long, the engine was built for {limits.max_length}; "
                "shorten the prompt, or export with a larger --max-length"
            )
        vocabulary = self.manifest.config.text.vocab_size
        if strangers := [int(t) for f in fed for t in f if not 0 <= t < vocabulary]:
            raise UserError(f"token {strangers[0]} is not one of the {vocabulary} of this model's vocabulary")
        embeds = self._embeds(fed, pixel_values, placement)
        ids = np.full((len(fed), longest), _filler(self.manifest), np.int64)
        for row, new in enumerate(fed):
            ids[row, : len(new)] = new
        positions = sequences.cached[:, None] + np.arange(longest, dtype=np.int64)[None]
        if int(positions.max()) >= limits.max_length:
            raise ContextError(
                f"padding this batch would reach beyond the {limits.max_length} tokens of the cache; "
                "feed sequences of such different lengths one at a time"
            )
        return self.runner.step(ids, embeds, positions, sequences.cached, sequences.cache)

    def _embeds(
        self, prompts: Sequence[np.ndarray], pixel_values: np.ndarray | None, placement: Placement | None
    ) -> np.ndarray:
        config, limits = self.manifest.config, self.manifest.limits
        images = 0 if pixel_values is None else len(pixel_values)
        if images and placement is None and config.tiles is not None:
            raise UserError("this model cuts pictures into tiles, and the placement of their features is missing; give it")
        tokens = sum(int((p == config.image_token_id).sum()) for p in prompts)
        made = images * config.vision.tokens_per_image if placement is None else len(placement)
        if tokens != made:
            raise UserError(
                f"the prompt has {tokens} image tokens, {images} {'images' if placement is None else 'tiles'} make {made}; "
                "give one image for each <image>"
            )
        if images > limits.max_images and config.tiles is None:
            raise UserError(f"{images} images at once, the engine was built for {limits.max_images}")
        if pixel_values is None or not images:
            return self.runner.embed_images(np.zeros((0, 3, 1, 1), np.float32))
        return place_features(embed_tiles(self.runner, self.manifest, pixel_values), placement)


def embed_tiles(runner: Runner, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    """float32 [n, 3, R, R], any number of them -> [n * tokens, hidden] (and the row of image_newline, with tiles).

    The vision engine runs as often as its `max_images` asks for.
    """
    most = manifest.limits.max_images
    parts = [runner.embed_images(pixel_values[start : start + most]) for start in range(0, len(pixel_values), most)]
    if manifest.config.tiles is not None:
        parts = [*(part[:-1] for part in parts[:-1]), parts[-1]]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _filler(manifest: Manifest) -> int:
    """A padding token that is no image token."""
    return 0 if manifest.config.image_token_id != 0 else 1
