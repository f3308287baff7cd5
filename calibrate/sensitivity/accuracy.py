"""Accuracy of a calibrated checkpoint on a few samples: the float and the fake-quantized model run side by side.

Every block is loaded twice, in float and quantized, so the memory is that of one block. What comes out is how far the logits
are apart, and which blocks add most to the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qvlm_export.calibrate.blockwise.block_loader import CPU
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block
from qvlm_export.calibrate.blockwise.forward import (
    LanguageHead,
    Run,
    load_head,
    make_decoder_run,
    run_decoder_blocks,
    run_vision_blocks,
)
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantize_inputs
from qvlm_export.calibrate.quantization.tokens import mean_token_error

PLACES = 128  # tokens whose logits are in memory together


@dataclass(frozen=True)
class Accuracy:
    """How far a quantized model is from the float model.

    tokens: how many were compared: those of the answers, or in samples without one those behind the last image token. kl:
    mean KL divergence in nats, of the quantized model's distribution of the next token from the float model's. agreement:
    share of tokens at which both have the same first choice. block_errors: by canonical name, the mean error of each block's
    output, see `token_errors`; its input has the errors of the blocks before.
    """

    tokens: int
    kl: float
    agreement: float
    block_errors: dict[str, float]

    def worst_blocks(self, count: int) -> list[str]:
        """The blocks of the decoder, tower and projector that multiply the error most, the worst first."""
        names = list(self.block_errors)
        growth = {
            name: self.block_errors[name] - (self.block_errors[names[n - 1]] if n else 0.0) for n, name in enumerate(names)
        }
        return sorted(names, key=lambda name: -growth[name])[:count]


def measure_accuracy(
    blocks: ModelBlocks,
    source: TensorSource,
    calibrated: CalibratedCheckpoint,
    samples: Sequence[Sample],
    *,
    device: torch.device = CPU,
    progress: Callable[[float], None] = lambda _: None,
) -> Accuracy:
    """Compares the calibrated checkpoint with the float model of `source`.

    blocks: with the float model's prefix, if there is one; samples: behind it. progress: called with the share that is done.
    Raises UserError naming the tensor that holds NaN or infinity.
    """
    quantized_blocks, errors = _with_calibrated_prefix(blocks, calibrated), dict[str, float]()
    dequantized = DequantizedSource(calibrated)

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
        half, layer = len(inputs) // 2, blocks.layer_number(block)
        quantized_run = run if layer is None else make_decoder_run(quantized_blocks, layer)
        quantizers = {
            name.removeprefix(f"{block.prefix}."): quantizer
            for name in block.linear_names()
            if name in calibrated.schemes and (quantizer := calibrated.input_quantizer(name)) is not None
        }
        with load_block(block, source) as module, torch.inference_mode():
            exact = [run(module.to(device), x.to(device)).cpu() for x in inputs[:half]]
        with load_block(block, dequantized) as module, fake_quantize_inputs(module, quantizers), torch.inference_mode():
            rounded = [quantized_run(module.to(device), x.to(device)).cpu() for x in inputs[half:]]
        errors[block.prefix] = mean_token_error(rounded, exact)
        progress(len(errors) / blocks.num_blocks())
        return [*exact, *rounded]

    features = run_vision_blocks(blocks, source, [*samples, *samples], step)
    hidden = run_decoder_blocks(blocks, source, [*samples, *samples], features, step)
    head = load_head(source, blocks.final_epsilon)  # of both, as it is never quantized
    sums = []
    for sample, exact, rounded in zip(samples, hidden, hidden[len(samples) :], strict=False):
        places = _compared_places(sample, blocks.image_token_id)
        for start in range(places.start, places.stop, PLACES):
            part = slice(start, min(start + PLACES, places.stop))
            sums.append(_compare(head, exact[0][part], rounded[0][part]))
    tokens = sum(count for count, _, _ in sums)
    kl, same = (math.fsum(part[k] for part in sums) / max(tokens, 1) for k in (1, 2))
    return Accuracy(tokens, kl, same, errors)


def _with_calibrated_prefix(blocks: ModelBlocks, calibrated: CalibratedCheckpoint) -> ModelBlocks:
    """The blocks with the prefix of the calibrated checkpoint, whose values are divided as v_proj was equalized."""
    if blocks.prefix is None:
        return blocks
    heads, _, width = blocks.prefix.keys[0].shape
    return replace(blocks, prefix=calibrated.read_prefix((len(blocks.prefix.keys), heads, width)))


def _compared_places(sample: Sample, image_token_id: int) -> range:
    """The positions whose logits predict a token that is compared."""
    length = len(sample.input_ids)
    if sample.answer_start < length:
        return range(max(sample.answer_start - 1, 0), length - 1)
    images = torch.from_numpy(sample.input_ids == image_token_id).nonzero()
    return range(int(images.max()) if len(images) else 0, length)


def _compare(head: LanguageHead, exact: torch.Tensor, rounded: torch.Tensor) -> tuple[int, float, float]:
    """Number of tokens, sum of their KL divergences, and number of equal first choices. exact, rounded: [tokens, width]."""
    first, second = (head.logits(hidden).log_softmax(-1) for hidden in (exact, rounded))
    divergence = (first.exp() * (first - second)).sum(-1)
    same = first.argmax(-1) == second.argmax(-1)
    return len(exact), float(divergence.double().sum()), float(same.sum())
