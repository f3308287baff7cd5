"""The checkpoint in torch as a session's runner: float, or with the linears of a calibrated checkpoint simulated.

The modules are those that calibration runs block by block (`calibrate/blockwise/blocks.py`), all in memory at once, with a
cache that
is written as the graphs write theirs: the token at position p lies in slot p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block, load_finite
from qvlm_export.calibrate.blockwise.forward import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NEWLINE,
    LanguageHead,
    Run,
    run_vision_blocks,
)
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import fake_quantize_inputs
from qvlm_export.engines.config import ModelConfig

SLOTS_AT_ONCE = 256  # by which a cache grows
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}

# Linear -> scale and bits of its input, for those whose input is quantized.
Quantizers = Mapping[str, tuple[float, int]]


class SlotCache:
    """Keys and values by layer, [B, kv_heads, slots, head_dim], made of what the first pass brings.

    What a decoder layer of transformers asks of a cache is `update`. slots: int64 [B, S], where the pass's tokens go.
    """

    def __init__(self) -> None:
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.slots = torch.zeros((0, 0), dtype=torch.int64)
        self.length = 0  # of the longest sequence

    def begin(self, slots: torch.Tensor) -> None:
        """Where the next pass writes."""
        self.slots = slots
        self.length = max(self.length, int(slots.max()) + 1)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, kv_heads, S, head_dim] into the slots; returns all slots that any sequence has used."""
        stored = self._stored.get(layer) or (keys[:, :, :0], values[:, :, :0])
        grown = tuple(_grown(old, new, self.length) for old, new in zip(stored, (keys, values), strict=True))
        where = self.slots[:, None, :, None].expand_as(keys)
        for held, new in zip(grown, (keys, values), strict=True):
            held.scatter_(2, where, new)
        self._stored[layer] = (grown[0], grown[1])
        return grown[0][:, :, : self.length], grown[1][:, :, : self.length]


def _grown(held: torch.Tensor, like: torch.Tensor, length: int) -> torch.Tensor:
    """The buffer with room for `length` slots; new ones are zero."""
    if held.shape[2] >= length:
        return held
    slots = -(-length // SLOTS_AT_ONCE) * SLOTS_AT_ONCE
    room = like.new_zeros((like.shape[0], like.shape[1], slots - held.shape[2], like.shape[3]))
    return torch.cat([held, room], dim=2)


class TorchRunner:
    """See `qvlm_export.engines.runtime.session.Runner`. Weights are in memory until `close`."""

    name = "torch"

    def __init__(
        self, blocks: ModelBlocks, source: TensorSource, config: ModelConfig, quantizers: Quantizers, device: str = "cpu"
    ) -> None:
        """Raises UserError for weights that are not finite."""
        self.device, self._dtype = device, DTYPES[device]
        self._blocks, self._source = blocks, source
        self._held = ExitStack()
        try:
            for block in blocks.all():
                self._hold(block, quantizers)
            self._table = self._tensor(EMBEDDING)
            weight = self._tensor(HEAD) if HEAD in source else self._table
            self._head = LanguageHead(self._tensor(FINAL_NORM), weight, config.text.rms_norm_eps)
            self._newline = None if config.tiles is None else load_finite(source, NEWLINE)[None].numpy()
        except BaseException:
            self._held.close()
            raise
        self._rotary = blocks.rotary.to(device)

    def _hold(self, block: Block, quantizers: Quantizers) -> None:
        module = self._held.enter_context(load_block(block, self._source)).to(self.device, self._dtype)
        names = [name for name in block.linear_names() if name in quantizers]
        inside = {name.removeprefix(f"{block.prefix}."): quantizers[name] for name in names}
        self._held.enter_context(fake_quantize_inputs(module, inside))

    def _tensor(self, name: str) -> torch.Tensor:
        return load_finite(self._source, name).to(self.device, self._dtype)

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """float32 [n, 3, R, R] -> float32 [n * tokens, hidden] and, with tiles, the row of `image_newline`.

        One dummy row for no image.
        """
        if len(pixel_values) == 0:
            return np.zeros((1, self._table.shape[1]), np.float32)
        sample = Sample(np.zeros(0, np.int64), np.ascontiguousarray(pixel_values, np.float32), 0)

        def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
            with torch.inference_mode():
                return [run(block.module, x.to(self.device, self._dtype)) for x in inputs]

        (features,) = run_vision_blocks(self._blocks, self._source, [sample], step)
        rows = features.float().cpu().numpy()
        return rows if self._newline is None else np.concatenate([rows, self._newline])

    def new_cache(self, batch: int) -> SlotCache:  # noqa: ARG002
        """An empty cache; the first pass says how many sequences there are."""
        return SlotCache()

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: SlotCache
    ) -> np.ndarray:
        """One pass, writing into `cache`. ids, positions: int64 [B, S]; index: int64 [B] -> logits float32 [B, S, vocab]."""
        tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)
        places = torch.from_numpy(np.ascontiguousarray(positions)).to(self.device)
        slots = torch.from_numpy(index[:, None] + np.arange(ids.shape[1])).to(self.device)
        with torch.inference_mode():
            cache.begin(slots)
            x = self._embedded(tokens, torch.from_numpy(embeds))
            rope = self._rotary(x, position_ids=places)
            age = places[:, None, :, None] - torch.arange(cache.length, device=self.device)
            window = self._blocks.sliding_window or cache.length
            seen = (age >= 0) & (age < window)  # [B, 1, S, slots]
            for block in self._blocks.text_layers:
                x = block.module(
                    x, attention_mask=seen, position_ids=places, past_key_values=cache, position_embeddings=rope
                )
            return self._head.logits(x).float().cpu().numpy()

    def _embedded(self, tokens: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Token embeddings with the image rows in the places of the image tokens, in order. [B, S] -> [B, S, hidden]."""
        x = self._table[tokens]
        is_image = tokens == self._blocks.image_token_id
        count = int(is_image.sum())
        if count:
            x[is_image] = embeds[:count].to(self.device, self._dtype)
        return x

    def close(self) -> None:
        """Gives the memory of the weights back."""
        self._held.close()
        del self._table, self._head


def check_device(device: str) -> str:
    """cpu or cuda for `--device`, with auto for what is here. Raises UserError where there is no such device."""
    if device not in ("auto", *DTYPES):
        raise UserError(f"--device {device}: unknown; choose auto, cpu or cuda")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return ("cuda" if there else "cpu") if device == "auto" else device
