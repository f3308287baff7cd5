"""The text of an answer while its tokens come: in pieces that join to the whole answer, which ends before a stop string.

Text is given out once no later token can change it. Held back are the beginning of a stop string, a character of which some
bytes are missing, and byte tokens, such as `<0xE4>`, as tokenizers decode a run of them as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\ufffd"  # what a tokenizer gives for bytes that are no character, or none yet


class AnswerText:
    """One answer. text: all of it so far, before the stop string. stopped: whether it reached a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._complete = 0  # tokens before the run of byte tokens at the end
        self._given = 0  # characters

    def add(self, token: int) -> str:
        """Adds a token; returns the piece of the text that is certain now, which may be empty."""
        self._tokens.append(token)
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if not _BYTE_TOKEN.fullmatch(name) and token not in self._tokenizer.all_special_ids:
            self._complete = len(self._tokens)
        whole = self._decode(len(self._tokens))
        self.text, self.stopped = cut_at_stop(whole, self._stop)
        if self.stopped:
            return self.rest()
        complete = whole if self._complete == len(self._tokens) else self._decode(self._complete)
        certain = complete.rstrip(_INCOMPLETE)
        return self._give(len(certain) - partial_stop_length(certain, self._stop))

    def rest(self) -> str:
        """Returns what was held back. Called when the answer has ended, for whatever reason."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _decode(self, count: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[:count], skip_special_tokens=True)
        return text.lstrip()


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the first stop string, and whether there is one."""
    positions = [at for at in (text.find(s) for s in stop) if at >= 0]
    return (text[: min(positions)], True) if positions else (text, False)


def partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """Returns how many characters at the end of the text could be the beginning of a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
