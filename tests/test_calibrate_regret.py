"""Look-ahead regrets against the same quantized in the module itself, pair by pair and range by range."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_module import quantized_output
from small_export import mixed_samples

from calibrate.blocks import make_blocks, resident
from calibrate.entropy import lookahead_regret
from calibrate.job import Calibration
from calibrate.joint import PAPER_CLIPS, Layer, linear_outputs, relative_error
from calibrate.layers import Clips, planned_layer
from calibrate.printed import measure_inputs
from calibrate.regret import look_ahead, measure_regrets, pair_errors
from calibrate.scheme import LinearScheme
from calibrate.walk import plain_step, walk_language, walk_vision
from qvlm_export.checkpoint import open_checkpoint

TINY = Path(__file__).parent.parent / "qvlm_export" / "tiny"
LAST = "language_model.model.layers.1"


def reached(job, prefix):
    """The block of this name, what the float model gives it, and how it is run."""
    found, plain = {}, plain_step(job.source)

    def step(block, inputs, run):
        found[block.prefix] = block, inputs, run
        return plain(block, inputs, run)

    walk_language(job.blocks, job.source, job.samples, walk_vision(job.blocks, job.source, job.samples, step), step)
    return found[prefix]


def slow_regrets(module, layers, inputs, run, kind):
    """For each two consecutive layers, the whole module anew for every range."""

    def error(*chosen):
        """Of the last of these layers' output; what is not among them is float."""
        quantized, clips = zip(*chosen, strict=True)
        names = list(quantized[-1].linears)
        _, wanted = linear_outputs(module, names, run, inputs)
        return relative_error(
            quantized_output(module, inputs, run, layers=quantized, chosen=clips, last=names),
            wanted,
        )

    options, regrets = [replace(Clips(), **{kind: clip}) for clip in PAPER_CLIPS], []
    for first, second in itertools.pairwise(layers):
        kept = min(options, key=lambda c, layer=second: error((layer, c)))
        own = [error((first, c)) for c in options]
        regrets.append(lookahead_regret(own, [error((first, c), (second, kept)) for c in options]))
    return regrets


@pytest.mark.parametrize("kind", ["activation", "weight"])
def test_regrets_are_those_of_the_module_quantized_in_place(llava, kind):
    # No range of random weights is worth clipping, so there is nothing to regret; some of those of trained ones are.
    checkpoint = open_checkpoint(str(llava(dtype="float32") if kind == "activation" else TINY))
    scheme = LinearScheme(4, 4 if kind == "activation" else None, 64)
    blocks = make_blocks(checkpoint.hf_config)
    plan = {name: scheme for name in blocks.quantizable() if name.startswith((LAST, "multi_modal"))}
    job = Calibration(blocks, checkpoint.source, plan, mixed_samples(checkpoint))
    inputs, _ = measure_inputs(job)
    found = measure_regrets(job, inputs)

    wanted = []
    for prefix in ("multi_modal_projector", LAST):
        block, given, run = reached(job, prefix)
        with resident(block, job.source) as module, torch.inference_mode():
            layers = [planned_layer(module, x, job.plan_of(block)) for x in inputs if x.block == prefix]
            wanted.append(slow_regrets(module, layers, given, run, kind))
    projector, decoder = wanted
    assert found.pairs == pytest.approx([*projector, 0, *decoder], rel=1e-3, abs=1e-6)
    assert max(found.pairs) > 0.001
    # 3 samples with pictures through tower and projector, 4 through the decoder, and the layers of two blocks on their own.
    runs = 3 * (len(blocks.vision_layers) + 1) + 4 * len(blocks.text_layers)
    assert found.forwards == runs + 3 * (5 + 10) / 2 + 4 * (5 + 30) / 4


def test_a_layer_alone_in_its_module_has_nothing_to_measure(llava):
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    plan = {f"language_model.model.layers.{k}.mlp.down_proj": LinearScheme(4, 4, 64) for k in (0, 1)}
    text = [sample for sample in mixed_samples(checkpoint) if not len(sample.pixel_values)]
    job = Calibration(make_blocks(checkpoint.hf_config), checkpoint.source, plan, text)
    found = measure_regrets(job, measure_inputs(job)[0])
    assert (found.pairs, found.forwards) == ([0.0], 2)
    assert measure_regrets(replace(job, plan={}), []).pairs == []


def chain(*tables):
    """Layers that add a number to what the one before made; an error is the distance from what is wanted."""
    layers = [Layer(lambda before: before[-1] if before else 0.0, lambda x, c: x + c, table) for table in tables]
    return layers, [lambda output, wanted=wanted: abs(output - wanted) for wanted in (1.0, 3.0, 3.5)[: len(tables)]]


def test_looking_ahead_by_hand():
    layers, errors = chain([0.0, 0.5, 2.0], [1.0, 2.5], [0.0, 1.0])
    exact = (1.0, 3.0, 3.5)  # of a float model that adds 1, 2 and 0.5
    own, ahead = look_ahead(layers, errors, exact)
    assert own == [[1.0, 0.5, 1.0], [1.0, 0.5], [0.5, 0.5]]
    # The second layer adds 2.5, its best, to 0, 0.5 or 2; the third one, with the first of two that are as good, nothing.
    assert ahead == [[0.5, 0.0, 1.5], [1.5, 0.0]]
    assert pair_errors(layers[:2], 0, errors[:2]) == ([1.0, 0.5, 1.0], [2.0, 1.5, 0.0])
