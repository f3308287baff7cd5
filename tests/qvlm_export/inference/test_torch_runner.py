"""The float and fake-quantized model in torch, with a cache: against transformers and the block-by-block forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import copy_checkpoint, set_weight
from small_export import calibrate, make_sample, open_small, schemes_of
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step
from qvlm_export.checkpoints.files.aliases import ALIASES
from qvlm_export.evaluation.eval_model import find_eval_model, folder_identity, open_eval_model
from qvlm_export.inference import torch_runner
from qvlm_export.inference.torch_runner import SLOT_STEP, SlotCache, check_device
from qvlm_export.inference.torch_session import torch_manifest
from qvlm_export.inputs.samples import load_processor

NO_STOP = frozenset({-1})


@pytest.fixture(scope="module")
def folder(llava):
    return llava(text={"num_hidden_layers": 3})


@pytest.fixture(scope="module")
def reference(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(folder):
    with open_eval_model(find_eval_model(str(folder), "auto"), device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def samples(folder):
    """Samples with an image, without one, and with one at another length."""
    checkpoint = open_small(folder)
    return [make_sample(checkpoint, words=w, images=i, seed=s) for s, (w, i) in enumerate([(9, 1), (6, 0), (14, 1)])]


def reference_inputs(sample):
    inputs = {
        "input_ids": torch.from_numpy(sample.input_ids)[None],
        "attention_mask": torch.ones(1, len(sample.input_ids)).long(),
    }
    return inputs | ({"pixel_values": torch.from_numpy(sample.pixel_values)} if len(sample.pixel_values) else {})


def pixels(samples):
    return np.concatenate([s.pixel_values for s in samples if len(s.pixel_values)])


def test_logits_are_those_of_transformers(model, reference, samples):
    for sample in samples:
        images = sample.pixel_values if len(sample.pixel_values) else None
        with torch.no_grad():
            expected = reference(**reference_inputs(sample)).logits.numpy()
        assert np.allclose(model.logits(sample.input_ids[None], images), expected, atol=2e-5 * np.abs(expected).max())


def test_a_batch_of_unequal_lengths_generates_the_tokens_of_transformers(model, reference, samples):
    """Rows are padded on the right and the cache grows; no row may attend to padding."""
    sequences = model.session.start([s.input_ids for s in samples], pixels(samples))
    for _ in model.session.generate(sequences, 12, NO_STOP):
        pass
    for sample, tokens in zip(samples, sequences.tokens, strict=True):
        with torch.no_grad():
            expected = reference.generate(**reference_inputs(sample), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert tokens == expected[0].tolist()


def test_extending_a_sequence_equals_computing_it_whole(model, samples):
    whole = samples[2].input_ids
    sequences = model.session.start([whole[:-5]], samples[2].pixel_values)
    model.session.extend(sequences, [whole[-5:]])
    expected = model.logits(whole[None], samples[2].pixel_values)[0, -1]
    assert np.allclose(sequences.logits[0], expected, atol=1e-5 * np.abs(expected).max())


def test_a_growing_cache_keeps_its_content():
    cache = SlotCache()
    first, second = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 2, 4)
    cache.begin(torch.tensor([[0, 1, 2], [0, 1, 2]]))
    cache.update(first, -first, 0)
    far = SLOT_STEP + 7
    cache.begin(torch.tensor([[3, far], [1, 2]]))
    keys, values = cache.update(second, -second, 0)
    assert keys.shape == (2, 1, far + 1, 4)
    assert torch.equal(keys[0, :, :3], first[0])
    assert torch.equal(keys[0, 0, 3], second[0, 0, 0])
    assert torch.equal(keys[0, 0, far], second[0, 0, 1])
    assert torch.equal(keys[1, 0, 1:3], second[1, 0])  # overwritten
    assert torch.equal(keys[1, 0, 0], first[1, 0, 0])
    assert torch.equal(values, -keys)


@pytest.mark.parametrize("preset", ["int8", "sim-w4a8"])
def test_fake_quantized_logits_are_those_of_the_block_by_block_pass(folder, samples, tmp_path, preset):
    checkpoint = open_small(folder)
    calibrated = calibrate(checkpoint, schemes_of(checkpoint, preset), tmp_path / "c", samples)
    load_processor(folder).save_pretrained(tmp_path / "c")
    blocks, source = make_blocks(checkpoint.hf_config), DequantizedSource(calibrated)
    step = fake_quantized_step(calibrated, source)
    hidden = run_decoder_blocks(blocks, source, samples, run_vision_blocks(blocks, source, samples, step), step)
    head = load_head(source, checkpoint.config.text.rms_norm_eps)
    chosen_model = find_eval_model(str(tmp_path / "c"), "auto")
    assert chosen_model.model_form == "fake-quant"
    with open_eval_model(chosen_model, device="cpu") as opened:
        for number, sample in enumerate(samples):
            expected = head.logits(hidden[number][0]).numpy()
            images = sample.pixel_values if len(sample.pixel_values) else None
            got = opened.logits(sample.input_ids[None], images)[0]
            assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
        got = opened.logits(samples[0].input_ids[None], samples[0].pixel_values)
    with open_eval_model(find_eval_model(str(folder), "float"), device="cpu") as opened:
        unquantized = opened.logits(samples[0].input_ids[None], samples[0].pixel_values)
    assert np.abs(got - unquantized).max() > 1e-3 * np.abs(unquantized).max()


def test_a_calibrated_checkpoint_needs_a_processor(folder, samples, tmp_path):
    checkpoint = open_small(folder)
    calibrate(checkpoint, schemes_of(checkpoint, "int8"), tmp_path / "x.calibrated", samples)
    with pytest.raises(UserError, match="no processor is in it or beside it"):
        open_eval_model(find_eval_model(str(tmp_path / "x.calibrated"), "auto"))
    load_processor(folder).save_pretrained(tmp_path / "x.processor")
    open_eval_model(find_eval_model(str(tmp_path / "x.calibrated"), "auto")).session.runner.close()
    assert CalibratedCheckpoint(tmp_path / "x.calibrated").schemes


def test_a_calibrated_checkpoint_with_a_wrong_config_or_processor_is_refused(folder, samples, tmp_path):
    checkpoint = open_small(folder)
    calibrate(checkpoint, schemes_of(checkpoint, "int8"), tmp_path / "c", samples)
    processor = load_processor(folder)
    processor.image_processor.crop_size = {"height": 64, "width": 64}
    processor.save_pretrained(tmp_path / "c")
    with pytest.raises(UserError, match=r"do processor and config\.json belong together"):
        open_eval_model(find_eval_model(str(tmp_path / "c"), "auto"), device="cpu")
    config = tmp_path / "c" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": ', '"hidden_size": "wide", "x": '))
    with pytest.raises(UserError, match="not a valid configuration"):
        find_eval_model(str(tmp_path / "c"), "auto")


def test_a_weight_with_nan_is_refused_by_name(llava, tmp_path):
    copy = copy_checkpoint(llava(), tmp_path / "m")
    set_weight(copy, "language_model.model.layers.1.mlp.up_proj.weight", np.nan)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_eval_model(find_eval_model(str(copy), "auto"))


def test_a_16_bit_float_type_is_used_throughout(folder, samples, model, monkeypatch):
    """As on a GPU, weights, cache and activations have 16 bits; nowhere may they meet a float32 tensor by mistake."""
    monkeypatch.setitem(torch_runner.DTYPES, "cpu", torch.bfloat16)
    expected = model.session.start([s.input_ids for s in samples], pixels(samples)).logits
    with open_eval_model(find_eval_model(str(folder), "auto"), device="cpu") as narrow:
        assert {p.dtype for p in narrow.session.runner._blocks.text_layers[0].module.parameters()} == {torch.bfloat16}
        sequences = narrow.session.start([s.input_ids for s in samples], pixels(samples))
        assert np.linalg.norm(sequences.logits - expected) < 0.1 * np.linalg.norm(expected)
        assert len(list(narrow.session.generate(sequences, 3, NO_STOP))) == 3


def test_closing_frees_the_weights(folder):
    opened = open_eval_model(find_eval_model(str(folder), "auto"), device="cpu")
    blocks = opened.session.runner._blocks
    assert not any(p.is_meta for p in blocks.text_layers[0].module.parameters())
    opened.session.runner.close()
    assert all(p.is_meta for p in blocks.text_layers[0].module.parameters())


def test_the_identity_of_a_folder_changes_with_weights_and_template(llava, tmp_path):
    copy = copy_checkpoint(llava(), tmp_path / "m")
    before = folder_identity(copy)
    assert folder_identity(llava()) == before  # it does not depend on the path
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    changed = folder_identity(copy)
    assert changed != before
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert folder_identity(copy) not in (before, changed)


def test_device_choice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device("auto") == "cpu"
    with pytest.raises(UserError, match="torch sees no GPU"):
        check_device("cuda")
    with pytest.raises(UserError, match="--device tpu: unknown"):
        check_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_device("auto") == "cuda"


@pytest.mark.parametrize(
    ("alias", "batch", "length"),
    [("llava-7b", 8, 4096), ("llava-next-7b", 2, 4096), ("llava-next-llama3-8b", 1, 4096), ("llava-onevision-7b", 1, 4096)],
)
def test_default_limits_in_torch(alias, batch, length):
    """The batch is smaller for long prompts, as logits of all positions are in memory; the context is the model's."""
    limits = torch_manifest(Path(alias), ALIASES[alias].config, None).limits
    assert (limits.max_batch, limits.max_length) == (batch, length)
    longer = replace(ALIASES[alias].config, text=replace(ALIASES[alias].config.text, max_position_embeddings=32768))
    assert torch_manifest(Path(alias), longer, 5).limits.max_batch == 5
    largest = longer.most_image_tokens
    assert torch_manifest(Path(alias), longer, None).limits.max_length == max(4096, largest + 1024)
