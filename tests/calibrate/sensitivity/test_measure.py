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

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts, label_block_inputs
from qvlm_export.calibrate.blockwise.blocks import get_linear, load_block, make_blocks
from qvlm_export.calibrate.blockwise.forward import FINAL_NORM, HEAD, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, holds_work
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.blockwise.token_kinds import label_tokens
from qvlm_export.calibrate.calibrators.block_search import weighted_relative_error
from qvlm_export.calibrate.calibrators.cost import sensitivity_bytes
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import KRONECKER_LINEAR, SearchConfig, TokenWeighting
from qvlm_export.calibrate.rounding import output_hessian
from qvlm_export.calibrate.rounding.quantize_linears import LayerInputs
from qvlm_export.calibrate.sensitivity import block_backward, measure, tape
from qvlm_export.calibrate.sensitivity.block_backward import MIN_TOKEN_WEIGHT, Sensitivity, TokenWeights
from qvlm_export.calibrate.sensitivity.measure import measure_sensitivity
from qvlm_export.calibrate.sensitivity.tape import Tape, TapeEntry


@pytest.fixture
def job(llava) -> CalibrationJob:
    checkpoint = open_small(llava(dtype="float32"))
    samples = [replace(sample, answer_start=len(sample.input_ids) - 4) for sample in mixed_samples(checkpoint)]
    return CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, plan_of(checkpoint, "int4"), samples)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large model: what a block computed on the way there is computed again on the way back."""
    monkeypatch.setattr(tape, "MAX_GRAPH_BYTES", 0)


def alone(job: CalibrationJob) -> list[list[Sample]]:
    """Every sample with its own question only."""
    return [[sample] for sample in job.samples]


def measured(job: CalibrationJob, objective: TokenWeighting, seed: int = 0) -> TokenWeights:
    return measure_sensitivity(job, alone(job), SearchConfig(token_weighting=objective, seed=seed)).tokens


def all_at_once(job: CalibrationJob) -> dict[str, list[torch.Tensor]]:
    """Squared gradients summed over every logit of the answers on its own, all blocks in memory."""
    found: dict[str, list[torch.Tensor]] = {}
    blocks = job.blocks.all()
    with ExitStack() as held:
        modules = {b.prefix: held.enter_context(load_block(b, job.source)) for b in blocks}
        kept: dict[tuple[str, str], list[torch.Tensor]] = {}
        for prefix, module in modules.items():
            for group in find_shared_inputs(module):
                for name in group.linears:

                    def keep(_m, _i, out, key=(f"{prefix}.{group.linears[0]}", name)):
                        out = out if out.requires_grad else out.requires_grad_()
                        kept.setdefault(key, []).append(out)
                        return out

                    held.callback(get_linear(module, name).register_forward_hook(keep).remove)
        for sample in job.samples:
            kept.clear()

            def step(block, inputs, run):
                return [run(modules[block.prefix], x.clone()) for x in inputs]

            with torch.enable_grad():
                features = run_vision_blocks(job.blocks, job.source, [sample], step)
                hidden = run_decoder_blocks(job.blocks, job.source, [sample], features, step)
                gain, head = (torch.from_numpy(job.source.load(n).copy()) for n in (FINAL_NORM, HEAD))
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


def test_probes_estimate_the_gradients_of_all_logits(job: CalibrationJob) -> None:
    """The mean over many probes is the sum over logits, of which the reference takes one at a time."""
    sample = job.samples[0]
    job = replace(job, samples=[replace(sample, input_ids=sample.input_ids[: sample.answer_start + 1])])
    wanted = all_at_once(job)
    probes = [measured(job, "logits", seed) for seed in range(32)]
    for name, exact in wanted.items():
        mean = (
            torch.stack([torch.cat([w.flatten() for w in probe[name]]) for probe in probes]).mean(0) * (1 + MIN_TOKEN_WEIGHT)
            - MIN_TOKEN_WEIGHT
        )
        flat = torch.cat([w.flatten() for w in exact])
        assert torch.corrcoef(torch.stack([mean, flat / flat.mean()]))[0, 1] > 0.9, name


def test_the_last_block_only_counts_at_answers(job: CalibrationJob) -> None:
    found = measured(job, "logits")
    last = job.blocks.text_layers[-1].prefix
    least = MIN_TOKEN_WEIGHT / (1 + MIN_TOKEN_WEIGHT)
    for weights, sample in zip(found[f"{last}.mlp.down_proj"], job.samples, strict=True):
        assert weights[0, : sample.answer_start - 1].numpy() == pytest.approx(least, rel=1e-5)
        assert (weights[0, sample.answer_start - 1 : len(sample.input_ids) - 1] > 1.5 * least).all()
    keys = torch.cat(
        [w[0, : s.answer_start - 1] for w, s in zip(found[f"{last}.self_attn.q_proj"], job.samples, strict=True)]
    )
    assert float(keys.max()) > 2 * least  # keys and values of the question are looked at


@pytest.mark.parametrize("objective", ["logits", "kl", "kl+logits", "modality"])
def test_weights_have_mean_1_and_a_floor(job: CalibrationJob, objective) -> None:
    for name, weights in measured(job, objective).items():
        flat = torch.cat([w.flatten() for w in weights])
        assert float(flat.mean()) == pytest.approx(1.0, rel=1e-4), name
        assert float(flat.min()) >= MIN_TOKEN_WEIGHT / (1 + MIN_TOKEN_WEIGHT) * 0.999


def test_modality_gives_tokens_of_a_kind_one_weight(job: CalibrationJob) -> None:
    found, plain = (measured(job, objective) for objective in ("modality", "logits"))
    block = job.blocks.text_layers[0]
    name, labels = f"{block.prefix}.mlp.down_proj", label_block_inputs(block, job.blocks, alone(job))
    kinds = torch.cat([label_tokens(s, job.blocks.image_token_id) for s in job.samples])
    assert torch.equal(kinds, torch.cat(labels))
    given, single = (torch.cat([w.flatten() for w in part[name]]) for part in (found, plain))
    for kind in kinds.unique():
        assert given[kinds == kind].std() < 1e-5
        assert float(given[kinds == kind].mean()) == pytest.approx(float(single[kinds == kind].mean()), rel=1e-4)


def test_samples_in_parts_give_weights_of_the_same_kind(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the signs that are drawn differ: without them nothing does."""
    ones = torch.ones

    def no_signs(_low, _high, shape, generator):  # noqa: ARG001
        return ones(shape)

    monkeypatch.setattr(measure.torch, "randint", no_signs)
    whole = measured(job, "logits")
    monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    parts = measured(job, "logits")
    assert whole.keys() == parts.keys()
    for name, weights in whole.items():
        for one, other in zip(weights, parts[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_a_picture_counts_for_all_questions_about_it(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the decoder as if every prompt were a sample; in the tower the gradients of a picture's prompts add up."""
    monkeypatch.setattr(measure.torch, "randint", lambda _low, _high, shape, generator: torch.ones(shape))  # noqa: ARG005
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values) == 1])
    prompts = cross_pair_prompts(job.samples, 2, job.blocks.image_token_id)
    texts = flatten_prompts(prompts)[0]
    assert len(texts) == 2 * len(job.samples)
    together = measure_sensitivity(job, prompts, SearchConfig(token_weighting="logits")).tokens
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
    some, few = LayerInputs(wanted, seen, weights), LayerInputs(wanted[:25], seen[:25])
    torch.testing.assert_close(some.scale_by_weights(seen).T @ seen, few.scale_by_weights(seen[:25]).T @ seen[:25])
    for out in (3, 20):  # fewer and more than inputs: the products are made in another order
        weight = torch.randn(out, 8, generator=generator)
        torch.testing.assert_close(some.cross_term(some.scale_by_weights(seen), weight), few.cross_term(seen[:25], weight))
        torch.testing.assert_close(few.cross_term(seen[:25], weight), weight @ wanted[:25].T @ seen[:25])
    error = weighted_relative_error([seen[None]], [wanted[None]], [weights[None]])
    assert error == pytest.approx(weighted_relative_error([seen[None, :25]], [wanted[None, :25]]), rel=1e-6)


class Counted:
    """A source that counts how often each tensor is read."""

    def __init__(self, job: CalibrationJob) -> None:
        self._source, self.loads = job.source, Counter[str]()

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def load(self, name: str) -> np.ndarray:
        self.loads[name] += 1
        return self._source.load(name)

    def blocks(self, job: CalibrationJob) -> int:
        """How often a block was read, of all blocks together."""
        blocks = job.blocks.all()
        return sum(self.loads[block.tensor_names()[0]] for block in blocks)


def kept_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def assert_same(found: Sensitivity, whole: Sensitivity) -> None:
    assert found.tokens.keys() == whole.tokens.keys()
    for name, weights in whole.tokens.items():
        assert all(torch.equal(*pair) for pair in zip(found.tokens[name], weights, strict=True)), name
    assert found.outputs.keys() == whole.outputs.keys()
    assert all(torch.equal(found.outputs[name], metric) for name, metric in whole.outputs.items())


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_killed_measurement_goes_on_behind_its_last_block(
    job: CalibrationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """Killed behind every block, there and back: nothing is computed again, and the same bits are found."""
    monkeypatch.setattr(output_hessian, "SKETCH_ROWS", 16)  # signs are drawn on the way back, too
    if parts > 1:
        monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values)][:parts])
    method = SearchConfig(linear=KRONECKER_LINEAR, token_weighting="modality", learn_steps=1)
    shares: list[float] = []
    whole = measure_sensitivity(job, alone(job), method, shares.append)
    assert shares == sorted(shares)
    visits = 2 * parts * job.blocks.num_blocks()
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
            measure_sensitivity(replace(job, source=first, work=CalibrationWork(folder)), alone(job), method, killed)  # type: ignore[arg-type]
        assert holds_work(folder)
        found = measure_sensitivity(replace(job, source=second, work=CalibrationWork(folder)), alone(job), method)  # type: ignore[arg-type]
        assert first.blocks(job) + second.blocks(job) == visits
        assert_same(found, whole)
        assert kept_in(folder) == [f"influence-{parts - 1:04}.safetensors"]  # the sums of all parts, and no trail


@pytest.mark.usefixtures("again")
def test_with_a_work_folder_only_what_is_read_next_is_in_memory(
    job: CalibrationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    lying: list[int] = []
    backward = measure.backward_block

    def watched(visit: TapeEntry, *rest: Any) -> Sensitivity:
        lying.append(sum(path.stat().st_size for path in tmp_path.rglob("*-there-*")))
        held.append(sum(leaf.untyped_storage().nbytes() > 0 for other in passed for leaf in other.leaves))
        return backward(visit, *rest)

    passed: list[TapeEntry] = []
    add = Tape.add
    monkeypatch.setattr(Tape, "add", lambda self, visit, known: (passed.append(visit), add(self, visit, known=known)))
    monkeypatch.setattr(measure, "backward_block", watched)
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values)][:1])
    method = SearchConfig(token_weighting="logits")
    measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), alone(job), method)
    assert 0 < max(lying) <= sensitivity_bytes(job.blocks, job.samples, method)  # which the preflight asks the disk for
    # Of the last block, which the head read; of the last layer of the tower, which is cut; of the projector; and the inputs.
    assert held[0] == 4
    assert len(held) == job.blocks.num_blocks()


def test_metrics_weigh_gradients_by_the_leverage_of_inputs(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """G = sum of x^T H^-1 x g g^T, with H over all tokens, weighted as in the search; against float64, a token at a time."""
    method = SearchConfig(linear=KRONECKER_LINEAR, token_weighting="logits")
    found = measure_sensitivity(job, alone(job), method)
    rows: list[torch.Tensor] = []
    gradients: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(block_backward, "leverage_scores", lambda x, _: rows.append(x) or torch.ones(len(x)))
    monkeypatch.setattr(block_backward, "_add", lambda _m, name, g, _: gradients.setdefault(name, []).append(g))
    measure_sensitivity(job, alone(job), method)
    block = job.blocks.text_layers[-1]  # the first that is taken back
    groups = find_shared_inputs(block.module)
    for number, group in enumerate(groups):
        x = torch.cat(rows[number :: len(groups)][: len(gradients[f"{block.prefix}.{group.linears[0]}"])]).double()
        made = {name: torch.cat(gradients[f"{block.prefix}.{name}"]).double() for name in group.linears}
        size = sum(g.square().sum(1) for g in made.values())
        gram = (x * (size / size.mean() + MIN_TOKEN_WEIGHT)[:, None]).T @ x
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        inverse = torch.linalg.inv(gram)
        leverage = torch.stack([row @ inverse @ row for row in x])
        for name, g in made.items():
            metric = found.outputs[f"{block.prefix}.{name}"].double()
            torch.testing.assert_close(
                metric, (g * leverage[:, None]).T @ g, rtol=1e-3, atol=1e-4 * float(metric.abs().max())
            )


def test_a_small_model_runs_forwards_once(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same bits as by computing again, weights read once; a killed run computes again what lay in memory."""
    method = SearchConfig(linear=KRONECKER_LINEAR, token_weighting="logits")
    source = Counted(job)
    found = measure_sensitivity(replace(job, source=source), alone(job), method)  # type: ignore[arg-type]
    assert {source.loads[name] for name in job.blocks.vision_layers[0].tensor_names()} == {1}
    forwards, backwards = measure.count_passes(job, alone(job), method)
    assert backwards == 2 * forwards

    def killed(share: float) -> None:
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), alone(job), method, killed)
    assert_same(measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), alone(job), method), found)
    monkeypatch.setattr(tape, "MAX_GRAPH_BYTES", 0)
    assert_same(measure_sensitivity(job, alone(job), method), found)
    assert measure.count_passes(job, alone(job), method) == (3 * forwards, backwards)
    assert measure.count_passes(job, alone(job), SearchConfig(token_weighting="logits")) == (2 * forwards, forwards)


def test_damaged_and_shortened_files_are_told(job: CalibrationJob, tmp_path: Path) -> None:
    method, kept = SearchConfig(token_weighting="logits"), replace(job, work=CalibrationWork(tmp_path))
    measure_sensitivity(kept, alone(job), method)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged"):
        measure_sensitivity(replace(job, work=CalibrationWork(tmp_path)), alone(job), method)


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize("parts", [1, 3])
def test_weights_are_read_twice_for_every_part(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """There and back; the pictures of others are not computed where nothing is mixed."""
    source = Counted(job)
    if parts > 1:
        monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    samples = job.samples[:parts]
    measured(replace(job, source=source, samples=samples), "logits")  # type: ignore[arg-type]
    assert {source.loads[name] for name in job.blocks.vision_layers[0].tensor_names()} == {2 * parts}


@pytest.mark.usefixtures("again")
def test_what_flows_between_blocks_lies_in_memory_once(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's inputs are the outputs of the one before it, not copies: they are most of what a large model takes here."""
    visits, backward = [], measure.backward_block
    monkeypatch.setattr(measure, "backward_block", lambda visit, *rest: visits.append(visit) or backward(visit, *rest))
    measure_sensitivity(job, alone(job), SearchConfig(token_weighting="logits"))
    decoder = [visit for visit in visits if visit.block in job.blocks.text_layers]
    assert len(decoder) == len(job.blocks.text_layers)
    for visit, before in pairwise(decoder):  # the last block comes first
        made = {leaf.untyped_storage().data_ptr() for leaf in before.leaves}
        assert {x.untyped_storage().data_ptr() for x in visit.inputs} == made


def test_plain_measures_nothing(job: CalibrationJob) -> None:
    assert measured(job, "plain") == {}
