"""Streamed text: whatever the tokens and however the answer ends, the pieces join to the decoded tokens before a stop."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qvlm_export.inference.answer import AnswerText, cut_at_stop, partial_stop_length

SPECIAL, ADDED = "</s>", "<|end|>"
WORDS = ("▁the", "▁", "END", "▁caf", "\u00e9", "\u4f60", "\ufffd", "a", "E", "N", "D", "!")


@cache
def llama_like() -> PreTrainedTokenizerFast:
    """Words, and bytes where there is no word, which are decoded as runs; text begins without its first space."""
    names = [SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrap(tokenizer)


@cache
def qwen_like() -> PreTrainedTokenizerFast:
    """Tokens are bytes in any number, so that a token may end within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [alphabet[a] + alphabet[b] for a, b in ((-1, 5), (130, 140), (60, 61), (100, 180))]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate([SPECIAL, *alphabet, *pairs])}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)
    wrapped.add_tokens([ADDED])
    return wrapped


def decode(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).lstrip()


def stream(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str]) -> tuple[list[str], int]:
    """The pieces, and how many tokens were taken."""
    answer, pieces, taken = AnswerText(tokenizer, stop), [], 0
    for token in tokens:
        pieces.append(answer.add(token))
        taken += 1
        if answer.stopped:
            break
    pieces.append(answer.rest())
    assert answer.rest() == ""
    assert "".join(pieces) == answer.text
    return pieces, taken


TEXT = "the café 你好 \U0001f600\U0001f600 END\ufffd"
STOPS = st.lists(
    st.sampled_from(["END", "END\ufffd", "ND", "\ufffd", "e\u0301", "\u4f60", "a!", " ", ADDED, "\U0001f600"]), max_size=3
)


def check(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str]) -> None:
    pieces, taken = stream(tokenizer, tokens, stop)
    expected, stopped = cut_at_stop(decode(tokenizer, tokens[:taken]), stop)
    assert "".join(pieces) == expected
    assert not cut_at_stop(decode(tokenizer, tokens[: taken - 1]), stop)[1]  # no token more than necessary
    assert stopped or taken == len(tokens)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.integers(0, 260 + len(WORDS)), max_size=14), STOPS)
@example([*range(0xE4, 0xE5), 1 + 0xBD, 1 + 0xA0, 1 + 0xE5], [])
def test_pieces_join_to_the_decoded_tokens(tokens: list[int], stop: list[str]) -> None:
    for tokenizer in (llama_like(), qwen_like()):
        check(tokenizer, [token % len(tokenizer) for token in tokens], stop)


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from(TEXT), max_size=8), st.integers(0, 3), STOPS)
def test_pieces_of_texts_that_are_cut_anywhere_join_to_the_answer(text: str, cut: int, stop: list[str]) -> None:
    names = dict(enumerate(f"<0x{byte:02X}>" for byte in range(256)))
    tokens = [llama_like().convert_tokens_to_ids(names[byte]) for byte in text.encode()]
    check(llama_like(), tokens[: max(0, len(tokens) - cut)], stop)
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    tokens = [qwen_like().convert_tokens_to_ids(symbol) for word, _ in symbols for symbol in word]
    check(qwen_like(), tokens[: max(0, len(tokens) - cut)], stop)


def byte_tokens(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([*byte_tokens("a"), 1 + 0xE4], [], ["", "", "\ufffd\ufffd"]),  # cut off within a character
        ([257 + WORDS.index("\ufffd"), 257 + WORDS.index("END")], ["END"], ["", "\ufffd", ""]),  # a real U+FFFD, then a stop
        ([257 + WORDS.index("\ufffd")], [], ["", "\ufffd"]),
        ([*byte_tokens("你"), 257 + WORDS.index("!")], [], ["", "", "", "你!", ""]),
        ([257 + WORDS.index(name) for name in ("a", "E", "N", "!")], ["END"], ["a", "", "", "EN!", ""]),
        ([257 + WORDS.index("a"), 0, 257 + WORDS.index("!")], [], ["a", "", "!", ""]),  # a special token is no text
        ([257 + WORDS.index("▁"), 257 + WORDS.index("a")], [], ["", "a", ""]),
    ],
)
def test_what_may_change_is_held_back_and_given_at_the_end(tokens: list[int], stop: list[str], expected: list[str]) -> None:
    assert stream(llama_like(), tokens, stop)[0] == expected


def test_text_is_cut_at_stop_strings_and_held_back_for_their_beginnings() -> None:
    assert partial_stop_length("an answer EN", ("END",)) == 2
    assert partial_stop_length("an answer", ("END",)) == 0
    assert cut_at_stop("a END b", ("END", "b")) == ("a ", True)
    assert cut_at_stop("a", ()) == ("a", False)


def test_a_token_beyond_the_tokenizer_is_no_text() -> None:
    """Some models have more rows in their head than their tokenizer has tokens."""
    answer = AnswerText(qwen_like())
    assert answer.add(10**6) + answer.rest() == ""
