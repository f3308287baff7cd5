"""Token weights and output Hessians against gradients through the whole model at once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_export import own_prompts

from qvlm_export.calibrate.augmentation.cross_questions import cross_pair_prompts
from qvlm_export.calibrate.augmentation.prompts import flatten_prompts, label_block_inputs
from qvlm_export.calibrate.blockwise.blocks import get_linear, load_block
from qvlm_export.calibrate.blockwise.forward import FINAL_NORM, HEAD, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.shared_inputs import find_shared_inputs
from qvlm_export.calibrate.quantization.config import KRONECKER_LINEAR, LinearConfig, SearchConfig, TokenWeighting
from qvlm_export.calibrate.quantization.tokens import label_tokens
from qvlm_export.calibrate.sensitivity import block_backward, measure
from qvlm_export.calibrate.sensitivity.block_backward import MIN_TOKEN_WEIGHT, TokenWeights
from qvlm_export.calibrate.sensitivity.measure import measure_sensitivity


def measure_tokens(job: CalibrationJob, weighting: TokenWeighting, seed: int = 0) -> TokenWeights:
    return measure_sensitivity(job, own_prompts(job), SearchConfig(token_weighting=weighting, seed=seed)).token_weights


def sum_squared_gradients(job: CalibrationJob) -> dict[str, list[torch.Tensor]]:
    """The slow reference: one backward pass for every answer logit, squared and summed, with all blocks in memory."""
    totals: dict[str, list[torch.Tensor]] = {}
    blocks = job.blocks.all()
    with ExitStack() as stack:
        modules = {b.prefix: stack.enter_context(load_block(b, job.source)) for b in blocks}
        outputs: dict[tuple[str, str], list[torch.Tensor]] = {}
        for prefix, module in modules.items():
            for shared in find_shared_inputs(module):
                for name in shared.linears:

                    def record_output(_m, _i, out, key=(f"{prefix}.{shared.linears[0]}", name)):
                        out = out if out.requires_grad else out.requires_grad_()
                        outputs.setdefault(key, []).append(out)
                        return out

                    stack.callback(get_linear(module, name).register_forward_hook(record_output).remove)
        for sample in job.samples:
            outputs.clear()

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
                outs = [(key, out) for key, parts in outputs.items() for out in parts]
                sums: dict[str, torch.Tensor] = {}
                for logit in answer.flatten():
                    grads = torch.autograd.grad(logit, [o for _, o in outs], retain_graph=True, materialize_grads=True)
                    for ((name, _), _), gradient in zip(outs, grads, strict=True):
                        square = gradient.square().sum(-1)
                        sums[name] = sums.get(name, torch.zeros_like(square)) + square
            for name, square in sums.items():
                totals.setdefault(name, []).append(square)
    return totals


def test_probes_estimate_the_squared_gradients_of_all_logits(job: CalibrationJob) -> None:
    """The mean over many probes agrees with the reference, which takes one logit at a time."""
    sample = job.samples[0]
    job = replace(job, samples=[replace(sample, input_ids=sample.input_ids[: sample.answer_start + 1])])
    expected = sum_squared_gradients(job)
    probes = [measure_tokens(job, "logits", seed) for seed in range(32)]
    for name, exact in expected.items():
        mean = (
            torch.stack([torch.cat([w.flatten() for w in probe[name]]) for probe in probes]).mean(0) * (1 + MIN_TOKEN_WEIGHT)
            - MIN_TOKEN_WEIGHT
        )
        flat = torch.cat([w.flatten() for w in exact])
        assert torch.corrcoef(torch.stack([mean, flat / flat.mean()]))[0, 1] > 0.9, name


def test_in_the_last_block_only_answer_tokens_have_weight_behind_attention(job: CalibrationJob) -> None:
    token_weights = measure_tokens(job, "logits")
    last = job.blocks.text_layers[-1].prefix
    least = MIN_TOKEN_WEIGHT / (1 + MIN_TOKEN_WEIGHT)
    for weights, sample in zip(token_weights[f"{last}.mlp.down_proj"], job.samples, strict=True):
        assert weights[0, : sample.answer_start - 1].numpy() == pytest.approx(least, rel=1e-5)
        assert (weights[0, sample.answer_start - 1 : len(sample.input_ids) - 1] > 1.5 * least).all()
    keys = torch.cat(
        [w[0, : s.answer_start - 1] for w, s in zip(token_weights[f"{last}.self_attn.q_proj"], job.samples, strict=True)]
    )
    assert float(keys.max()) > 2 * least  # answer tokens attend to the question's keys and values


def test_all_text_behind_the_last_image_token_is_probed_on_request(job: CalibrationJob) -> None:
    config = SearchConfig(token_weighting="logits", probed_tokens="text")
    token_weights = measure_sensitivity(job, own_prompts(job), config).token_weights
    last, least = job.blocks.text_layers[-1].prefix, MIN_TOKEN_WEIGHT / (1 + MIN_TOKEN_WEIGHT)
    for weights, sample in zip(token_weights[f"{last}.mlp.down_proj"], job.samples, strict=True):
        images = np.flatnonzero(sample.input_ids == job.blocks.image_token_id)
        first = int(images[-1]) if len(images) else 0
        assert weights[0, :first].numpy() == pytest.approx(least, rel=1e-5)
        assert (weights[0, first : len(sample.input_ids) - 1] > 1.1 * least).all()


def test_output_hessians_do_not_need_measured_token_weights(job: CalibrationJob) -> None:
    """Gradients are then those of the KL divergence."""
    config = SearchConfig(token_weighting="output", leverage=False, linear=LinearConfig(rounding="kronecker"))
    by_kl = replace(config, token_weighting="kl")
    first, second = (measure_sensitivity(job, own_prompts(job), one).output_hessians for one in (config, by_kl))
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weighting", ["logits", "kl", "kl+logits", "modality"])
def test_token_weights_have_mean_1_and_a_minimum(job: CalibrationJob, weighting) -> None:
    for name, weights in measure_tokens(job, weighting).items():
        flat = torch.cat([w.flatten() for w in weights])
        assert float(flat.mean()) == pytest.approx(1.0, rel=1e-4), name
        assert float(flat.min()) >= MIN_TOKEN_WEIGHT / (1 + MIN_TOKEN_WEIGHT) * 0.999


def test_modality_weighting_gives_tokens_of_a_kind_their_mean_weight(job: CalibrationJob) -> None:
    by_kind, by_token = (measure_tokens(job, weighting) for weighting in ("modality", "logits"))
    block = job.blocks.text_layers[0]
    name, labels = f"{block.prefix}.mlp.down_proj", label_block_inputs(block, job.blocks, own_prompts(job))
    kinds = torch.cat([label_tokens(s, job.blocks.image_token_id) for s in job.samples])
    assert torch.equal(kinds, torch.cat(labels))
    mean, single = (torch.cat([w.flatten() for w in weights[name]]) for weights in (by_kind, by_token))
    for kind in kinds.unique():
        assert mean[kinds == kind].std() < 1e-5
        assert float(mean[kinds == kind].mean()) == pytest.approx(float(single[kinds == kind].mean()), rel=1e-4)


def test_samples_in_parts_give_the_same_weights_but_for_random_signs(
    job: CalibrationJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all signs set to 1, weights are the same in one part as in many."""
    ones = torch.ones

    def no_signs(_low, _high, shape, generator):  # noqa: ARG001
        return ones(shape)

    monkeypatch.setattr(measure.torch, "randint", no_signs)
    whole = measure_tokens(job, "logits")
    monkeypatch.setattr(measure, "MAX_TAPE_VALUES", 1)
    parts = measure_tokens(job, "logits")
    assert whole.keys() == parts.keys()
    for name, weights in whole.items():
        for one, other in zip(weights, parts[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_an_image_gets_the_gradients_of_all_questions_about_it(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the decoder as if every prompt were a sample; in the tower the gradients of an image's prompts add up."""
    monkeypatch.setattr(measure.torch, "randint", lambda _low, _high, shape, generator: torch.ones(shape))  # noqa: ARG005
    job = replace(job, samples=[s for s in job.samples if len(s.pixel_values) == 1])
    prompts = cross_pair_prompts(job.samples, 2, job.blocks.image_token_id)
    texts = flatten_prompts(prompts)[0]
    assert len(texts) == 2 * len(job.samples)
    together = measure_sensitivity(job, prompts, SearchConfig(token_weighting="logits")).token_weights
    apart = measure_tokens(replace(job, samples=texts), "logits")
    for name, weights in together.items():
        assert len(weights) == (len(texts) if name.startswith("language_model") else len(job.samples)), name
        if name.startswith("language_model"):
            for one, other in zip(weights, apart[name], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_output_hessians_weight_gradients_by_the_leverage_of_inputs(
    job: CalibrationJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G = sum of x^T H^-1 x g g^T, with H over all tokens, weighted as in the search; against float64, a token at a time."""
    method = SearchConfig(linear=KRONECKER_LINEAR, token_weighting="logits")
    sensitivity = measure_sensitivity(job, own_prompts(job), method)
    rows: list[torch.Tensor] = []
    gradients: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(block_backward, "leverage_scores", lambda x, _: rows.append(x) or torch.ones(len(x)))
    monkeypatch.setattr(block_backward, "_accumulate", lambda _m, name, g, _: gradients.setdefault(name, []).append(g))
    measure_sensitivity(job, own_prompts(job), method)
    block = job.blocks.text_layers[-1]  # the first of the backward pass
    shared_inputs = find_shared_inputs(block.module)
    for number, shared in enumerate(shared_inputs):
        x = torch.cat(rows[number :: len(shared_inputs)][: len(gradients[f"{block.prefix}.{shared.linears[0]}"])]).double()
        by_linear = {name: torch.cat(gradients[f"{block.prefix}.{name}"]).double() for name in shared.linears}
        token_weight = sum(g.square().sum(1) for g in by_linear.values())
        input_hessian = (x * (token_weight / token_weight.mean() + MIN_TOKEN_WEIGHT)[:, None]).T @ x
        input_hessian += 0.01 * input_hessian.diagonal().mean() * torch.eye(len(input_hessian))
        inverse = torch.linalg.inv(input_hessian)
        leverage = torch.stack([row @ inverse @ row for row in x])
        for name, g in by_linear.items():
            measured = sensitivity.output_hessians[f"{block.prefix}.{name}"].double()
            torch.testing.assert_close(
                measured, (g * leverage[:, None]).T @ g, rtol=1e-3, atol=1e-4 * float(measured.abs().max())
            )


def test_tempered_gradients_count_by_their_norm(job: CalibrationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """G = sum of g g^T / |g|, against float64, a token at a time; a token without gradient adds nothing."""
    config = SearchConfig(token_weighting="output", leverage=False, linear=KRONECKER_LINEAR)
    measured = measure_sensitivity(job, own_prompts(job), replace(config, temper_gradients=True)).output_hessians
    gradients: dict[str, list[torch.Tensor]] = {}
    monkeypatch.setattr(block_backward, "_accumulate", lambda _m, name, g, _: gradients.setdefault(name, []).append(g))
    measure_sensitivity(job, own_prompts(job), config)
    assert measured.keys() == gradients.keys()
    for name, parts in gradients.items():
        rows = [g for g in torch.cat(parts).double() if g.norm() > 0]
        expected = torch.stack([torch.outer(g, g) / g.norm() for g in rows]).sum(0)
        torch.testing.assert_close(measured[name].double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert any(bool((torch.cat(parts).norm(dim=1) == 0).any()) for parts in gradients.values())


def test_plain_weighting_measures_nothing(job: CalibrationJob) -> None:
    assert measure_tokens(job, "plain") == {}
