"""Decoder and tower of the smol LLaVA: row order, layer scale, positions and pinned wheels."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tools.smol.parts import decoder, tower, wheels


def rotate_pairs(x, angles):
    """llama.cpp's rotary embedding of one head: rows 2 i and 2 i + 1 are rotated by the angle i."""
    out = np.empty_like(x)
    for i, angle in enumerate(angles):
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i], out[2 * i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out


def rotate_halves(x, angles):
    """transformers' rotary embedding of one head: rows i and i + head_dim / 2 are rotated by the angle i."""
    half = len(x) // 2
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)])


def test_unpermuted_rows_give_the_same_attention_scores_with_transformers_rotary_embedding():
    rng = np.random.default_rng(0)
    heads, size, width = 3, 8, 5
    query, key = (rng.standard_normal((heads * size, width)) for _ in range(2))
    x, y = rng.standard_normal(width), rng.standard_normal(width)
    at, other = rng.uniform(0, 3, size // 2), rng.uniform(0, 3, size // 2)
    ours_q, ours_k = decoder.unpermute(query, heads) @ x, decoder.unpermute(key, heads) @ y
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        expected = rotate_pairs((query @ x)[rows], at) @ rotate_pairs((key @ y)[rows], other)
        assert rotate_halves(ours_q[rows], at) @ rotate_halves(ours_k[rows], other) == pytest.approx(expected)


def test_names_of_llama_cpp_become_those_of_transformers():
    assert decoder.transformers_name("blk.7.ffn_down.weight") == "layers.7.mlp.down_proj.weight"
    assert decoder.transformers_name("token_embd.weight") == "embed_tokens.weight"
    with pytest.raises(KeyError):
        decoder.transformers_name("rope_freqs.weight")


def test_folded_layer_scale_scales_the_output_of_the_linear():
    torch.manual_seed(0)
    linear, scale, x = torch.nn.Linear(6, 4), torch.randn(4), torch.randn(3, 6)
    weight, bias = tower.fold_layer_scale(linear.weight, linear.bias, scale)
    assert torch.allclose(torch.nn.functional.linear(x, weight, bias), scale * linear(x), atol=1e-6)


def test_positions_keep_their_grid_and_are_interpolated_row_by_row():
    table = torch.arange(36.0)[:, None] + torch.tensor([0.0, 100.0])
    assert torch.allclose(tower.interpolate_positions(table, 6), table, atol=1e-4)
    smaller = tower.interpolate_positions(table, 3)
    assert smaller.shape == (9, 2)
    image = table[:, 0].reshape(6, 6)
    # Half a size: the centre of a new cell lies between two old ones, where bicubic weights are -3/32, 19/32, 19/32, -3/32.
    weights = torch.tensor([-3.0, 19.0, 19.0, -3.0]) / 32
    assert smaller[4, 0] == pytest.approx(float(weights @ image[1:5, 1:5] @ weights), abs=1e-3)


def test_nodes_before_an_output_are_bypassed_and_dropped():
    nodes = [
        helper.make_node("Concat", ["token", "patches"], ["all"], axis=0),
        helper.make_node("Relu", ["all"], ["wanted"]),
        helper.make_node("Neg", ["wanted"], ["unread"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("token", "patches", "wanted")]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:])
    tower.bypass(graph, graph.node[0])
    tower.drop_unread(graph)
    assert [(node.op_type, list(node.input)) for node in graph.node] == [("Relu", ["patches"])]
    assert isinstance(graph, onnx.GraphProto)


def test_a_wheel_with_another_sha256_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as archive:
        archive.writestr("a/text", "content")
    digest = hashlib.sha256((tmp_path / "a-1-py3-none-any.whl").read_bytes()).hexdigest()
    wheel = wheels.Wheel("a==1", "a-1-py3-none-any.whl", digest, "MIT")
    assert wheels.read(wheel, "a/text", tmp_path) == b"content"
    assert wheels.unpack(wheel, "a/text", tmp_path).read_text() == "content"
    with pytest.raises(SystemExit, match="its sha256 is"):
        wheels.fetch(replace(wheel, sha256="0" * 64), tmp_path)
