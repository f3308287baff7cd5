"""The language graph: a decoder of the Llama kind with a static key/value cache and image embeddings among its tokens.

The token at position p of a sequence is stored in cache slot p. The mask is therefore one comparison, and sequences of
unequal length need no padding mask: a query attends to the slots up to its own position, and every slot is written before a
query reaches it.
Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), ONNX operators TensorScatter-24 and Attention-23.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from qvlm_export.engines.config import ModelConfig, TextConfig
from qvlm_export.engines.graph.layers import (
    ACTIVATIONS,
    MASKED_SCORE,
    Linear,
    RMSNorm,
    attention_scale,
    merge_heads,
    split_heads,
)


class Embedding(nn.Module):
    """Embedding table: input_ids int64 [B, S] -> [B, S, hidden]."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([config.vocab_size, config.hidden_size], dtype)

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        return op.Gather(self.weight, ids, axis=0)


class Rope:
    """Rotary position embedding: tables cos and sin [max_length, D/2], shared by all layers."""

    def __init__(self, op: OpBuilder, config: TextConfig, max_length: int, dtype: ir.DataType) -> None:
        frequencies = np.array(config.rope_frequencies, np.float32)
        angle, scale = np.arange(max_length, dtype=np.float32)[:, None] * frequencies[None, :], np.float32(config.rope_scale)
        cos, sin = ((function(angle) * scale).astype(dtype.numpy()) for function in (np.cos, np.sin))
        self.cos = op.builder.initializer(ir.tensor(cos), "rope.cos", qualify=False)
        self.sin = op.builder.initializer(ir.tensor(sin), "rope.sin", qualify=False)


@dataclass(frozen=True)
class Inputs:
    """Inputs of one forward pass. ids, positions: int64 [B, S]; index: int64 [B]; image_embeds: [n, hidden]."""

    ids: ir.Value
    image_embeds: ir.Value
    positions: ir.Value
    index: ir.Value


@dataclass(frozen=True)
class Context:
    """Values that all layers share.

    positions: int64 [B, S], of the new tokens. index: int64 [B], the cache slot of each sequence's first new token. mask:
    [B, 1, S, L], added to the attention scores. rope: rotary tables.
    """

    positions: ir.Value
    index: ir.Value
    mask: ir.Value
    rope: Rope


class Cache:
    """The key/value cache of one layer while the graph is declared. key, value: [B, K, L, D], after the write."""

    def __init__(self, past_key: ir.Value, past_value: ir.Value) -> None:
        self.past_key, self.past_value = past_key, past_value
        self.key: ir.Value = past_key
        self.value: ir.Value = past_value

    def write(self, op: OpBuilder, key: ir.Value, value: ir.Value, index: ir.Value) -> None:
        """Declares the writing of key and value [B, K, S, D] into slots index[b] to index[b] + S - 1 of sequence b."""
        self.key = op.TensorScatter(self.past_key, key, index, axis=-2, mode="linear")
        self.value = op.TensorScatter(self.past_value, value, index, axis=-2, mode="linear")


class LlamaAttention(nn.Module):
    """Grouped-query attention over the cache: x [B, S, hidden] -> [B, S, hidden]; writes the new tokens into the cache."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._config = config
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, width, config.attention_bias, dtype)
        self.k_proj = Linear(hidden, kv_width, config.attention_bias, dtype)
        self.v_proj = Linear(hidden, kv_width, config.attention_bias, dtype)
        self.o_proj = Linear(width, hidden, config.output_bias, dtype)

    def forward(self, op: OpBuilder, x: ir.Value, context: Context, cache: Cache) -> ir.Value:
        c = self._config
        query = split_heads(op, self.q_proj(op, x), c.num_heads, c.head_dim)
        key = split_heads(op, self.k_proj(op, x), c.num_kv_heads, c.head_dim)
        value = split_heads(op, self.v_proj(op, x), c.num_kv_heads, c.head_dim)
        query = op.RotaryEmbedding(query, context.rope.cos, context.rope.sin, context.positions)
        key = op.RotaryEmbedding(key, context.rope.cos, context.rope.sin, context.positions)
        cache.write(op, key, value, context.index)
        attended = op.Attention(query, cache.key, cache.value, context.mask, scale=attention_scale(c.head_dim))
        return self.o_proj(op, merge_heads(op, attended, c.num_heads * c.head_dim))


class LlamaMLP(nn.Module):
    """Gated MLP, down(act(gate(x)) * up(x)): x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._act = ACTIVATIONS[config.hidden_act]
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, config.mlp_bias, dtype)
        self.up_proj = Linear(hidden, inner, config.mlp_bias, dtype)
        self.down_proj = Linear(inner, hidden, config.mlp_bias, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.down_proj(op, op.Mul(self._act(op, self.gate_proj(op, x)), self.up_proj(op, x)))


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind an RMS norm and with a residual: x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: TextConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, dtype)
        self.mlp = LlamaMLP(config, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, op: OpBuilder, x: ir.Value, context: Context, cache: Cache) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.input_layernorm(op, x), context, cache))
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x)))


class LlamaModel(nn.Module):
    """The decoder without its head: inputs -> hidden states [B, S, hidden] after the last norm; writes all caches."""

    def __init__(self, config: ModelConfig, max_length: int, dtype: ir.DataType) -> None:
        super().__init__()
        self._config, self._max_length, self._dtype = config, max_length, dtype
        self.embed_tokens = Embedding(config.text, dtype)
        self.layers = nn.ModuleList([LlamaLayer(config.text, dtype) for _ in range(config.text.num_layers)])
        self.norm = RMSNorm(config.text.hidden_size, config.text.rms_norm_eps, dtype)

    def forward(self, op: OpBuilder, inputs: Inputs, caches: list[Cache]) -> ir.Value:
        embeds = self.embed_tokens(op, inputs.ids)
        x = place_images(op, inputs.ids, embeds, inputs.image_embeds, self._config.image_token_id)
        mask = causal_mask(op, inputs.positions, self._max_length, self._config.text.sliding_window, self._dtype)
        rope = Rope(op, self._config.text, self._max_length, self._dtype)
        context = Context(inputs.positions, inputs.index, mask, rope)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(op, x, context, cache)
        return self.norm(op, x)


class LanguageModel(nn.Module):
    """Decoder and output head: inputs -> logits float32 [B, S, vocab]."""

    def __init__(self, config: ModelConfig, max_length: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.model = LlamaModel(config, max_length, dtype)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, False, dtype)

    def forward(self, op: OpBuilder, inputs: Inputs, caches: list[Cache]) -> ir.Value:
        hidden = self.model(op, inputs, caches)
        return op.Cast(self.lm_head(op, hidden), to=ir.DataType.FLOAT)


class LanguageGraph(nn.Module):
    """Root module, which makes the parameter names begin with `language_model.`, as in the checkpoint."""

    def __init__(self, config: ModelConfig, max_length: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.language_model = LanguageModel(config, max_length, dtype)

    def forward(self, op: OpBuilder, inputs: Inputs, caches: list[Cache]) -> ir.Value:
        return self.language_model(op, inputs, caches)


def place_images(op: OpBuilder, ids: ir.Value, embeds: ir.Value, image_embeds: ir.Value, image_token_id: int) -> ir.Value:
    """Returns embeds [B, S, hidden] with row k of image_embeds [n, hidden] at the k-th image token of the flattened batch.

    Gather and Where are used so that no shape depends on data. An index beyond the last row is clamped to it, and a prompt
    without image tokens uses no row, so that one dummy row is enough for text.
    """
    is_image = op.Equal(ids, op.Constant(value_int=image_token_id))
    is_image_flat = op.Reshape(op.Cast(is_image, to=ir.DataType.INT64), [-1])
    image_index = op.Sub(op.CumSum(is_image_flat, op.Constant(value_int=0)), op.Constant(value_int=1))
    last_row = op.Sub(op.Shape(image_embeds, start=0, end=1), op.Constant(value_ints=[1]))
    row_index = op.Min(op.Max(image_index, op.Constant(value_ints=[0])), last_row)
    rows = op.Gather(image_embeds, op.Reshape(row_index, op.Shape(ids)), axis=0)
    return op.Where(op.Unsqueeze(is_image, [-1]), rows, embeds)


def causal_mask(op: OpBuilder, positions: ir.Value, max_length: int, window: int | None, dtype: ir.DataType) -> ir.Value:
    """Returns the additive mask [B, 1, S, L] of queries at positions int64 [B, S].

    It is 0 where position - window < slot <= position, and MASKED_SCORE elsewhere. window: None for no sliding window.
    """
    slots = op.Constant(value=ir.tensor(np.arange(max_length, dtype=np.int64).reshape(1, 1, 1, -1)))
    query_positions = op.Unsqueeze(positions, [1, 3])
    is_masked = op.Greater(slots, query_positions)
    if window is not None and window < max_length:
        too_old = op.LessOrEqual(slots, op.Sub(query_positions, op.Constant(value=ir.tensor(np.array(window, np.int64)))))
        is_masked = op.Or(is_masked, too_old)
    zero, masked_score = (op.Constant(value=ir.tensor(np.array(v, dtype.numpy()))) for v in (0.0, MASKED_SCORE))
    return op.Where(is_masked, masked_score, zero)
