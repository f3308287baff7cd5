"""Building blocks of the float graphs: onnxscript modules whose parameters have the names of the checkpoint's tensors.

Only ONNX operators that TensorRT fuses natively are used (opset 24); no plugin, no contrib op. Shapes: B batch, S new
tokens, L cache length, H heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from qvlm_export.engines.config import Activation

# Mask value, added to the scores of keys that a query must not attend to. It lies far below any score, and far enough from
# float16's -65504 that the sum cannot overflow.
MASKED_SCORE = -30000.0


def _quick_gelu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(op.Mul(x, op.CastLike(1.702, x))))


def _silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(x))


def _gelu(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Gelu(x)


def _gelu_tanh(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Gelu(x, approximate="tanh")


def _linear(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Identity(x)


ACTIVATIONS: dict[Activation, Callable[[OpBuilder, ir.Value], ir.Value]] = {
    "quick_gelu": _quick_gelu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": _silu,
    "linear": _linear,
}


class Linear(nn.Module):
    """x [.., in] -> [.., out]. The weight is declared [out, in] as in the checkpoint; the passes of qdq.py transpose it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([out_features, in_features], dtype)
        self.bias = nn.Parameter([out_features], dtype) if bias else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        y = op.MatMul(x, op.Transpose(self.weight, perm=[1, 0]))
        return y if self.bias is None else op.Add(y, self.bias)


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, any shape."""

    def __init__(self, size: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self.bias = nn.Parameter([size], dtype)
        self._epsilon = epsilon

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self._epsilon)


class RMSNorm(nn.Module):
    """RMS normalization over the last axis, any shape."""

    def __init__(self, size: int, epsilon: float, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([size], dtype)
        self._epsilon = epsilon

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self._epsilon)


def split_heads(op: OpBuilder, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Splits the last axis into heads: [B, S, H*D] -> [B, H, S, D]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def merge_heads(op: OpBuilder, x: ir.Value, width: int) -> ir.Value:
    """Concatenates the heads: [B, H, S, D] -> [B, S, H*D]. width: H*D."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, width])


def attention_scale(head_dim: int) -> float:
    """Returns the factor 1 / sqrt(head_dim) of the attention scores."""
    return 1.0 / math.sqrt(head_dim)
