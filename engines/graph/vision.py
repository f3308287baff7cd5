"""The vision graph: CLIP or SigLIP tower, feature selection and projector, pixel_values -> image_embeds.

The structure is that of CLIP (Radford et al. 2021) as LLaVA uses it (Liu et al. 2023, section 4.1): the hidden state of a
layer before the last, without the class token, goes through a two-layer projector. SigLIP (Zhai et al. 2023) is built of the
same layers, without class token and first norm.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from qvlm_export.engines.config import ModelConfig, VisionConfig
from qvlm_export.engines.graph.layers import ACTIVATIONS, LayerNorm, Linear, attention_scale, merge_heads, split_heads


class ClipEmbeddings(nn.Module):
    """Patch, class token and position embeddings: pixel_values [N, 3, R, R] -> [N, (1 +) patches, hidden]."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._config = config
        hidden, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter([hidden], dtype) if config.class_token else None
        self.patch_embedding = PatchConv(hidden, patch, config.patch_bias, dtype)
        self.position_embedding = Table(config.num_patches + int(config.class_token), hidden, dtype)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        hidden = self._config.hidden_size
        patches = op.Reshape(self.patch_embedding(op, pixels), [0, hidden, -1])
        patches = op.Transpose(patches, perm=[0, 2, 1])
        if self.class_embedding is None:
            return self.position_embedding(op, patches)
        images = op.Shape(pixels, start=0, end=1)
        token = op.Expand(op.Reshape(self.class_embedding, [1, 1, hidden]), op.Concat(images, [1, hidden], axis=0))
        return self.position_embedding(op, op.Concat(token, patches, axis=1))


class PatchConv(nn.Module):
    """Patch embedding by a convolution whose stride equals its kernel: [N, 3, R, R] -> [N, hidden, R / patch, R / patch]."""

    def __init__(self, hidden: int, patch: int, bias: bool, dtype: ir.DataType) -> None:
        super().__init__()
        self._patch = patch
        self.weight = nn.Parameter([hidden, 3, patch, patch], dtype)
        self.bias = nn.Parameter([hidden], dtype) if bias else None

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        inputs = [pixels, self.weight] if self.bias is None else [pixels, self.weight, self.bias]
        return op.Conv(*inputs, strides=[self._patch] * 2, kernel_shape=[self._patch] * 2)


class Table(nn.Module):
    """Learned position embedding: adds a table [rows, width] to x [N, rows, width]."""

    def __init__(self, rows: int, width: int, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = nn.Parameter([rows, width], dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return op.Add(x, self.weight)


class ClipAttention(nn.Module):
    """Full self-attention within an image: x [N, tokens, hidden] -> [N, tokens, hidden]."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        hidden = config.hidden_size
        self._heads, self._hidden = config.num_heads, hidden
        self.k_proj = Linear(hidden, hidden, True, dtype)
        self.v_proj = Linear(hidden, hidden, True, dtype)
        self.q_proj = Linear(hidden, hidden, True, dtype)
        self.out_proj = Linear(hidden, hidden, True, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        head_dim = self._hidden // self._heads
        q, k, v = (split_heads(op, proj(op, x), self._heads, head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = op.Attention(q, k, v, scale=attention_scale(head_dim))
        return self.out_proj(op, merge_heads(op, attended, self._hidden))


class ClipMLP(nn.Module):
    """Two linears with an activation between them: x [N, tokens, hidden] -> [N, tokens, hidden]."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._act = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, True, dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, True, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        return self.fc2(op, self._act(op, self.fc1(op, x)))


class ClipLayer(nn.Module):
    """Attention and MLP, each behind a layer norm and with a residual: x [N, tokens, hidden] -> [N, tokens, hidden]."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config, dtype)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.mlp = ClipMLP(config, dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x)))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class ClipEncoder(nn.Module):
    """The layers of the tower: x [N, tokens, hidden] -> the output [N, tokens, hidden] of each feature layer, in order."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._features = config.feature_layers
        self.layers = nn.ModuleList([ClipLayer(config, dtype) for _ in range(config.num_layers)])

    def forward(self, op: OpBuilder, x: ir.Value) -> list[ir.Value]:
        hidden_states = [x]
        for layer in self.layers:
            hidden_states.append(layer(op, hidden_states[-1]))
        return [hidden_states[number] for number in self._features]


class ClipVisionModel(nn.Module):
    """The tower: pixel_values [N, 3, R, R] -> features [N, tokens, feature size], feature layers joined along the width."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._drop_class_token = config.class_token and not config.keep_class_token
        self.embeddings = ClipEmbeddings(config, dtype)
        # The misspelling is that of the checkpoints.
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype) if config.pre_norm else None
        self.encoder = ClipEncoder(config, dtype)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        x = self.embeddings(op, pixels)
        features = self.encoder(op, x if self.pre_layrnorm is None else self.pre_layrnorm(op, x))
        joined = features[0] if len(features) == 1 else op.Concat(*features, axis=-1)
        return op.Slice(joined, [1], [2**31 - 1], [1]) if self._drop_class_token else joined


class VisionTower(nn.Module):
    """Wrapper that gives the parameters their prefix `vision_model.`; shapes as in ClipVisionModel."""

    def __init__(self, config: VisionConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self.vision_model = ClipVisionModel(config, dtype)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        return self.vision_model(op, pixels)


class Projector(nn.Module):
    """The projector into the decoder's space: features [N, tokens, feature size] -> [N, tokens, text hidden]."""

    def __init__(self, config: ModelConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._act = ACTIVATIONS[config.projector.hidden_act]
        in_features, width, bias = config.vision.feature_size, config.text.hidden_size, config.projector.bias
        epsilon = config.projector.norm_eps
        self.projector_layernorm = None if epsilon is None else LayerNorm(in_features, epsilon, dtype)
        self.linear_1 = Linear(in_features, width, bias, dtype)
        self.linear_2 = Linear(width, width, bias, dtype) if config.projector.num_linears == 2 else None

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        x = self.linear_1(op, x if self.projector_layernorm is None else self.projector_layernorm(op, x))
        return x if self.linear_2 is None else self.linear_2(op, self._act(op, x))


class VisionGraph(nn.Module):
    """Root module: pixel_values [N, 3, R, R] -> image_embeds [N * tokens, text hidden].

    In a model with tiles, one more row at the end holds the `image_newline` vector.
    """

    def __init__(self, config: ModelConfig, dtype: ir.DataType) -> None:
        super().__init__()
        self._width = config.text.hidden_size
        self.vision_tower = VisionTower(config.vision, dtype)
        self.multi_modal_projector = Projector(config, dtype)
        self.image_newline = None if config.tiles is None else nn.Parameter([self._width], dtype)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        features = self.multi_modal_projector(op, self.vision_tower(op, pixels))
        rows = op.Reshape(features, [-1, self._width])
        if self.image_newline is None:
            return rows
        return op.Concat(rows, op.Reshape(self.image_newline, [1, self._width]), axis=0)
