"""The layout of LLaVA's authors: config, tower, padded tables, tokenizer, conversation, image processing; and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from commands import Edit, assert_refused, copy_checkpoint, export_onnx, put
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.author_layout import TOWERS, convert_config, known_tower, pad_rows, read_tower_config
from qvlm_export.checkpoints.author_processor import find_conversation
from qvlm_export.checkpoints.chat_templates import CONVERSATIONS, chat_text
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.checkpoints.files import hub as hub_module
from qvlm_export.checkpoints.files.snapshot import Snapshot, find_snapshot
from qvlm_export.checkpoints.origin import describe_origin
from qvlm_export.inputs.samples import encode, load_processor
from qvlm_export.pipeline.fetch import fetch_weights
from qvlm_export.pipeline.progress import Reporter
from tools.compatibility.hub_server import Hub
from tools.families.random_original import ORIGINALS, TOWER, VOCABULARY, sentencepiece_model, write_original

MakeOriginal = Callable[[str], Path]
QUESTION = [{"role": "user", "text": "What is it?", "images": 1}]
BOS, IMAGE = 1, "<image>"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes downloads fail, as no test here may need the network."""

    def fail(_: str, __: str | None, where: str) -> Snapshot:
        raise UserError(f"{where}: no network here")

    monkeypatch.setattr(hub_module, "find_snapshot", fail)


@pytest.fixture(scope="module")
def make_original(tmp_path_factory: pytest.TempPathFactory) -> MakeOriginal:
    """make_original(kind) -> the folder of such a checkpoint, made once. Do not write to it."""

    def write(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / kind
        write_original(folder, kind)
        return folder

    return cache(write)


def copy_with_tower(source: Path, tmp_path: Path, config: Edit | None = None) -> Path:
    """A copy of the checkpoint that may be written to, with its tower beside it."""
    shutil.copytree(source.parent / f"{source.name}-{TOWER}", tmp_path / f"{source.name}-{TOWER}")
    return copy_checkpoint(source, tmp_path / source.name, config)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


# Tokens and conversations


def reference_tokens(prompt: str, tokenizer: sentencepiece.SentencePieceProcessor, image: int) -> list[int]:
    """The tokens of LLaVA's own code: each text between images is encoded alone by sentencepiece, the first after BOS."""
    ids = [BOS]
    for number, text in enumerate(prompt.split(IMAGE)):
        ids += ([image] if number else []) + tokenizer.encode(text)
    return ids


@pytest.mark.parametrize("kind", ["v1.5", "v1.3", "v1.6-vicuna", "v1.6-mistral"])
@pytest.mark.parametrize("question", ["What is it?", " two  spaces", "Où est\nle chat ?", "1234 🙂"])
def test_tokens_are_those_of_llavas_own_code(make_original: MakeOriginal, kind: str, question: str) -> None:
    """A tokenizer that is not legacy needs a space after the image to give these tokens, which the template writes."""
    folder = make_original(kind)
    processor = load_processor(folder)
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    prompt = chat_text(processor, [{"role": "user", "text": question, "images": 1}])
    _, ids = encode(processor, prompt, [noise(20, 30)])
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    first = int((ids == image).argmax())
    one_image_token = [int(t) for n, t in enumerate(ids) if t != image or n == first]
    assert one_image_token == reference_tokens(prompt.replace(f"{IMAGE} \n", f"{IMAGE}\n"), reference, image)


A_CHAT = "A chat between a curious {} and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
POLITE = A_CHAT + "polite answers to the {}'s questions. "
REST = "What is it? ASSISTANT: A ring.</s>USER: Sure? ASSISTANT:"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("v1.5", POLITE.format("user", "user") + "USER: <image> \n" + REST),
        ("v1.3", POLITE.format("human", "human") + "USER: <image>\n" + REST),
        ("v1", POLITE.format("human", "human") + "USER: <im_start><image><im_end>\n" + REST),
        ("v1.6-mistral", "[INST] <image>\nWhat is it? [/INST] A ring.</s>[INST] Sure? [/INST]"),
    ],
)
def test_chat_text_of_every_kind(make_original: MakeOriginal, kind: str, expected: str) -> None:
    turns = [*QUESTION, {"role": "assistant", "text": "A ring."}, {"role": "user", "text": "Sure?"}]
    assert chat_text(load_processor(make_original(kind)), turns) == expected


def test_the_conversation_follows_from_the_config() -> None:
    for config, name in (
        ({"model_type": "llava", "mm_projector_type": "mlp2x_gelu"}, "vicuna_v1"),
        ({"model_type": "llava"}, "llava_v1"),
        ({"model_type": "llava", "mm_projector_type": "linear"}, "llava_v1"),
        ({"model_type": "llava_mistral", "mm_projector_type": "mlp2x_gelu"}, "mistral_instruct"),
    ):
        assert find_conversation(config) == CONVERSATIONS[name]


def test_image_start_and_end_are_single_tokens(make_original: MakeOriginal) -> None:
    processor = load_processor(make_original("v1"))
    _, ids = encode(processor, chat_text(processor, QUESTION), [noise(20, 30)])
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert image == VOCABULARY + 3
    first, last = np.flatnonzero(ids == image)[[0, -1]]
    assert (ids[first - 1], ids[last + 1]) == (VOCABULARY + 1, VOCABULARY + 2)


# Images


def test_v1_5_pads_images_with_the_mean_colour(make_original: MakeOriginal) -> None:
    """A wide image is in the middle of a square, and nothing is cut off."""
    processor = load_processor(make_original("v1.5"))
    wide = Image.new("RGB", (96, 24), (250, 10, 20))
    pixels, _ = encode(processor, chat_text(processor, QUESTION), [wide])
    mean = np.array(processor.image_processor.image_mean)
    colours = pixels[0].transpose(1, 2, 0) * np.array(processor.image_processor.image_std) + mean
    expected = np.floor(mean * 255) / 255
    np.testing.assert_allclose(colours[2], np.broadcast_to(expected, (48, 3)), atol=0.01)
    np.testing.assert_allclose(colours[24], np.broadcast_to(np.array([250, 10, 20]) / 255, (48, 3)), atol=0.01)


def test_images_are_cropped_before_v1_5(make_original: MakeOriginal) -> None:
    processor = load_processor(make_original("v1.3"))
    wide = Image.new("RGB", (96, 24), (250, 10, 20))
    wide.paste((0, 255, 0), (0, 0, 24, 24))  # this part is cut off
    pixels, _ = encode(processor, chat_text(processor, QUESTION), [wide])
    assert pixels.shape == (1, 3, 32, 32)
    colours = pixels[0, 1] * processor.image_processor.image_std[1] + processor.image_processor.image_mean[1]
    np.testing.assert_allclose(colours, 10 / 255, atol=0.02)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_transformers_loads_the_saved_processor(make_original: MakeOriginal, tmp_path: Path, kind: str) -> None:
    original = load_processor(make_original(kind))
    original.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    text = chat_text(original, QUESTION)
    assert chat_text(saved, QUESTION) == text
    encoded, expected = (p(images=[noise(40, 70)], text=[text], return_tensors="np") for p in (saved, original))
    for key in ("input_ids", "pixel_values"):
        np.testing.assert_array_equal(encoded[key], expected[key])


# Configuration and weights


@pytest.mark.parametrize(("tower", "side", "tokens"), [(n, s, (s // 14) ** 2) for n, s in TOWERS.items()])
def test_openai_towers_need_no_download(tmp_path: Path, tower: str, side: int, tokens: int) -> None:
    config = read_tower_config(tower, tmp_path)
    assert (config["image_size"], config["hidden_size"], config["num_hidden_layers"]) == (side, 1024, 24)
    assert {224: 256, 336: 576}[side] == tokens


def test_the_published_config_of_llava_1_5_is_converted(tmp_path: Path) -> None:
    """config.json as in liuhaotian/llava-v1.5-7b."""
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "max_length": 4096, "max_position_embeddings": 4096,
        "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "use_cache": True, "use_mm_proj": True, "vocab_size": 32000,
    }  # fmt: skip
    converted = convert_config(config, tmp_path)
    assert converted["text_config"]["vocab_size"] == 32064
    assert converted["image_token_index"] == 32000
    assert (converted["vision_feature_layer"], converted["vision_feature_select_strategy"]) == (-2, "default")
    assert converted["vision_config"]["image_size"] == 336
    assert (converted["model_type"], converted["projector_hidden_act"]) == ("llava", "gelu")


def test_tables_grow_by_one_row_at_least() -> None:
    assert [pad_rows(n) for n in (32000, 32003, 63, 64, 127)] == [32064, 32064, 64, 128, 128]


def test_weights_are_read_from_both_folders(make_original: MakeOriginal) -> None:
    opened = open_checkpoint(str(make_original("v1.5")))
    tower = "vision_tower.vision_model.embeddings.class_embedding"
    table = "language_model.model.embed_tokens.weight"
    assert opened.source.dtype(tower) == np.float32  # CLIP's own
    assert opened.source.dtype(table) == np.float16
    assert opened.source.shape(table) == (512, 256)
    loaded = opened.source.load(table)
    assert loaded.shape == (512, 256)
    np.testing.assert_allclose(loaded[480:], np.broadcast_to(loaded[:480].astype(np.float32).mean(0), (32, 256)), atol=1e-3)
    assert not any(name.startswith(("text_model", "logit_scale")) or "inv_freq" in name for name in opened.source)
    assert list(opened.source) == list(dict.fromkeys(opened.source))


def test_tower_weights_inside_the_checkpoint_come_first(make_original: MakeOriginal, tmp_path: Path) -> None:
    """A tower that was trained too must not be replaced by the pretrained one."""
    folder = copy_with_tower(
        make_original("v1.6-vicuna"), tmp_path, put("", "mm_vision_tower", str(tmp_path / f"v1.6-vicuna-{TOWER}"))
    )
    (own,) = [t for f in folder.glob("*.safetensors") for n, t in load_file(f).items() if n.endswith("class_embedding")]
    torch.save({"vision_model.embeddings.class_embedding": own + 1}, tmp_path / f"v1.6-vicuna-{TOWER}" / "pytorch_model.bin")
    loaded = open_checkpoint(str(folder)).source.load("vision_tower.vision_model.embeddings.class_embedding")
    np.testing.assert_array_equal(loaded, own.numpy())


@pytest.mark.parametrize("name", ["openai/v1.5-small-clip", "{tmp}/v1.5-small-clip", "v1.5-small-clip"])
def test_a_local_tower_is_found_by_id_path_or_name(make_original: MakeOriginal, tmp_path: Path, name: str) -> None:
    folder = copy_with_tower(make_original("v1.5"), tmp_path, put("", "mm_vision_tower", name.format(tmp=tmp_path)))
    assert open_checkpoint(str(folder)).config.vision.image_size == 48


def test_a_tower_is_downloaded_where_it_is_not_here(
    make_original: MakeOriginal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, requests = make_original("v1.5"), []

    def find(repository: str, revision: str | None, where: str) -> Snapshot:
        requests.append((repository, revision, where))
        return Snapshot(repository, "1" * 40, source.parent / f"v1.5-{TOWER}", {}, "no network here")

    monkeypatch.setattr(hub_module, "find_snapshot", find)
    folder = copy_checkpoint(source, tmp_path / "alone", put("", "mm_vision_tower", "someone/her-clip"))
    assert open_checkpoint(str(folder)).config.vision.num_layers == 3
    assert set(requests) == {("someone/her-clip", None, f"{folder / 'config.json'}: mm_vision_tower someone/her-clip")}


def test_checkpoint_and_tower_on_the_hub_are_downloaded_after_the_checks(
    hub: Hub, make_original: MakeOriginal, absent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run reads the headers of the torch files of both."""
    monkeypatch.setattr(hub_module, "find_snapshot", find_snapshot)
    source = make_original("v1.5")
    folder = copy_checkpoint(source, absent.parents[1] / "alone", put("", "mm_vision_tower", "someone/her-clip"))
    hub.add_folder("someone/llava", folder)
    hub.add_folder("someone/her-clip", source.parent / f"v1.5-{TOWER}", commit="4" * 40)
    weights = sum(path.stat().st_size for part in (folder, source.parent / f"v1.5-{TOWER}") for path in part.glob("*.bin"))
    result = export_onnx("someone/llava", absent, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert [part["repository"] for part in json.loads(result.stdout)["hub"]] == ["someone/llava", "someone/her-clip"]
    assert json.loads(result.stdout)["download_bytes"] == weights
    headers = hub.served_weights()
    opened = fetch_weights(open_checkpoint("someone/llava"), Reporter(quiet=True))
    assert hub.served_weights() == weights + 2 * headers
    local = open_checkpoint(str(copy_with_tower(source, absent.parents[1])))
    for name in local.source:
        np.testing.assert_array_equal(opened.source.load(name), local.source.load(name))
    origin = describe_origin(opened)
    assert (origin["commit"], origin["tower"]["commit"]) == ("1" * 40, "4" * 40)
    assert sum(file["bytes"] for part in (origin, origin["tower"]) for file in part["weights"]) == weights


# What is refused


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.pop("mm_vision_tower"), ["names no mm_vision_tower", "such as openai/clip-vit-large-patch14-336"]),
        (put("", "mm_vision_tower", None), ["names no mm_vision_tower"]),
        (put("", "mm_vision_tower", 7), ["names no mm_vision_tower"]),
        (put("", "mm_vision_tower", "./no/such"), ["mm_vision_tower ./no/such: no such folder"]),
        (put("", "mm_projector_type", "mlp3x_gelu"), ['mm_projector_type is "mlp3x_gelu"', "linear, mlp2x_gelu"]),
        (put("", "mm_projector_type", ["linear"]), ['mm_projector_type is ["linear"]', "linear, mlp2x_gelu"]),
        (put("", "mm_projector_type", None), ["mm_projector_type is linear, but the weights have a second", "mlp2x_gelu"]),
        (put("", "mm_vision_select_feature", "cls"), ['mm_vision_select_feature is "cls"', "patch, cls_patch"]),
        (put("", "mm_vision_select_layer", -9), ["vision_feature_layer is -9", "layer of the tower"]),
        (put("", "image_aspect_ratio", "stretch"), ['image_aspect_ratio is "stretch"', "square, pad, anyres"]),
        (put("", "image_aspect_ratio", "anyres"), ["mm_patch_merge_type is null", "spatial_unpad"]),
        (put("", "model_type", "llava_mpt"), ['model_type is "llava_mpt"', "llava, llava_llama, llava_mistral"]),
        (put("", "vocab_size", 500), ["has 480 rows", "vocab_size 500", "do not belong together"]),
        (put("", "vocab_size", "many"), ['vocab_size is "many"', "whole numbers"]),
        (put("", "hidden_size", 512), ["has shape", "config.json says"]),
        (put("", "mm_use_im_start_end", True), ["mm_use_im_start_end", "<im_start> and <im_end>", "added_tokens.json"]),
        (put("", "rope_scaling", {"type": "spiral", "factor": 2.0}), ["spiral"]),
    ],
)
def test_an_unsupported_config_is_refused(
    make_original: MakeOriginal, absent: Path, tmp_path: Path, edit: Edit, words: list[str]
) -> None:
    assert_refused(export_onnx(copy_with_tower(make_original("v1.5"), tmp_path, edit), absent), *words)


@pytest.mark.parametrize(("kind", "window"), [("v1.5", None), ("v1.6-mistral", 24)])
def test_a_window_counts_only_where_the_decoder_has_one(
    make_original: MakeOriginal, tmp_path: Path, kind: str, window: int | None
) -> None:
    edit = put("", "sliding_window", 24)
    model = (
        copy_with_tower(make_original(kind), tmp_path, edit)
        if kind == "v1.5"
        else copy_checkpoint(make_original(kind), tmp_path / kind, edit)
    )
    assert open_checkpoint(str(model)).config.text.sliding_window == window


def test_every_field_of_the_decoder_is_converted(make_original: MakeOriginal) -> None:
    folder = make_original("v1.5")
    config = json.loads((folder / "config.json").read_text())
    converted = convert_config({**config, "head_dim": 32, "mlp_bias": True, "layer_types": ["a"], "dtype": "x"}, folder)
    assert converted["text_config"]["head_dim"] == 32
    assert converted["text_config"]["mlp_bias"] is True
    assert not {"layer_types", "dtype", "architectures", "mm_projector_type"} & set(converted["text_config"])


@pytest.mark.parametrize("path", ["/home/someone/models/clip-vit-large-patch14-336", "../clip-vit-large-patch14-336/"])
def test_a_known_tower_may_be_named_by_a_path(make_original: MakeOriginal, path: str) -> None:
    folder = make_original("v1.5")
    assert read_tower_config(path, folder)["image_size"] == 336
    assert known_tower(path) == "openai/clip-vit-large-patch14-336"
    assert known_tower("someone/clip-vit-large-patch14-finetuned") is None


def test_a_projector_of_two_linears_gets_no_identity(make_original: MakeOriginal, absent: Path, tmp_path: Path) -> None:
    """The identity is added only where mm_projector_type is linear."""
    folder = copy_with_tower(make_original("v1.3"), tmp_path, put("", "mm_projector_type", "mlp2x_gelu"))
    assert_refused(export_onnx(folder, absent), "lacks the tensor multi_modal_projector.linear_2.weight")


def tower(folder: Path) -> Path:
    return folder.parent / f"v1.5-{TOWER}"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "tokenizer.model").unlink(), ["holds no tokenizer.model", "add it"]),
        (lambda f: (f / "tokenizer.model").write_bytes(b"\0" * 99), ["its tokenizer cannot be loaded", "download it again"]),
        (lambda f: (f / "tokenizer.model").write_bytes(b""), ["tokenizer"]),
        (lambda f: (f / "tokenizer_config.json").write_text("["), ["tokenizer_config.json: not readable as JSON"]),
        (lambda f: (f / "added_tokens.json").write_text('{"<a>": 480, "<b>": 481}'), ["482 tokens", "vocab_size 480"]),
        (lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(), ["pytorch_model-00002-of-00002.bin", "missing"]),
        (lambda f: (tower(f) / "pytorch_model.bin").unlink(), ["small-clip", "no weights"]),
        (lambda f: (tower(f) / "config.json").write_text("{"), ["small-clip/config.json: not readable as JSON"]),
        (lambda f: edit_json(tower(f) / "config.json", model_type="siglip"), ["is a 'siglip'", "supported with CLIP"]),
        (lambda f: edit_json(tower(f) / "config.json", vision_config=None), ["has shape"]),
        (lambda f: (tower(f) / "preprocessor_config.json").unlink(), ["no preprocessor_config.json", "CLIP tower"]),
        (lambda f: shutil.rmtree(tower(f)), ["mm_vision_tower openai/v1.5-small-clip: no network here"]),
    ],
)
def test_missing_and_damaged_files_are_refused(
    make_original: MakeOriginal, absent: Path, tmp_path: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    folder = copy_with_tower(make_original("v1.5"), tmp_path)
    damage(folder)
    assert_refused(export_onnx(folder, absent), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", ["a LoRA adapter", "merge it into its base model"]),
        ("mm_projector.bin", ["a pretrained projector alone", "finetuned model"]),
    ],
)
def test_an_incomplete_model_is_refused(
    make_original: MakeOriginal, absent: Path, tmp_path: Path, name: str, words: list[str]
) -> None:
    folder = copy_with_tower(make_original("v1.5"), tmp_path)
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    (folder / name).write_text("{}")
    assert_refused(export_onnx(folder, absent), "no model weights", *words)
