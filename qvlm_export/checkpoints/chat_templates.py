"""The conversations that LLaVA's authors trained and evaluated with, and the prompt of one question in any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OWN = "own"  # the checkpoint's chat template
# What LLaVA-1.5 was trained with; for checkpoints without a chat template of their own.
FALLBACK_TEMPLATE = "USER: {images}{prompt} ASSISTANT:"
_MARK = "\u2063"  # an invisible separator, with which no template's picture begins


@dataclass(frozen=True)
class Conversation:
    """system: what comes first, with the space behind it. user, assistant: how a turn begins; end: of an answer."""

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


def chat_template(talk: Conversation, picture: str) -> str:
    """The Jinja template of a conversation; picture: the text that stands for one, line break included."""
    texts = (talk.system, talk.user, talk.assistant, talk.end, picture)
    return f"{{% set system, user, assistant, end, picture = {texts!r} %}}{_TEMPLATE}"


def chat_text(processor: Any, turns: list[dict[str, Any]]) -> str:
    """The prompt text of turns {"role", "text", "images": count}, ending where the model is to answer."""
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
            pictures = f"{processor.image_token}\n" * turn.get("images", 0)
            parts.append(FALLBACK_TEMPLATE.format(images=pictures, prompt=turn["text"]))
    return "".join(parts)


def prompt_text(processor: Any, prompt: str, pictures: int, conversation: str = OWN) -> str:
    """The whole text before the answer to one question. conversation: one of CHOICES."""
    if conversation == OWN:
        return chat_text(processor, [{"role": "user", "text": prompt, "images": pictures}])
    talk = CONVERSATIONS[conversation]
    return f"{talk.system}{talk.user}{picture_text(processor) * pictures}{prompt} {talk.assistant}"


def picture_text(processor: Any) -> str:
    """What the processor's own template writes for one picture: what it has more than a turn without one.

    Checkpoints differ in it: some have tokens around the image token, some a space behind it.
    """
    without, shown = (chat_text(processor, [{"role": "user", "text": _MARK, "images": n}]) for n in (0, 1))
    start = next(at for at, pair in enumerate(zip(without, shown, strict=False)) if pair[0] != pair[1])
    found = shown[start : start + len(shown) - len(without)]
    return found.removesuffix("\n") + "\n"  # the line break may belong to the text
