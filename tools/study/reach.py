"""Study of activation ranges: how far unseen prompts exceed the largest magnitudes on the calibration set.

    python -m tools.study.reach --out docs/reach.md

It records the largest magnitude of every input channel of the decoder layers' down_proj in the float tiny LLaVA, on the
benchmark's 64 samples, on the prompts that the augmentation of `--effort full` makes of them, and on 1,000 unseen questions.
It also measures which share of the KL divergence of quantized models is due to questions with a word that occurs in none of
the samples.
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
from tools.bench.ours import calibrate_and_run, load_model, reference_logits, schemes_of

FAR = 2.0  # times the largest magnitude on the calibration set
HEAD = """# How far activations exceed their calibrated range

`python -m tools.study.reach --out docs/reach.md` runs the float tiny model. For every channel of the inputs of
`down_proj` in the decoder layers it divides the largest magnitude on 1,000 unseen questions by the largest on the
calibration prompts. Entries: how many of the {channels} channels of all layers have a ratio above {far:g}, and the
largest ratio. "Own questions" are the prompts of `fast`. The last column has those of `full`.
"""
MANY = 10_000  # questions, of which few have a new word
NEW_WORDS = """
## Words that no sample has

Of 10,000 unseen questions: how many have a word that is in none of the samples, and their share of the KL divergence of a
model quantized to W4A16. In brackets is the whole KL divergence, in nats a token. Rounding puts its errors into
directions in which the samples have no energy, and such a word may have energy there. `fast` has no random words, so the
last column is a variant of it.

| samples of seed | questions | KL of `fast` | KL of `fast` with {random_words} texts with random words a sample |
|---|---|---|---|
"""


def peaks(
    source: TensorSource, blocks: ModelBlocks, texts: Sequence[Sample], features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Largest magnitude of each input channel of down_proj, float32 [layers, channels].

    features: image features of each text's sample.
    """
    layer_peaks: list[torch.Tensor] = []

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batch_peaks: list[torch.Tensor] = []

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            batch_peaks.append(args[0].abs().flatten(0, -2).amax(0))

        batches = batch_by_length(inputs)
        with load_block(block, source) as module, torch.inference_mode():
            handle = module.get_submodule("mlp.down_proj").register_forward_pre_hook(hook)
            outputs = batches.split([run(module, x) for x in batches.iter_merged(inputs)])
            handle.remove()
        layer_peaks.append(torch.stack(batch_peaks).amax(0))
        return outputs

    run_decoder_blocks(blocks, source, texts, features, step)
    return torch.stack(layer_peaks)


def calibration_peaks(source: TensorSource, blocks: ModelBlocks, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Peaks by set of prompts, each float32 [layers, channels].

    The sets are the samples, the samples with cross-paired questions, and these with random words in addition, as `full`
    makes them.
    """
    features = features_of(source, blocks, samples)
    sets = {"own questions": (list(samples), list(range(len(samples))))}
    sets["and cross-paired questions"] = flatten_prompts(
        cross_pair_prompts(samples, FULL.questions_per_image, blocks.image_token_id)
    )
    word_weights = embedding_norm_weights(load_finite(source, EMBEDDING).numpy())
    random_texts = replace_words(samples, FULL.random_word_prompts, word_weights, blocks.image_token_id, FULL.seed)
    texts, numbers = sets["and cross-paired questions"]
    sets["and random words"] = (
        [*texts, *(text for text, _ in random_texts)],
        [*numbers, *(number for _, number in random_texts)],
    )
    return {
        name: peaks(source, blocks, texts, [features[number] for number in numbers])
        for name, (texts, numbers) in sets.items()
    }


def features_of(source: TensorSource, blocks: ModelBlocks, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Output of the projector for the images of each sample."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batches = batch_by_length(inputs)
        with load_block(block, source) as module, torch.inference_mode():
            return batches.split([run(module, x) for x in batches.iter_merged(inputs)])

    return run_vision_blocks(blocks, source, samples, step)


def new_words(model: Path, data: Path) -> list[str]:
    """Lines of the table NEW_WORDS, one for each seed of the calibration set."""
    make_data(model, data, MANY)
    checkpoint, blocks = load_model(model)
    unseen = load_samples(evaluation_file(data, MANY))
    reference, lines = reference_logits(model, unseen), []
    question_of_token = np.repeat(np.arange(len(unseen)), [last - first for first, last in answer_spans(unseen)])
    for seed in SEEDS:
        samples = load_samples(calibration_file(data, seed))
        known = np.unique(np.concatenate([sample.input_ids for sample in samples]))
        new = np.array([not np.isin(question.input_ids, known).all() for question in unseen])
        job, entries = CalibrationJob(blocks, checkpoint.source, schemes_of(checkpoint, blocks, "W4A16"), samples), []
        for config in (FAST, replace(FAST, random_word_prompts=FULL.random_word_prompts)):
            logits, _, _ = calibrate_and_run(job, checkpoint, functools.partial(calibrate_search, config=config), unseen)
            divergence = kl_divergence(reference, logits)
            entries.append(f"{divergence[new[question_of_token]].sum() / divergence.sum():.0%} ({divergence.mean():.1e})")
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
    checkpoint, blocks = load_model(args.model)
    source, unseen = checkpoint.source, load_samples(evaluation_file(args.data))
    unseen_peaks = peaks(source, blocks, unseen, features_of(source, blocks, unseen))
    lines = []
    for seed in SEEDS:
        calibrated = calibration_peaks(source, blocks, load_samples(calibration_file(args.data, seed)))
        if not lines:
            lines = [f"| samples of seed | {' | '.join(calibrated)} |", "|---" * (len(calibrated) + 1) + "|"]
        ratios = [(unseen_peaks / known.clamp(min=1e-6)) for known in calibrated.values()]
        entries = [f"{int((ratio > FAR).sum())}, at most {float(ratio.max()):.1f} times" for ratio in ratios]
        lines.append(f"| {seed} | {' | '.join(entries)} |")
        print(lines[-1], flush=True)
    head = HEAD.format(channels=f"{unseen_peaks.numel():,}", far=FAR)
    more = NEW_WORDS.format(random_words=FULL.random_word_prompts) + "\n".join(new_words(args.model, args.data))
    args.out.write_text(head + "\n" + "\n".join(lines) + "\n" + more + "\n")


if __name__ == "__main__":
    main()
