"""Runs a checkpoint in torch with a key/value cache: in float, or with fake quantization of a calibrated checkpoint.

`TorchRunner` stands in a session where an engine would. Its modules are those that calibration runs block by block
(`calibrate/blockwise/blocks.py`), here all in memory at once. Its cache is written as the graphs write theirs: the token at
position p lies in slot p.
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
    name_of_cache,
    run_vision_blocks,
)
from qvlm_export.calibrate.checkpoint.prefix import PrefixCache
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import fake_quantize_inputs
from qvlm_export.engines.config import ModelConfig

SLOT_STEP = 256  # caches grow by a multiple of it
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}

# Linear -> (scale, bits) of its input, for linears whose input is quantized.
Quantizers = Mapping[str, tuple[float, int]]


class SlotCache:
    """A key/value cache for the decoder layers of transformers, which need its method `update` only.

    Keys and values are [B, kv_heads, slots, head_dim] in every layer, with the batch size and dtype of the first pass.
    slots: int64 [B, S], where the tokens of the current pass are written. length: used slots of the longest sequence.
    """

    def __init__(self, layers: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        """layers: keys and values of the first slots, by layer; None for an empty cache."""
        self._layers = dict(layers or {})
        self.slots = torch.zeros((0, 0), dtype=torch.int64)
        self.length = self._layers[0][0].shape[2] if self._layers else 0

    def begin(self, slots: torch.Tensor) -> None:
        """Sets the slots int64 [B, S] that the next pass writes."""
        self.slots = slots
        self.length = max(self.length, int(slots.max()) + 1)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values [B, kv_heads, S, head_dim]; returns both for the first `length` slots of the layer."""
        old_buffers = self._layers.get(layer) or (keys[:, :, :0], values[:, :, :0])
        buffers = tuple(_grow_buffer(old, new, self.length) for old, new in zip(old_buffers, (keys, values), strict=True))
        index = self.slots[:, None, :, None].expand_as(keys)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.scatter_(2, index, new)
        self._layers[layer] = (buffers[0], buffers[1])
        return buffers[0][:, :, : self.length], buffers[1][:, :, : self.length]


def _grow_buffer(buffer: torch.Tensor, like: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the buffer with at least `length` slots; added slots are zero, of the dtype and sizes of `like`."""
    if buffer.shape[2] >= length:
        return buffer
    slots = -(-length // SLOT_STEP) * SLOT_STEP
    added = like.new_zeros((like.shape[0], like.shape[1], slots - buffer.shape[2], like.shape[3]))
    return torch.cat([buffer, added], dim=2)


class TorchRunner:
    """A `Runner` (see `engines/runtime/session.py`) in torch. All weights are in memory until `close`."""

    name = "torch"

    def __init__(
        self, blocks: ModelBlocks, source: TensorSource, config: ModelConfig, quantizers: Quantizers, device: str = "cpu"
    ) -> None:
        """Loads all weights to `device`, "cpu" (float32) or "cuda" (float16).

        quantizers: linears whose inputs are fake-quantized, with scale and bits; empty for the float model. Raises
        UserError for weights that are not finite.
        """
        self.device, self._dtype = device, DTYPES[device]
        self._blocks, self._source = blocks, source
        with ExitStack() as resources:
            for block in blocks.all():
                self._load_block(block, quantizers, resources)
            self._embedding = self._load_tensor(EMBEDDING)
            head_weight = self._load_tensor(HEAD) if HEAD in source else self._embedding
            self._head = LanguageHead(self._load_tensor(FINAL_NORM), head_weight, config.text.rms_norm_eps)
            self._newline = None if config.tiles is None else load_finite(source, NEWLINE)[None].numpy()
            self._resources = resources.pop_all()  # kept open; closed above if anything failed
        self._rotary = blocks.rotary.to(device)

    def _load_block(self, block: Block, quantizers: Quantizers, resources: ExitStack) -> None:
        module = resources.enter_context(load_block(block, self._source)).to(self.device, self._dtype)
        names = [name for name in block.linear_names() if name in quantizers]
        block_quantizers = {name.removeprefix(f"{block.prefix}."): quantizers[name] for name in names}
        resources.enter_context(fake_quantize_inputs(module, block_quantizers))

    def _load_tensor(self, name: str) -> torch.Tensor:
        return load_finite(self._source, name).to(self.device, self._dtype)

    def embed_images(self, pixel_values: np.ndarray) -> np.ndarray:
        """Returns the image features of float32 [n, 3, R, R] pixels: float32 [n * tokens, hidden].

        A model that cuts images into tiles gives `image_newline` as one more row. Without images there is one row of zeros.
        """
        if len(pixel_values) == 0:
            return np.zeros((1, self._embedding.shape[1]), np.float32)
        sample = Sample(np.zeros(0, np.int64), np.ascontiguousarray(pixel_values, np.float32), 0)

        def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
            with torch.inference_mode():
                return [run(block.module, x.to(self.device, self._dtype)) for x in inputs]

        (features,) = run_vision_blocks(self._blocks, self._source, [sample], step)
        rows = features.float().cpu().numpy()
        return rows if self._newline is None else np.concatenate([rows, self._newline])

    def new_cache(self, batch: int, prefix: PrefixCache | None = None) -> SlotCache:
        """Returns a cache, empty but for the prefix's keys and values in the first slots of each sequence."""
        if prefix is None:
            return SlotCache()
        arrays = [torch.from_numpy(array).to(self.device, self._dtype).repeat(batch, 1, 1, 1) for array in prefix.arrays()]
        return SlotCache(dict(enumerate(zip(arrays[::2], arrays[1::2], strict=True))))

    def step(
        self, ids: np.ndarray, embeds: np.ndarray, positions: np.ndarray, index: np.ndarray, cache: SlotCache
    ) -> np.ndarray:
        """Runs one forward pass, writes its keys and values into `cache`, and returns the logits float32 [B, S, vocab].

        ids, positions: int64 [B, S]. index: int64 [B], the slot of each row's first token. embeds: float32
        [n, hidden], first one row for each image token of the batch, in order.
        """
        tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)
        position_ids = torch.from_numpy(np.ascontiguousarray(positions)).to(self.device)
        slots = torch.from_numpy(index[:, None] + np.arange(ids.shape[1])).to(self.device)
        with torch.inference_mode():
            cache.begin(slots)
            x = self._embed(tokens, torch.from_numpy(embeds))
            rope = self._rotary(x, position_ids=position_ids)
            distance = position_ids[:, None, :, None] - torch.arange(cache.length, device=self.device)
            window = self._blocks.sliding_window or cache.length
            mask = (distance >= 0) & (distance < window)  # [B, 1, S, slots], True where a token attends to a slot
            for block in self._blocks.text_layers:
                named = {name_of_cache(block.module): cache}
                x = block.module(x, attention_mask=mask, position_ids=position_ids, position_embeddings=rope, **named)
            return self._head.logits(x).float().cpu().numpy()

    def _embed(self, tokens: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Returns token embeddings [B, S, hidden] with the rows of `embeds` in place of the image tokens, in order."""
        x = self._embedding[tokens]
        is_image = tokens == self._blocks.image_token_id
        count = int(is_image.sum())
        if count:
            x[is_image] = embeds[:count].to(self.device, self._dtype)
        return x

    def close(self) -> None:
        """Frees the weights."""
        self._resources.close()
        del self._embedding, self._head


def check_device(device: str) -> str:
    """Returns "cpu" or "cuda" for `--device`; "auto" prefers cuda. Raises UserError for a device that is not there."""
    if device not in ("auto", *DTYPES):
        raise UserError(f"--device {device}: unknown; choose auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return ("cuda" if has_gpu else "cpu") if device == "auto" else device
