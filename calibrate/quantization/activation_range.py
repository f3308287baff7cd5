"""Activation ranges against float16: the largest magnitude at every residual and product, and the refusal of an overflow.

A model trained in bfloat16 may have activations beyond 65504. In a float16 engine they are infinite and the answers NaN,
while torch and ONNX Runtime, which compute in float32 on a CPU, show nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.block_loader import CPU, open_block_loader
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block
from qvlm_export.calibrate.blockwise.forward import Run, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16, MAX_FLOAT16
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError

RANGE_SAMPLES = 2  # from the calibration set; the largest activations are at the first tokens of every sequence
MASSIVE, MASSIVE_RATIO = 100.0, 300.0
MEDIAN_VALUES = 4096  # of each output, from which the median is taken
OUTPUT = "output"  # of a block, which is the residual stream


def _largest(tensor: object) -> float:
    """The largest magnitude of a tensor, NaN if any value is; 0 for what is no tensor, or an empty one."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return 0.0
    low, high = (float(bound) for bound in tensor.detach().aminmax())
    return max(abs(low), abs(high))


def _nan_last(magnitude: float) -> float:
    """A key by which NaN is larger than any number."""
    return math.inf if math.isnan(magnitude) else magnitude


@contextmanager
def observe_magnitudes(module: nn.Module) -> Iterator[dict[str, float]]:
    """Collects the largest magnitudes inside `module` while the context is open.

    Keys are "name.input" and "name.output" of every linear and norm inside, and OUTPUT for the module's own output. So the
    residual stream, every product and everything between them is seen.
    """
    largest: dict[str, float] = {}
    last_input: tuple[object, float] = (None, 0.0)  # several linears read the same tensor, one after the other

    def see(key: str, magnitude: float) -> None:
        largest[key] = max(largest.get(key, 0.0), magnitude, key=_nan_last)

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal last_input
            if name:
                if args[0] is not last_input[0]:
                    last_input = (args[0], _largest(args[0]))
                see(f"{name}.input", last_input[1])
            see(f"{name}.{OUTPUT}" if name else OUTPUT, _largest(output))

        return hook

    parts = [(n, m) for n, m in module.named_modules() if not n or isinstance(m, nn.Linear) or "norm" in n]
    handles = [part.register_forward_hook(make_hook(name)) for name, part in parts]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def find_massive(outputs: Sequence[torch.Tensor]) -> dict[str, float | int] | None:
    """The largest activation of a block's outputs, where it is massive; None where it is not, or without outputs.

    outputs: float32 [n, tokens, width] of each input. An activation is massive when it is above MASSIVE and MASSIVE_RATIO
    times the median magnitude (Sun et al. 2024, arXiv 2402.17762, section 2, with a lower ratio). The result names the
    number of the input, the position of the token, the channel, the magnitude, and that by the median.
    """
    magnitude, number, index = 0.0, 0, 0
    for n, output in enumerate(outputs):
        largest = float(output.abs().max()) if output.numel() else 0.0
        if largest > magnitude:
            magnitude, number, index = largest, n, int(output.abs().argmax())
    if magnitude <= MASSIVE:
        return None
    median = float(torch.cat([x.flatten()[:: max(1, x.numel() // MEDIAN_VALUES)] for x in outputs]).abs().median())
    if magnitude <= MASSIVE_RATIO * median:
        return None
    tokens, width = outputs[number].shape[-2:]
    place = {"input": number, "position": index // width % tokens, "channel": index % width}
    return {**place, "magnitude": magnitude, "times_median": magnitude / max(median, 1e-30)}


def check_range(prefix: str, largest: Mapping[str, float], float_type: str) -> None:
    """Raises UserError, naming the place, where a magnitude is beyond the range of a float16 graph.

    prefix: canonical name of the block. largest: as from `observe_magnitudes`. float_type: of the graph.
    """
    for name, magnitude in largest.items():
        if not math.isfinite(magnitude):
            raise UserError(
                f"{prefix}.{name}: activations are not finite in float32, so no engine answers; check the weights"
            )
        if float_type == FLOAT16 and magnitude > MAX_FLOAT16:
            raise UserError(
                f"{prefix}.{name}: activations reach {magnitude:.3g}, beyond float16's {MAX_FLOAT16:.0f}, so a float16 "
                "engine would answer NaN; add --dtype bfloat16"
            )


def measure_ranges(
    blocks: ModelBlocks,
    source: TensorSource,
    samples: Sequence[Sample],
    *,
    epsilon: float,
    float_type: str = FLOAT16,
    device: torch.device = CPU,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Runs the float model on a few samples; returns the largest magnitudes by block and place, logits under "logits".

    epsilon: of the decoder's last norm. Raises UserError at the first block that leaves the range of `float_type`.
    """
    ranges: dict[str, dict[str, float]] = {}
    total = blocks.num_blocks()

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
        with load(block) as module, torch.inference_mode(), observe_magnitudes(module) as largest:
            outputs = [run(module, x.to(device)).cpu() for x in inputs]
        check_range(block.prefix, largest, float_type)
        ranges[block.prefix] = largest
        progress(len(ranges) / total)
        return outputs

    with torch.inference_mode():
        _check_entries(blocks, source, samples, float_type)
        with open_block_loader(blocks, source, device) as load:
            features = run_vision_blocks(blocks, source, samples, step)
            hidden = run_decoder_blocks(blocks, source, samples, features, step)
        head = load_head(source, epsilon)
        logits = max(float(head.logits(x[0]).abs().max()) for x in hidden)
    ranges["logits"] = {OUTPUT: logits}
    check_range("language_model.lm_head", ranges["logits"], float_type)
    return ranges


def _check_entries(blocks: ModelBlocks, source: TensorSource, samples: Sequence[Sample], float_type: str) -> None:
    """Checks what comes before the first layer of the tower."""
    batches = [torch.from_numpy(sample.pixel_values) for sample in samples if len(sample.pixel_values)]
    for entry in blocks.entries:
        with load_block(entry, source) as module:
            batches = [module(batch) for batch in batches]
        check_range(entry.prefix, {OUTPUT: max((float(b.abs().max()) for b in batches), default=0.0)}, float_type)
