"""Text from tokens: whole characters, nothing of a stop string, and equal to the tokenizer's own decode."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from elasticmoe.cli.models.byte_tokenizer import VOCAB_SIZE, build_byte_tokenizer
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.router.text.detokenizer import TextStream, TokenTable

BYTES = TokenTable(build_byte_tokenizer())


def byte_fallback() -> Tokenizer:
    """A tokenizer of the sentencepiece kind, as Mixtral's."""
    words = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁Hello",
        "▁world",
        "lo",
        "▁",
        "é",
        "<0x",
        "a▁b",
    ]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def run(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.feed(token_id) for token_id in ids), stream.finish()]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60), st.booleans())
def test_any_tokens_decode_as_the_tokenizer_does(ids: list[int], skip: bool) -> None:
    parts = run(TextStream(BYTES, skip_special=skip), ids)
    assert "".join(parts) == build_byte_tokenizer().decode(ids, skip_special_tokens=skip)


def test_byte_fallback() -> None:
    tokenizer = byte_fallback()
    table = TokenTable(tokenizer)
    hello, world = (tokenizer.token_to_id(word) for word in ("▁Hello", "▁world"))
    emoji = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🌍é".encode()]
    ids = [hello, world, *emoji, tokenizer.token_to_id("<0x"), tokenizer.token_to_id("a▁b")]
    assert run(TextStream(table), ids)[:6] == [" Hello", " world", "", "", "", "🌍"]
    assert "".join(run(TextStream(table), ids)).lstrip() == tokenizer.decode(ids)
    rng = random.Random(3)
    valid = [2 + byte for byte in b"abc"] + [hello, world, 262, 263]
    for _ in range(100):
        ids = [rng.choice(valid) for _ in range(20)]
        assert "".join(run(TextStream(table), ids)).removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")


def test_other_decoders_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))
    with pytest.raises(ConfigError, match="decoder none"):
        TokenTable(tokenizer)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="decoder WordPiece"):
        TokenTable(tokenizer)


@given(st.text(max_size=30))
def test_no_part_has_half_a_character(text: str) -> None:
    parts = run(TextStream(BYTES), list(text.encode()))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_a_character_that_stays_incomplete() -> None:
    assert run(TextStream(BYTES), list("€".encode()[:2])) == ["", "", "\ufffd"]
    assert run(TextStream(BYTES), [0xE2, 65]) == ["", "\ufffdA", ""]
    assert run(TextStream(BYTES), [0xFF] * 3) == ["\ufffd"] * 3 + [""]


def test_tokens_that_the_tokenizer_lacks() -> None:
    assert run(TextStream(BYTES), [100_000, 65]) == ["", "A", ""]


def test_special_tokens() -> None:
    assert run(TextStream(BYTES), [65, 257, 66]) == ["A", "", "B", ""]
    assert run(TextStream(BYTES, skip_special=False), [65, 257]) == ["A", "<|eos|>", ""]


def stopped(text: str, *stops: str, min_tokens: int = 0) -> tuple[str, int]:
    """What gets out, and after how many tokens it stopped (-1: never)."""
    stream = TextStream(BYTES, stops=stops, min_tokens=min_tokens)
    out = ""
    for count, byte in enumerate(text.encode(), start=1):
        out += stream.feed(byte)
        assert min_tokens or not any(stop in out for stop in stops)
        if stream.has_stopped:
            return out + stream.finish(), count
    return out + stream.finish(), -1


def test_stop_strings() -> None:
    assert stopped("one STtwo STOP three", "STOP") == ("one STtwo ", 14)
    assert stopped("aaab", "aab") == ("a", 4)
    assert stopped("abababc", "ababc") == ("ab", 7)
    assert stopped("abcd", "bc", "abc") == ("", 3)  # complete at the same character: the longer one
    assert stopped("abcd", "b", "abc") == ("a", 2)
    assert stopped("no end", "end!") == ("no end", -1)
    assert stopped("ééx", "éx") == ("é", 5)
    assert stopped("xxSTOPySTOP", "STOP", min_tokens=6) == ("xxSTOPy", 11)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_against_a_plain_search(text: str, stops: list[str]) -> None:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        end = min(ends)
        longest = max(len(stop) for stop in stops if text[:end].endswith(stop))
        assert stopped(text, *stops) == (text[: end - longest], end)
    else:
        assert stopped(text, *stops) == (text, -1)


def test_many_long_stops_cost_little() -> None:
    stops = [("a" * 255) + chr(98 + index) for index in range(16)]
    stream = TextStream(BYTES, stops=stops)
    out = "".join(stream.feed(97) for _ in range(2_000)) + stream.finish()
    assert out == "a" * 2_000
