"""Chat templates: a checkpoint's own, and the conversations that LLaVA's authors trained and evaluated with.

Turns go in, the prompt text that the tokenizer gets comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OWN = "own"  # the checkpoint's chat template
# The template that LLaVA-1.5 was trained with, for checkpoints without one.
FALLBACK_TEMPLATE = "USER: {images}{prompt} ASSISTANT:"
_MARKER = "\u2063"  # an invisible separator, which no template writes first for an image


@dataclass(frozen=True)
class Conversation:
    """The fixed texts of a conversation format.

    system: the system prompt, with the space after it. user, assistant: what begins such a turn. end: what ends an answer.
    """

    system: str
    user: str
    assistant: str
    end: str = "</s>"


_POLITE = "The assistant gives helpful, detailed, and polite answers to the {who}'s questions. "
_A_CHAT = "A chat between a curious {who} and an artificial intelligence assistant. "
CONVERSATIONS = {
    "vicuna_v1": Conversation((_A_CHAT + _POLITE).format(who="user"), "USER: ", "ASSISTANT:"),
    "llava_v1": Conversation((_A_CHAT + _POLITE).format(who="human"), "USER: ", "ASSISTANT:"),
    "mistral_instruct": Conversation("", "[INST] ", "[/INST]"),
}
CHOICES = (OWN, *CONVERSATIONS)

_TEMPLATE = (
    "{{ system }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ assistant + ' ' }}{% else %}{{ user }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ picture }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ end }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ assistant }}{% endif %}"
)


def chat_template(conversation: Conversation, image_text: str) -> str:
    """Returns the Jinja chat template of a conversation. image_text: what stands for one image, line break included."""
    texts = (conversation.system, conversation.user, conversation.assistant, conversation.end, image_text)
    return f"{{% set system, user, assistant, end, picture = {texts!r} %}}{_TEMPLATE}"


def chat_text(processor: Any, turns: list[dict[str, Any]]) -> str:
    """Returns the prompt text of a conversation, up to where the model is to answer.

    turns: {"role": "user" or "assistant", "text": str, "images": number of images, 0 if missing}. The processor's chat
    template is used where it has one, else FALLBACK_TEMPLATE.
    """
    messages = [
        {
            "role": turn["role"],
            "content": [{"type": "image"}] * turn.get("images", 0) + [{"type": "text", "text": turn["text"]}],
        }
        for turn in turns
    ]
    if getattr(processor, "chat_template", None):
        text: str = processor.apply_chat_template(messages, add_generation_prompt=True)
        return text
    parts = []
    for turn in turns:
        if turn["role"] == "assistant":
            parts.append(f" {turn['text']}</s>")
        else:
            images = f"{processor.image_token}\n" * turn.get("images", 0)
            parts.append(FALLBACK_TEMPLATE.format(images=images, prompt=turn["text"]))
    return "".join(parts)


def prompt_text(processor: Any, prompt: str, num_images: int, conversation: str = OWN) -> str:
    """Returns the whole text before the answer to one question with `num_images` images. conversation: one of CHOICES."""
    if conversation == OWN:
        return chat_text(processor, [{"role": "user", "text": prompt, "images": num_images}])
    form = CONVERSATIONS[conversation]
    return f"{form.system}{form.user}{image_text(processor) * num_images}{prompt} {form.assistant}"


def image_text(processor: Any) -> str:
    """Returns what the processor's chat template writes for one image, ending with a line break.

    Checkpoints differ in it: some have tokens around the image token, some a space after it. It is therefore found by
    comparing a turn with one image to the same turn without.
    """
    without, with_image = (chat_text(processor, [{"role": "user", "text": _MARKER, "images": n}]) for n in (0, 1))
    start = next(at for at, pair in enumerate(zip(without, with_image, strict=False)) if pair[0] != pair[1])
    difference = with_image[start : start + len(with_image) - len(without)]
    return difference.removesuffix("\n") + "\n"  # some templates write the line break with the text instead
