"""What tokens count, against gradients through the whole model at once."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_export import mixed_samples, open_small, plan_of

from qvlm_export.calibrate.augmentation.cross_questions import recombine
from qvlm_export.calibrate.augmentation.prompts import flat, labels_of
from qvlm_export.calibrate.blockwise.blocks import linear_of, make_blocks, resident
from qvlm_export.calibrate.blockwise.forward import walk_language, walk_vision
from qvlm_export.calibrate.blockwise.job import Calibration
from qvlm_export.calibrate.blockwise.resume import Work, holds_work
from qvlm_export.calibrate.blockwise.shared_inputs import groups_of
from qvlm_export.calibrate.blockwise.token_kinds import token_labels
from qvlm_export.calibrate.calibrators.block_search import relative_error
from qvlm_export.calibrate.calibrators.cost import measured_bytes
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import TWO_SIDED, Method, Objective
from qvlm_export.calibrate.rounding import output_hessian
from qvlm_export.calibrate.rounding.quantize_linears import Rows
from qvlm_export.calibrate.sensitivity import block_backward as way_back
from qvlm_export.calibrate.sensitivity import measure as influence
from qvlm_export.calibrate.sensitivity import tape as trail
from qvlm_export.calibrate.sensitivity.block_backward import FLOOR, Influence, Weights
from qvlm_export.calibrate.sensitivity.measure import measure_influence
from qvlm_export.calibrate.sensitivity.tape import Trail, Visit


@pytest.fixture
def job(llava) -> Calibration:
    checkpoint = open_small(llava(dtype="float32"))
    samples = [replace(sample, answer_start=len(sample.input_ids) - 4) for sample in mixed_samples(checkpoint)]
    return Calibration(make_blocks(checkpoint.hf_config), checkpoint.source, plan_of(checkpoint, "int4"), samples)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large model: what a block computed on the way there is computed again on the way back."""
    monkeypatch.setattr(trail, "WHOLE_BYTES", 0)


def alone(job: Calibration) -> list[list[Sample]]:
    """Every sample with its own question only."""
    return [[sample] for sample in job.samples]


def measured(job: Calibration, objective: Objective, seed: int = 0) -> Weights:
    return measure_influence(job, alone(job), Method(objective=objective, seed=seed)).tokens


def all_at_once(job: Calibration) -> dict[str, list[torch.Tensor]]:
    """Squared gradients summed over every logit of the answers on its own, all blocks in memory."""
    found: dict[str, list[torch.Tensor]] = {}
    blocks = (*job.blocks.vision_layers, job.blocks.projector, *job.blocks.text_layers)
    with ExitStack() as held:
        modules = {b.prefix: held.enter_context(resident(b, job.source)) for b in blocks}
        kept: dict[tuple[str, str], list[torch.Tensor]] = {}
        for prefix, module in modules.items():
            for group in groups_of(module):
                for name in group.linears:

                    def keep(_m, _i, out, key=(f"{prefix}.{group.linears[0]}", name)):
                        out = out if out.requires_grad else out.requires_grad_()
                        kept.setdefault(key, []).append(out)
                        return out

                    held.callback(linear_of(module, name).register_forward_hook(keep).remove)
        for sample in job.samples:
            kept.clear()

            def step(block, inputs, run):
                return [run(modules[block.prefix], x.clone()) for x in inputs]

            with torch.enable_grad():
                features = walk_vision(job.blocks, job.source, [sample], step)
                hidden = walk_language(job.blocks, job.source, [sample], features, step)
                gain, head = (torch.from_numpy(job.source.load(n).copy()) for n in (influence.FINAL_NORM, influence.HEAD))
                normed = torch.nn.functional.rms_norm(hidden[0][0], gain.shape, gain, job.blocks.final_epsilon)
                # As many directions as the hidden states have, whose squares sum up to those of all logits.
                directions = torch.linalg.cholesky((head.T @ head).double()).float()
                answer = (normed @ directions)[sample.answer_start - 1 : len(sample.input_ids) - 1]
                outs = [(key, out) for key, parts in kept.items() for out in parts]
                sums: dict[str, torch.Tensor] = {}
                for logit in answer.flatten():
                    grads = torch.autograd.grad(logit, [o for _, o in outs], retain_graph=True, materialize_grads=True)
                    for ((name, _), _), gradient in zip(outs, grads, strict=True):
                        square = gradient.square().sum(-1)
                        sums[name] = sums.get(name, torch.zeros_like(square)) + square
            for name, square in sums.items():
                found.setdefault(name, []).append(square)
    return found


def test_probes_estimate_the_gradients_of_all_logits(job: Calibration) -> None:
    """The mean over many probes is the sum over logits, of which the reference takes one at a time."""
    sample = job.samples[0]
    job = replace(job, samples=[replace(sample, input_ids=sample.input_ids[: sample.answer_start + 1])])
    wanted = all_at_once(job)
    probes = [measured(job, "logits", seed) for seed in range(32)]
    for name, exact in wanted.items():
        mean = torch.stack([torch.cat([w.flatten() for w in probe[name]]) for probe in probes]).mean(0) * (1 + FLOOR) - FLOOR
        flat = torch.cat([w.flatten() for w in exact])
        assert torch.corrcoef(torch.stack([mean, flat / flat.mean()]))[0, 1] > 0.9, name


def test_the_last_block_only_counts_at_answers(job: Calibration) -> None:
    found = measured(job, "logits")
    last = job.blocks.text_layers[-1].prefix
    least = FLOOR / (1 + FLOOR)
    for weights, sample in zip(found[f"{last}.mlp.down_proj"], job.samples, strict=True):
        assert weights[0, : sample.answer_start - 1].numpy() == pytest.approx(least, rel=1e-5)
        assert (weights[0, sample.answer_start - 1 : len(sample.input_ids) - 1] > 1.5 * least).all()
    keys = torch.cat(
        [w[0, : s.answer_start - 1] for w, s in zip(found[f"{last}.self_attn.q_proj"], job.samples, strict=True)]
    )
    assert float(keys.max()) > 2 * least  # keys and values of the question are looked at


@pytest.mark.parametrize("objective", ["logits", "kl", "kl+logits", "modality"])
def test_weights_have_mean_1_and_a_floor(job: Calibration, objective) -> None:
    for name, weights in measured(job, objective).items():
        flat = torch.cat([w.flatten() for w in weights])
        assert float(flat.mean()) == pytest.approx(1.0, rel=1e-4), name
        assert float(flat.min()) >= FLOOR / (1 + FLOOR) * 0.999


def test_modality_gives_tokens_of_a_kind_one_weight(job: Calibration) -> None:
    found, plain = (measured(job, objective) for objective in ("modality", "logits"))
    block = job.blocks.text_layers[0]
    name, labels = f"{block.prefix}.mlp.down_proj", labels_of(block, job.blocks, alone(job))
    kinds = torch.cat([token_labels(s, job.blocks.image_token_id) for s in job.samples])
    assert torch.equal(kinds, torch.cat(labels))
    given, single = (torch.cat([w.flatten() for w in part[name]]) for part in (found, plain))
    for kind in kinds.unique():
        assert given[kinds == kind].std() < 1e-5
        assert float(given[kinds == kind].mean()) == pytest.approx(float(single[kinds == kind].mean()), rel=1e-4)


def test_samples_in_parts_give_weights_of_the_same_kind(job: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the signs that are drawn differ: without them nothing does."""
    ones = torch.ones

    def no_signs(_low, _high, shape, generator):  # noqa: ARG001
        return ones(shape)

    monkeypatch.setattr(influence.torch, "randint", no_signs)
    whole = measured(job, "logits")
    monkeypatch.setattr(influence, "PART_VALUES", 1)
    parts = measured(job, "logits")
    assert whole.keys() == parts.keys()
    for name, weights in whole.items():
        for one, other in zip(weights, parts[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_a_picture_counts_for_all_questions_about_it(job: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the decoder as if every prompt were a sample; in the tower the gradients of a picture's prompts add up."""
    monkeypatch.setattr(influence.torch, "randint", lambda _low, _high, shape, generator: torch.ones(shape))  # noqa: ARG005
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values) == 1])
    prompts = recombine(job.samples, 2, job.blocks.image_token_id)
    texts = flat(prompts)[0]
    assert len(texts) == 2 * len(job.samples)
    together = measure_influence(job, prompts, Method(objective="logits")).tokens
    apart = measured(replace(job, samples=texts), "logits")
    for name, weights in together.items():
        assert len(weights) == (len(texts) if name.startswith("language_model") else len(job.samples)), name
        if name.startswith("language_model"):
            for one, other in zip(weights, apart[name], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_rows_that_count_nothing_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    seen, wanted = torch.randn(2, 40, 8, generator=generator)
    weights = torch.ones(40)
    weights[25:] = 0
    some, few = Rows(wanted, seen, weights), Rows(wanted[:25], seen[:25])
    torch.testing.assert_close(some.counted(seen).T @ seen, few.counted(seen[:25]).T @ seen[:25])
    for out in (3, 20):  # fewer and more than inputs: the products are made in another order
        weight = torch.randn(out, 8, generator=generator)
        torch.testing.assert_close(some.pulled(some.counted(seen), weight), few.pulled(seen[:25], weight))
        torch.testing.assert_close(few.pulled(seen[:25], weight), weight @ wanted[:25].T @ seen[:25])
    error = relative_error([seen[None]], [wanted[None]], [weights[None]])
    assert error == pytest.approx(relative_error([seen[None, :25]], [wanted[None, :25]]), rel=1e-6)


class Counted:
    """A source that counts how often each tensor is read."""

    def __init__(self, job: Calibration) -> None:
        self._source, self.loads = job.source, Counter[str]()

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def load(self, name: str) -> np.ndarray:
        self.loads[name] += 1
        return self._source.load(name)

    def blocks(self, job: Calibration) -> int:
        """How often a block was read, of all blocks together."""
        blocks = (*job.blocks.vision_layers, job.blocks.projector, *job.blocks.text_layers)
        return sum(self.loads[block.tensor_names()[0]] for block in blocks)


def kept_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def assert_same(found: Influence, whole: Influence) -> None:
    assert found.tokens.keys() == whole.tokens.keys()
    for name, weights in whole.tokens.items():
        assert all(torch.equal(*pair) for pair in zip(found.tokens[name], weights, strict=True)), name
    assert found.outputs.keys() == whole.outputs.keys()
    assert all(torch.equal(found.outputs[name], metric) for name, metric in whole.outputs.items())


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_killed_measurement_goes_on_behind_its_last_block(
    job: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """Killed behind every block, there and back: nothing is computed again, and the same bits are found."""
    monkeypatch.setattr(output_hessian, "SKETCHED", 16)  # signs are drawn on the way back, too
    if parts > 1:
        monkeypatch.setattr(influence, "PART_VALUES", 1)
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values)][:parts])
    method = Method(variant=TWO_SIDED, objective="modality", learn_steps=1)
    shares: list[float] = []
    whole = measure_influence(job, alone(job), method, shares.append)
    assert shares == sorted(shares)
    visits = 2 * parts * job.blocks.count()
    assert len(shares) == visits + parts
    for stop in range(0, len(shares), 1 if parts == 1 else 3):
        folder = tmp_path / str(stop)
        told: list[float] = []

        def killed(share: float, told: list[float] = told, stop: int = stop) -> None:
            told.append(share)
            if len(told) > stop:
                raise KeyboardInterrupt

        first, second = Counted(job), Counted(job)
        with pytest.raises(KeyboardInterrupt):
            measure_influence(replace(job, source=first, work=Work(folder)), alone(job), method, killed)  # type: ignore[arg-type]
        assert holds_work(folder)
        found = measure_influence(replace(job, source=second, work=Work(folder)), alone(job), method)  # type: ignore[arg-type]
        assert first.blocks(job) + second.blocks(job) == visits
        assert_same(found, whole)
        assert kept_in(folder) == [f"influence-{parts - 1:04}.safetensors"]  # the sums of all parts, and no trail


@pytest.mark.usefixtures("again")
def test_with_a_work_folder_only_what_is_read_next_is_in_memory(
    job: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    lying: list[int] = []
    backward = influence.take_back

    def watched(visit: Visit, *rest: Any) -> Influence:
        lying.append(sum(path.stat().st_size for path in tmp_path.rglob("*-there-*")))
        held.append(sum(leaf.untyped_storage().nbytes() > 0 for other in passed for leaf in other.leaves))
        return backward(visit, *rest)

    passed: list[Visit] = []
    add = Trail.add
    monkeypatch.setattr(Trail, "add", lambda self, visit, known: (passed.append(visit), add(self, visit, known=known)))
    monkeypatch.setattr(influence, "take_back", watched)
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values)][:1])
    method = Method(objective="logits")
    measure_influence(replace(job, work=Work(tmp_path)), alone(job), method)
    assert 0 < max(lying) <= measured_bytes(job.blocks, job.samples, method)  # which the preflight asks the disk for
    # Of the last block, which the head read; of the last layer of the tower, which is cut; of the projector; and the inputs.
    assert held[0] == 4
    assert len(held) == job.blocks.count()


def test_metrics_weigh_gradients_by_the_leverage_of_inputs(job: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """G = sum of x^T H^-1 x g g^T, with H over all tokens, weighted as in the search; against float64, a token at a time."""
    method = Method(variant=TWO_SIDED, objective="logits")
    found = measure_influence(job, alone(job), method)
    rows: list[torch.Tensor] = []
    gradients: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(way_back, "leverages", lambda x, _: rows.append(x) or torch.ones(len(x)))
    monkeypatch.setattr(way_back, "_add", lambda _m, name, g, _: gradients.setdefault(name, []).append(g))
    measure_influence(job, alone(job), method)
    block = job.blocks.text_layers[-1]  # the first that is taken back
    groups = groups_of(block.module)
    for number, group in enumerate(groups):
        x = torch.cat(rows[number :: len(groups)][: len(gradients[f"{block.prefix}.{group.linears[0]}"])]).double()
        made = {name: torch.cat(gradients[f"{block.prefix}.{name}"]).double() for name in group.linears}
        size = sum(g.square().sum(1) for g in made.values())
        gram = (x * (size / size.mean() + FLOOR)[:, None]).T @ x
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        inverse = torch.linalg.inv(gram)
        leverage = torch.stack([row @ inverse @ row for row in x])
        for name, g in made.items():
            metric = found.outputs[f"{block.prefix}.{name}"].double()
            torch.testing.assert_close(
                metric, (g * leverage[:, None]).T @ g, rtol=1e-3, atol=1e-4 * float(metric.abs().max())
            )


def test_a_small_model_runs_forwards_once(job: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same bits as by computing again, weights read once; a killed run computes again what lay in memory."""
    method = Method(variant=TWO_SIDED, objective="logits")
    source = Counted(job)
    found = measure_influence(replace(job, source=source), alone(job), method)  # type: ignore[arg-type]
    assert {source.loads[name] for name in job.blocks.vision_layers[0].tensor_names()} == {1}
    forwards, backwards = influence.runs_of(job, alone(job), method)
    assert backwards == 2 * forwards

    def killed(share: float) -> None:
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_influence(replace(job, work=Work(tmp_path)), alone(job), method, killed)
    assert_same(measure_influence(replace(job, work=Work(tmp_path)), alone(job), method), found)
    monkeypatch.setattr(trail, "WHOLE_BYTES", 0)
    assert_same(measure_influence(job, alone(job), method), found)
    assert influence.runs_of(job, alone(job), method) == (3 * forwards, backwards)
    assert influence.runs_of(job, alone(job), Method(objective="logits")) == (2 * forwards, forwards)


def test_damaged_and_shortened_files_are_told(job: Calibration, tmp_path: Path) -> None:
    method, kept = Method(objective="logits"), replace(job, work=Work(tmp_path))
    measure_influence(kept, alone(job), method)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        measure_influence(replace(job, work=Work(tmp_path)), alone(job), method)


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize("parts", [1, 3])
def test_weights_are_read_twice_for_every_part(job: Calibration, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """There and back; the pictures of others are not computed where nothing is mixed."""
    source = Counted(job)
    if parts > 1:
        monkeypatch.setattr(influence, "PART_VALUES", 1)
    samples = job.samples[:parts]
    measured(replace(job, source=source, samples=samples), "logits")  # type: ignore[arg-type]
    assert {source.loads[name] for name in job.blocks.vision_layers[0].tensor_names()} == {2 * parts}


@pytest.mark.usefixtures("again")
def test_what_flows_between_blocks_lies_in_memory_once(job: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's inputs are the outputs of the one before it, not copies: they are most of what a large model takes here."""
    visits, backward = [], influence.take_back
    monkeypatch.setattr(influence, "take_back", lambda visit, *rest: visits.append(visit) or backward(visit, *rest))
    measure_influence(job, alone(job), Method(objective="logits"))
    decoder = [visit for visit in visits if visit.block in job.blocks.text_layers]
    assert len(decoder) == len(job.blocks.text_layers)
    for visit, before in pairwise(decoder):  # the last block comes first
        made = {leaf.untyped_storage().data_ptr() for leaf in before.leaves}
        assert {x.untyped_storage().data_ptr() for x in visit.inputs} == made


def test_plain_measures_nothing(job: Calibration) -> None:
    assert measured(job, "plain") == {}
