"""The first calibrator: absolute maxima over the samples, round to nearest. torch.

Blocks stream through memory one at a time; each is read once, run on all samples, quantized, written to its own shard
of the calibrated checkpoint and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibrate.blocks import Block, ModelBlocks, load_finite, resident
from calibrate.calibrated import CalibratedWriter, QuantizedLinear
from calibrate.errors import UserError
from calibrate.quantize import quantize_linear
from calibrate.samples import Sample
from calibrate.scheme import LinearScheme
from calibrate.tensors import TensorSource

IMAGES_AT_ONCE = 8

# (blocks done, blocks in all, name of the block)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What to calibrate: the model's blocks, its tensors, the scheme of each planned linear, the samples."""

    blocks: ModelBlocks
    source: TensorSource
    plan: Mapping[str, LinearScheme]
    samples: Sequence[Sample]


def calibrate_absmax(job: Calibration, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    stepper = _Stepper(job, writer, progress)
    features = stepper.vision_features()
    stepper.language(features)
    stepper.leftovers()
    return {"method": "absmax", "samples": len(job.samples), "tokens": sum(len(s.input_ids) for s in job.samples)}


class _Stepper:
    """Walks the blocks in order and counts them."""

    def __init__(self, job: Calibration, writer: CalibratedWriter, progress: Progress) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._done = 0
        self._written: set[str] = set()

    def vision_features(self) -> list[torch.Tensor]:
        """Runs tower and projector over all pictures: one [n * tokens, hidden] a sample."""
        job, blocks = self._job, self._job.blocks
        pixels = [torch.from_numpy(s.pixel_values) for s in job.samples]
        shown = [p for p in pixels if len(p)]
        batches = list(torch.cat(shown).split(IMAGES_AT_ONCE)) if shown else []
        for entry in (blocks.patch_embeddings, blocks.pre_norm):
            with resident(entry, job.source) as module, torch.inference_mode():
                batches = [module(batch) for batch in batches]
        for block in blocks.vision_layers:
            batches = self._step(block, batches, lambda module, x: module(x, attention_mask=None))
        if not blocks.keep_class_token:
            batches = [batch[:, 1:] for batch in batches]
        batches = self._step(blocks.projector, batches, lambda module, x: module(x))
        per_image = torch.cat(batches) if batches else torch.zeros(0, 1, 1)
        return [chosen.flatten(0, 1) for chosen in per_image.split([len(p) for p in pixels])]

    def language(self, features: list[torch.Tensor]) -> None:
        """Runs the decoder layers over all samples."""
        job = self._job
        table = load_finite(job.source, "language_model.model.embed_tokens.weight")
        hidden = [self._embed(table, sample, image) for sample, image in zip(job.samples, features, strict=True)]
        del table

        def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[1])[None]
            rope = job.blocks.rotary(x, position_ids=positions)
            out: torch.Tensor = module(x, attention_mask=None, position_ids=positions, position_embeddings=rope)
            return out

        for block in job.blocks.text_layers:
            hidden = self._step(block, hidden, run)

    def _embed(self, table: torch.Tensor, sample: Sample, image: torch.Tensor) -> torch.Tensor:
        ids = torch.from_numpy(sample.input_ids)
        embeds = table[ids]
        is_image = ids == self._job.blocks.image_token_id
        if int(is_image.sum()) != len(image):
            raise UserError(
                f"a calibration sample has {int(is_image.sum())} image tokens for {len(image)} image features; "
                "does the processor belong to this model?"
            )
        embeds[is_image] = image
        return embeds[None]

    def _step(
        self, block: Block, inputs: list[torch.Tensor], run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """Runs one block on all inputs, quantizes it from what it saw, and returns its float outputs."""
        job = self._job
        with resident(block, job.source) as module, torch.inference_mode():
            with _input_amax(module) as amax:
                outputs = [run(module, x) for x in inputs]
            for number, output in enumerate(outputs):
                if not torch.isfinite(output).all():
                    raise UserError(f"{block.prefix}: activations of batch {number} are not finite; check the samples")
            linears = {
                f"{block.prefix}.{name}": _quantize(f"{block.prefix}.{name}", layer, job.plan, amax.get(name))
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear) and f"{block.prefix}.{name}" in job.plan
            }
        self._write(block.prefix, linears, [n for n in block.tensor_names() if n.removesuffix(".weight") not in linears])
        self._done += 1
        self._progress(self._done, job.blocks.count(), block.prefix)
        return outputs

    def _write(self, block: str, linears: dict[str, QuantizedLinear], float_names: list[str]) -> None:
        self._writer.write_shard(block, linears, {name: self._job.source.load(name) for name in float_names})
        self._written |= {*float_names, *(f"{name}.weight" for name in linears)}

    def leftovers(self) -> None:
        """Copies what no block holds (embeddings, norms, lm_head, unused vision layers), a shard a tensor."""
        for name in self._job.source:
            if name not in self._written:
                load_finite(self._job.source, name)
                self._write(name, {}, [name])


def _quantize(name: str, layer: nn.Linear, plan: Mapping[str, LinearScheme], amax: float | None) -> QuantizedLinear:
    scheme = plan[name]
    if scheme.activation_bits is not None and amax is None:
        raise UserError(f"{name}: no calibration sample reached it, so its activation range is unknown; add samples")
    return quantize_linear(layer.weight, scheme, amax)


@contextmanager
def _input_amax(module: nn.Module) -> Iterator[dict[str, float]]:
    """Collects max |input| of every linear inside `module` while the context is open."""
    amax: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), float(args[0].abs().max()))

        return hook

    linears = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears]
    try:
        yield amax
    finally:
        for handle in handles:
            handle.remove()
