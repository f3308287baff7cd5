"""Definition of the tiny LLaVA: configuration, tokenizer, processor and chat template.

It has the structure of LLaVA 1.5 at a small size: a CLIP tower with class token, pre-layernorm and quick_gelu, features from
layer -2, a two-layer GELU projector, and a Llama decoder, here with grouped-query attention. Widths are multiples of 128, so
that INT4 groups of 128 divide them.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tools.tiny import scenes

IMAGE_SIZE, PATCH_SIZE = 48, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
MAX_POSITIONS = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% else %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_tokenizer(num_scenes: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that is trained on the training split; it can encode any text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(num_scenes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def _corpus(num_scenes: int) -> list[str]:
    """Questions with answers of the first scenes of the training split, in random order."""
    lines = []
    for index in range(num_scenes):
        _, questions = scenes.questions("train", index)
        lines += [f"USER: \n{q.text} ASSISTANT: {q.answer}" for q in questions]
    random.Random(0).shuffle(lines)
    return lines


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The LLaVA processor: CLIP preprocessing at 48x48 pixels and one `<image>` token per patch."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The configuration, with 0.8 M parameters in the tower and 3 M in the decoder."""
    vocab_size = -(-len(tokenizer) // 128) * 128
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2,
            image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=MAX_POSITIONS,
            bos_token_id=1, eos_token_id=2, pad_token_id=3, rms_norm_eps=1e-5, tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        projector_hidden_act="gelu",
    )  # fmt: skip
