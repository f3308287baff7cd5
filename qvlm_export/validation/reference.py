"""The float reference of a validation: transformers' own model, whole, with the weights of one module in memory at a time.

Nothing of this package's forward pass is used, so that a fault in it, or in how a configuration is read, is seen.
Every module that has parameters loads them from the checkpoint before it runs and releases them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import load_finite
from qvlm_export.calibrate.blockwise.float_model import make_float_model
from qvlm_export.calibrate.blockwise.forward import EMBEDDING, HEAD
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.quantization.activation_range import observe_magnitudes
from qvlm_export.checkpoints.checkpoint import Checkpoint
from qvlm_export.checkpoints.families import LAYOUTS, make_renamer
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.samples import Entry

BATCH_TOKENS = 8192  # tokens that run together; every batch reads all weights


@dataclass(frozen=True)
class ReferenceInput:
    """A sample, and the image inputs that transformers' model takes for it by name, as its processor makes them."""

    sample: Sample
    images: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ReferenceRun:
    """What transformers' model computed.

    logits: index of a sample -> float32 [S, vocab]. blocks: output of every block on the traced sample, float32
    [tokens, width]. largest: the largest magnitudes, as from `observe_magnitudes`.
    """

    logits: Callable[[int], np.ndarray]
    blocks: Mapping[str, np.ndarray]
    largest: Mapping[str, float]


def reference_inputs(processor: Any, entries: Sequence[Entry], samples: Sequence[Sample]) -> list[ReferenceInput]:
    """Returns the inputs of transformers' model. entries, samples: the same questions, as read and as encoded.

    Images that are cut into tiles are encoded again, because transformers wants them as its processor pads them.
    """
    inputs = []
    for entry, sample in zip(entries, samples, strict=True):
        images: dict[str, torch.Tensor] = {}
        if len(sample.pixel_values) and sample.placement is None:
            images = {"pixel_values": torch.from_numpy(sample.pixel_values)}
        elif len(sample.pixel_values) and entry.image is not None:
            picture = open_image(entry.image, entry.where)
            images = dict(processor.image_processor(images=[picture], return_tensors="pt"))
        inputs.append(ReferenceInput(sample, images))
    return inputs


def run_reference(
    checkpoint: Checkpoint, inputs: Sequence[ReferenceInput], traced: int, progress: Callable[[float], None]
) -> ReferenceRun:
    """Runs transformers' model in float32 on all samples. traced: the index of the sample whose block outputs are kept."""
    model = make_float_model(checkpoint.hf_config).float()
    _fill_buffers(model, checkpoint)
    hidden: dict[int, torch.Tensor] = {}
    blocks: dict[str, np.ndarray] = {}
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(_load_when_called(model, checkpoint.source))
        largest = stack.enter_context(observe_magnitudes(model.model))
        batches = list(_make_batches(inputs, traced))
        for done, batch in enumerate(batches):
            with _record_blocks(model, blocks if batch == [traced] else None):
                outputs = model.model(**_join([inputs[number] for number in batch], checkpoint), use_cache=False)
            for row, number in enumerate(batch):
                hidden[number] = outputs.last_hidden_state[row, : len(inputs[number].sample.input_ids)].clone()
            progress((done + 1) / len(batches))
    head = load_finite(checkpoint.source, HEAD if HEAD in checkpoint.source else EMBEDDING)
    return ReferenceRun(lambda number: (hidden[number] @ head.T).numpy(), blocks, dict(largest))


def _make_batches(inputs: Sequence[ReferenceInput], traced: int) -> Iterator[list[int]]:
    """Yields the numbers of the samples that run together: the traced one alone, the others by length."""
    yield [traced]
    others = sorted((n for n in range(len(inputs)) if n != traced), key=lambda n: len(inputs[n].sample.input_ids))
    batch: list[int] = []
    for number in others:
        if batch and (len(batch) + 1) * len(inputs[number].sample.input_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _join(inputs: Sequence[ReferenceInput], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Returns the arguments of the model for a batch. Shorter texts are padded at their end, where attention is causal."""
    longest, image_token = max(len(one.sample.input_ids) for one in inputs), checkpoint.config.image_token_id
    padding = 0 if image_token else 1
    ids = [np.pad(one.sample.input_ids, (0, longest - len(one.sample.input_ids)), constant_values=padding) for one in inputs]
    names = dict.fromkeys(name for one in inputs for name in one.images)
    parts = {name: [one.images[name] for one in inputs if name in one.images] for name in names}
    return {"input_ids": torch.from_numpy(np.stack(ids)), **{name: _concatenate(tensors) for name, tensors in parts.items()}}


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Joins along the first axis; where images have different numbers of tiles, the second axis is padded with zeros."""
    if tensors[0].ndim < 5:
        return torch.cat(list(tensors))
    most = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, most - t.shape[1])) for t in tensors])


def _fill_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives the buffers, which no checkpoint holds, their content: rotary frequencies and position ids."""
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.rotary_emb = type(module)(config=checkpoint.hf_config.text_config)
        elif "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(module.get_buffer("position_ids").shape[-1])[None]


@contextmanager
def _load_when_called(model: nn.Module, source: TensorSource) -> Iterator[None]:
    """While the context is open, every module loads its own parameters when it is called, and releases them afterwards.

    Parameters that the source lacks are zero: those of layers behind the last feature, which some checkpoints leave out.
    """
    rename, handles = make_renamer(LAYOUTS[-1]), []

    def make_hooks(prefix: str, deep: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def load(module: nn.Module, *_: Any) -> None:
            state = {}
            for name, parameter in module.named_parameters(recurse=deep):
                stored = str(rename(f"{prefix}.{name}"))
                state[name] = load_finite(source, stored) if stored in source else torch.zeros(parameter.shape)
            module.load_state_dict(state, strict=False, assign=True)

        def release(module: nn.Module, *_: Any) -> None:
            for name, parameter in list(module.named_parameters(recurse=deep)):
                owner = module.get_submodule(name.rpartition(".")[0])
                owner.register_parameter(name.rpartition(".")[2], nn.Parameter(parameter.to("meta"), requires_grad=False))

        return load, release

    for name, module in model.named_modules():
        deep = isinstance(module, nn.MultiheadAttention)  # which multiplies by its parts' weights without calling them
        if next(module.parameters(recurse=deep), None) is not None:
            load, release = make_hooks(name, deep)
            handles += [module.register_forward_pre_hook(load), module.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_blocks(model: nn.Module, blocks: dict[str, np.ndarray] | None) -> Iterator[None]:
    """Keeps the outputs of projector, tower layers and decoder layers by canonical name in `blocks`, unless it is None."""
    rename, handles = make_renamer(LAYOUTS[-1]), []

    def make_hook(block: str, kept: dict[str, np.ndarray]) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            kept[block] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).numpy()

        return hook

    for name, module in model.named_modules() if blocks is not None else ():
        parent, _, last = name.rpartition(".")
        if blocks is not None and ((parent.endswith("layers") and last.isdecimal()) or last == "multi_modal_projector"):
            handles.append(module.register_forward_hook(make_hook(str(rename(name)), blocks)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
