"""Session on an exported LLaVA: logits at every position, and batched generation with a key/value cache.

Token ids and pixel values go in, logits and token ids come out. A session works with any `Runner`, and checks all lengths
before the runner writes into a cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from qvlm_export.calibrate.checkpoint.prefix import PrefixCache, count_shared
from qvlm_export.calibrate.checkpoint.samples import Placement, place_features
from qvlm_export.calibrate.errors import PrefixWarning, UserError
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.sampling import Sampling, pick_token


class ContextError(UserError):
    """The context would be longer than the engine's cache."""


class Runner(Protocol):
    """A runtime with an opened export. The cache is of the runner's own type.

    name: tensorrt, tensorrt-rtx or onnxruntime. device: cpu or cuda.
    """

    name: str
    device: str

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Returns image embeddings [n * tokens, hidden] of pixels float32 [n, 3, R, R]; one dummy row when n is 0."""
        ...

    def new_cache(self, batch: int, prefix: PrefixCache | None = None) -> Any:
        """Returns a cache for `batch` sequences, empty but for the prefix's keys and values in the first slots of each."""
        ...

    def step(self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: Any) -> np.ndarray:
        """Runs one forward pass, which writes into `cache`; returns the logits, float32 [B, S, vocab].

        ids, positions: int64 [B, S]. embeds: image embeddings [n, hidden]. index: int64 [B], the first cache slot to write.
        """
        ...

    def close(self) -> None:
        """Releases the runtime's memory."""
        ...


@dataclass
class Sequences:
    """A batch of sequences and its cache.

    tokens: all tokens of each sequence. cached: int64 [B], how many of them the cache holds; the others are run in the next
    step. cache: of the runner's type. logits: float32 [B, vocab], at the last cached token.
    """

    tokens: list[list[int]]
    cached: np.ndarray
    cache: Any
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))


class Session:
    """Runs a model through one runner, which is closed at the end of the context.

    why: the reason why this runner was chosen, to be printed. prefix: keys and values of the tokens that prompts begin with;
    a prompt starts behind those that it shares with them, and computes all its tokens where it shares none.
    """

    def __init__(self, manifest: Manifest, runner: Runner, why: str = "", prefix: PrefixCache | None = None) -> None:
        self.manifest = manifest
        self.runner = runner
        self.why = why
        self.prefix = prefix

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.runner.close()

    def logits(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        placement: Placement | None = None,
        *,
        require_finite: bool = True,
    ) -> np.ndarray:
        """Returns the logits at every position, float32 [1, S, vocab].

        Those of the prefix's tokens are computed without the prefix, as a cache of keys and values holds no logits.
        input_ids: int64 [1, S]. pixel_values: float32 [n, 3, R, R], images or tiles. placement: for models with tiles, which
        features each image token is made of. require_finite: False for a caller that counts NaN and infinite logits itself.
        Raises UserError when the inputs do not fit together or into the engine, and for logits that are not finite.
        """
        ids = np.asarray(input_ids, np.int64)
        if ids.ndim != 2 or len(ids) != 1:
            raise UserError(f"input_ids has shape {list(ids.shape)}; give [1, tokens]")
        first = np.zeros((1, 0, self.manifest.config.text.vocab_size), np.float32)
        if shared := 0 if self.prefix is None else count_shared(self.prefix.token_ids, ids[0]):
            alone = Sequences([[]], np.zeros(1, np.int64), self.runner.new_cache(1))
            first = self._feed(alone, [ids[0, :shared]], None, None)
            del alone  # its cache may be gigabytes, and there is another one next
        sequences, behind = self._begin([ids[0]])
        logits = np.concatenate([first, self._feed(sequences, behind, pixel_values, placement)], axis=1)
        if require_finite:
            self._check_finite(logits[0])
        return logits

    def start(
        self,
        prompts: Sequence[np.ndarray],
        pixel_values: np.ndarray | None = None,
        placement: Placement | None = None,
    ) -> Sequences:
        """Prefills prompts, int64 [S_b] each and of any lengths, and returns them as sequences.

        pixel_values: float32 [n, 3, R, R], the images of all prompts in order. placement: for models with tiles, of all
        prompts together, see `join_placements`. Raises UserError as `extend` does.
        """
        if len(prompts) > self.manifest.limits.max_batch:
            raise UserError(f"{len(prompts)} prompts at once, the engine was built for {self.manifest.limits.max_batch}")
        sequences, behind = self._begin(prompts)
        self.extend(sequences, behind, pixel_values, placement)
        return sequences

    def extend(
        self,
        sequences: Sequences,
        added: Sequence[np.ndarray],
        pixel_values: np.ndarray | None = None,
        placement: Placement | None = None,
    ) -> None:
        """Appends new tokens to the sequences, such as a chat's next turn; only the new tokens are computed.

        added: int64 [S_b] of each sequence. Raises UserError, and leaves the sequences unchanged, when they do not fit or
        the logits are not finite.
        """
        pending = [tokens[n:] for tokens, n in zip(sequences.tokens, sequences.cached, strict=True)]
        inputs = [np.array([*p, *a], np.int64) for p, a in zip(pending, added, strict=True)]
        logits = self._feed(sequences, inputs, pixel_values, placement)
        lengths = np.array([len(row) for row in inputs], np.int64)
        last_logits = logits[np.arange(len(inputs)), lengths - 1]
        self._check_finite(last_logits)
        sequences.logits = last_logits
        sequences.cached = sequences.cached + lengths
        for tokens, new in zip(sequences.tokens, added, strict=True):
            tokens.extend(int(t) for t in new)

    def generate(
        self, sequences: Sequences, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling | None = None
    ) -> Iterator[list[int | None]]:
        """Generates tokens; yields in each step one token of every sequence, None for sequences that have ended.

        A sequence ends after a stop token, which is yielded but not added to the sequence. Generation ends when all
        sequences have ended, after `max_new_tokens`, or when the longest one fills the cache. sampling: None for greedy.
        Raises UserError when the logits of a sequence that goes on are not finite.
        """
        sampling = sampling or Sampling()
        batch, dummy = len(sequences.tokens), np.zeros((1, self.manifest.config.text.hidden_size), np.float32)
        generators = [np.random.default_rng([sampling.seed, row]) for row in range(batch)]
        alive = [True] * batch
        free_slots = self.manifest.limits.max_length - max(len(sequence) for sequence in sequences.tokens)
        for _ in range(min(max_new_tokens, free_slots)):
            has_uncached = np.array([len(sequence) for sequence in sequences.tokens]) > sequences.cached
            if has_uncached.any():
                last = np.array([[sequence[-1]] for sequence in sequences.tokens], np.int64)
                positions = sequences.cached
                sequences.logits = self.runner.step(last, dummy, positions[:, None], positions, sequences.cache)[:, -1]
                sequences.cached = positions + has_uncached
                self._check_finite(sequences.logits[alive])
            step_tokens: list[int | None] = [
                pick_token(sequences.logits[row], sequences.tokens[row], sampling, generators[row]) if alive[row] else None
                for row in range(batch)
            ]
            for row, token in enumerate(step_tokens):
                if token in stop_ids or token is None:
                    alive[row] = False
                else:
                    sequences.tokens[row].append(token)
            yield step_tokens
            if not any(alive):
                return

    def _check_finite(self, logits: np.ndarray) -> None:
        """Raises UserError for logits of which some are NaN or infinite: no token, and no likelihood, follows from them."""
        if not np.isfinite(logits).all():
            raise UserError(
                f"the logits are NaN or infinite ({self.runner.name} on {self.runner.device}), so there is no answer: "
                f"activations leave the range of {self.manifest.float_type}, or weights are damaged; qvlm-validate "
                "--per-layer shows where; export with another --dtype, or take another checkpoint"
            )

    def _begin(self, prompts: Sequence[np.ndarray]) -> tuple[Sequences, list[np.ndarray]]:
        """Returns sequences that hold what each prompt shares with the prefix, and the rest of each prompt.

        Where a prompt is shorter than the prefix or goes on otherwise, the slots behind what it shares are written again
        before any query attends to them.
        """
        prefix = self.prefix
        if prefix is None:
            empty: list[list[int]] = [[] for _ in prompts]
            return Sequences(empty, np.zeros(len(prompts), np.int64), self.runner.new_cache(len(prompts))), list(prompts)
        shared = [count_shared(prefix.token_ids, prompt) for prompt in prompts]
        if not all(shared) and any(len(prompt) for prompt in prompts):
            warnings.warn(
                f"a prompt does not begin with the {len(prefix)} tokens behind which the model was calibrated, so its "
                "answer may lose accuracy; use the model's chat template",
                PrefixWarning,
                stacklevel=4,
            )
        cache = self.runner.new_cache(len(prompts), prefix if any(shared) else None)
        begun = [list(prefix.token_ids[:count]) for count in shared]
        return Sequences(begun, np.array(shared, np.int64), cache), [p[n:] for p, n in zip(prompts, shared, strict=True)]

    def _feed(
        self,
        sequences: Sequences,
        inputs: Sequence[np.ndarray],
        pixel_values: np.ndarray | None,
        placement: Placement | None,
    ) -> np.ndarray:
        """Runs new tokens of each sequence after those in the cache; returns logits float32 [B, longest, vocab].

        Rows are padded on the right. What padding writes into the cache is overwritten before any query attends to it.
        """
        limits, longest = self.manifest.limits, max(len(row) for row in inputs)
        if min(len(row) for row in inputs) == 0:
            raise UserError("the prompt is empty; give at least one token")
        end = int((sequences.cached + np.array([len(row) for row in inputs])).max())
        if end > limits.max_length:
            raise ContextError(
                f"the context would be {end} tokens long, the engine was built for {limits.max_length}; "
                "shorten the prompt, or export with a larger --max-length"
            )
        vocabulary = self.manifest.config.text.vocab_size
        if invalid_tokens := [int(t) for tokens in inputs for t in tokens if not 0 <= t < vocabulary]:
            raise UserError(f"token {invalid_tokens[0]} is not one of the {vocabulary} of this model's vocabulary")
        embeds = self._embed_images(inputs, pixel_values, placement)
        ids = np.full((len(inputs), longest), _padding_token(self.manifest), np.int64)
        for row, new in enumerate(inputs):
            ids[row, : len(new)] = new
        positions = sequences.cached[:, None] + np.arange(longest, dtype=np.int64)[None]
        if int(positions.max()) >= limits.max_length:
            raise ContextError(
                f"padding this batch would reach beyond the {limits.max_length} tokens of the cache; "
                "feed sequences of such different lengths one at a time"
            )
        return self.runner.step(ids, embeds, positions, sequences.cached, sequences.cache)

    def _embed_images(
        self, prompts: Sequence[np.ndarray], pixel_values: np.ndarray | None, placement: Placement | None
    ) -> np.ndarray:
        """Returns one row for each image token of the prompts, or the dummy row; checks that tokens and images agree."""
        config, limits = self.manifest.config, self.manifest.limits
        images = 0 if pixel_values is None else len(pixel_values)
        if images and placement is None and config.tiles is not None:
            raise UserError("this model cuts pictures into tiles, and the placement of their features is missing; give it")
        tokens = sum(int((p == config.image_token_id).sum()) for p in prompts)
        rows = images * config.vision.tokens_per_image if placement is None else len(placement)
        if tokens != rows:
            raise UserError(
                f"the prompt has {tokens} image tokens, {images} {'images' if placement is None else 'tiles'} make {rows}; "
                "give one image for each <image>"
            )
        if images > limits.max_images and config.tiles is None:
            raise UserError(f"{images} images at once, the engine was built for {limits.max_images}")
        if pixel_values is None or not images:
            return self.runner.embed_images(np.zeros((0, 3, 1, 1), np.float32))
        return place_features(embed_tiles(self.runner, self.manifest, pixel_values), placement)


def embed_tiles(runner: Runner, manifest: Manifest, pixel_values: np.ndarray) -> np.ndarray:
    """Returns image embeddings [n * tokens, hidden] of any number of images or tiles, float32 [n, 3, R, R].

    In a model with tiles there is one more row, `image_newline`, at the end. The vision engine runs several times where n
    exceeds its `max_images`.
    """
    step = manifest.limits.max_images
    parts = [runner.embed_images(pixel_values[start : start + step]) for start in range(0, len(pixel_values), step)]
    if manifest.config.tiles is not None:
        parts = [*(part[:-1] for part in parts[:-1]), parts[-1]]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _padding_token(manifest: Manifest) -> int:
    """Returns a token id for padding that is not the image token."""
    return 0 if manifest.config.image_token_id != 0 else 1
