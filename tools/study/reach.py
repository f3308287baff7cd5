"""How far activations go beyond what calibration saw, and what prompts made of the same samples show of that.

    python -m tools.study.reach --out docs/reach.md

The float tiny LLaVA on the benchmark's 64 samples, on what `--effort full` makes of them, and on 1,000 unseen questions: of
every channel that a decoder layer's down_proj reads, the largest magnitude. And which share of the KL divergence of
quantized models is at questions with a word that none of the samples has.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts
from qvlm_export.calibrate.augmentation.random_words import embedding_norm_weights, replace_words
from qvlm_export.calibrate.blockwise.batching import batch_by_length
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block, load_finite
from qvlm_export.calibrate.blockwise.forward import EMBEDDING, Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.quantization.config import FAST, FULL
from qvlm_export.engines.check.metrics import kl_divergence
from tools.bench.data import SEEDS, answer_spans, calibration_file, evaluation_file, load_samples, make_data
from tools.bench.ours import judged, opened, plan_of, reference_logits

FAR = 2.0  # times the largest value that calibration saw
HEAD = """# How far activations go beyond what calibration saw

`python -m tools.study.reach --out docs/reach.md`: the float tiny model. Of every channel that `down_proj` of a decoder layer
reads, the largest magnitude on 1,000 unseen questions over the largest on the prompts of calibration: how many of the
{channels} channels of all layers go beyond {far:g} times that, and the largest ratio. "Own questions" is what `fast` runs,
"scrambled, too" what `full` does, without its mixtures of pictures.
"""
MANY = 10_000  # questions, of which few have a new word
NEW_WORDS = """
## Words that no sample has

Of 10,000 unseen questions: how many have a word that is in none of the samples, and of the KL divergence of a model
quantized to W4A16 the share that is theirs; in brackets all KL, in nats a token. Rounding puts its errors into directions in
which the samples have no energy, and there such a word may have some. `fast` has no scrambled texts, so the last column is
a variant of it.

| samples of seed | questions | KL of `fast` | KL of `fast` with {scrambled} scrambled texts a sample |
|---|---|---|---|
"""


def peaks(
    source: TensorSource, blocks: ModelBlocks, texts: Sequence[Sample], features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Largest magnitude of each channel that down_proj reads, float32 [layers, channels]."""
    found: list[torch.Tensor] = []

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        largest: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            largest.append(args[0].abs().flatten(0, -2).amax(0))

        batches = batch_by_length(inputs)
        with load_block(block, source) as module, torch.inference_mode():
            handle = module.get_submodule("mlp.down_proj").register_forward_pre_hook(hook)
            outputs = batches.split([run(module, x) for x in batches.iter_merged(inputs)])
            handle.remove()
        found.append(torch.stack(largest).amax(0))
        return outputs

    run_decoder_blocks(blocks, source, texts, features, step)
    return torch.stack(found)


def seen_by(source: TensorSource, blocks: ModelBlocks, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Peaks on the samples, on recombined prompts, and on scrambled ones besides, as `full` makes them."""
    features = features_of(source, blocks, samples)
    sets = {"own questions": (list(samples), list(range(len(samples))))}
    sets["others' questions, too"] = flatten_prompts(cross_pair_prompts(samples, FULL.questions, blocks.image_token_id))
    odds = embedding_norm_weights(load_finite(source, EMBEDDING).numpy())
    more = replace_words(samples, FULL.random_word_prompts, odds, blocks.image_token_id, FULL.seed)
    texts, numbers = sets["others' questions, too"]
    sets["scrambled, too"] = [*texts, *(text for text, _ in more)], [*numbers, *(number for _, number in more)]
    return {
        name: peaks(source, blocks, texts, [features[number] for number in numbers])
        for name, (texts, numbers) in sets.items()
    }


def features_of(source: TensorSource, blocks: ModelBlocks, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """What the projector makes of each sample's pictures."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batches = batch_by_length(inputs)
        with load_block(block, source) as module, torch.inference_mode():
            return batches.split([run(module, x) for x in batches.iter_merged(inputs)])

    return run_vision_blocks(blocks, source, samples, step)


def new_words(model: Path, data: Path) -> list[str]:
    """Lines of a table, one for each seed."""
    make_data(model, data, MANY)
    checkpoint, blocks = opened(model)
    unseen = load_samples(evaluation_file(data, MANY))
    reference, lines = reference_logits(model, unseen), []
    owner = np.repeat(np.arange(len(unseen)), [last - first for first, last in answer_spans(unseen)])
    for seed in SEEDS:
        samples = load_samples(calibration_file(data, seed))
        known = np.unique(np.concatenate([sample.input_ids for sample in samples]))
        new = np.array([not np.isin(question.input_ids, known).all() for question in unseen])
        job, entries = CalibrationJob(blocks, checkpoint.source, plan_of(checkpoint, blocks, "W4A16"), samples), []
        for method in (FAST, replace(FAST, random_word_prompts=FULL.random_word_prompts)):
            logits, _, _ = judged(job, checkpoint, functools.partial(calibrate_search, method=method), unseen)
            divergence = kl_divergence(reference, logits)
            entries.append(f"{divergence[new[owner]].sum() / divergence.sum():.0%} ({divergence.mean():.1e})")
        lines.append(f"| {seed} | {new.sum()} | {' | '.join(entries)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    make_data(args.model, args.data)
    checkpoint, blocks = opened(args.model)
    source, unseen = checkpoint.source, load_samples(evaluation_file(args.data))
    reached = peaks(source, blocks, unseen, features_of(source, blocks, unseen))
    lines = []
    for seed in SEEDS:
        seen = seen_by(source, blocks, load_samples(calibration_file(args.data, seed)))
        if not lines:
            lines = [f"| samples of seed | {' | '.join(seen)} |", "|---" * (len(seen) + 1) + "|"]
        ratios = [(reached / known.clamp(min=1e-6)) for known in seen.values()]
        entries = [f"{int((ratio > FAR).sum())}, at most {float(ratio.max()):.1f} times" for ratio in ratios]
        lines.append(f"| {seed} | {' | '.join(entries)} |")
        print(lines[-1], flush=True)
    head = HEAD.format(channels=f"{reached.numel():,}", far=FAR)
    more = NEW_WORDS.format(scrambled=FULL.random_word_prompts) + "\n".join(new_words(args.model, args.data))
    args.out.write_text(head + "\n" + "\n".join(lines) + "\n" + more + "\n")


if __name__ == "__main__":
    main()
