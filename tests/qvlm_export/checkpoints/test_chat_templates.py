"""Prompt text in the checkpoint's own chat template and in named conversations, with the text that stands for an image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qvlm_export.checkpoints.chat_templates import CHOICES, CONVERSATIONS, chat_template, image_text, prompt_text
from qvlm_export.checkpoints.files.hub import find_checkpoint
from qvlm_export.inputs.samples import load_processor

HUMAN = "A chat between a curious human and an artificial intelligence assistant. "
USER = "A chat between a curious user and an artificial intelligence assistant. "
POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions. "


@pytest.fixture(scope="module")
def tiny():
    return load_processor(find_checkpoint("tiny").folder)


def with_template(tiny, template):
    """A processor with another chat template."""

    def apply(messages, add_generation_prompt):
        return tiny.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    return SimpleNamespace(chat_template=template, apply_chat_template=apply, image_token="<image>")


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ("own", "USER: <image>\nWhat? ASSISTANT:"),
        ("vicuna_v1", USER + POLITE.format("user") + "USER: <image>\nWhat? ASSISTANT:"),
        ("llava_v1", HUMAN + POLITE.format("human") + "USER: <image>\nWhat? ASSISTANT:"),
        ("mistral_instruct", "[INST] <image>\nWhat? [/INST]"),
    ],
)
def test_prompt_text_of_every_conversation(tiny, conversation, expected):
    assert prompt_text(tiny, "What?", 1, conversation) == expected
    assert prompt_text(tiny, "What?", 0, conversation) == expected.replace("<image>\n", "")
    assert conversation in CHOICES


ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<image>{% endif %}"
    "{% endfor %}{% for c in m.content %}{% if c.type == 'text' %}{{ '\n' + c.text }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (chat_template(CONVERSATIONS["llava_v1"], "<image>\n"), "<image>\n"),
        (chat_template(CONVERSATIONS["vicuna_v1"], "<image> \n"), "<image> \n"),
        (chat_template(CONVERSATIONS["llava_v1"], "<im_start><image><im_end>\n"), "<im_start><image><im_end>\n"),
        (ONEVISION, "<image>\n"),
        (None, "<image>\n"),
    ],
)
def test_image_text_is_that_of_the_chat_template(tiny, template, expected):
    """Tokens around the image token, and the space that stands for Llama's, are in every conversation exactly once."""
    processor = with_template(tiny, template)
    assert image_text(processor) == expected
    assert prompt_text(processor, "A?", 2, "mistral_instruct") == f"[INST] {expected}{expected}A? [/INST]"


def test_a_named_conversation_equals_the_template_made_of_it(tiny):
    for name in CONVERSATIONS:
        processor = with_template(tiny, chat_template(CONVERSATIONS[name], "<image> \n"))
        for count in (0, 1, 2):
            assert prompt_text(processor, "A?", count) == prompt_text(processor, "A?", count, name)
