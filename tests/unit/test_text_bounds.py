"""Characters bounded by the context: a text that fits is never refused, and one that cannot fit is not tokenized."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from elasticmoe.cli.models.byte_tokenizer import _byte_chars, build_byte_tokenizer
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.text.bounds import CharBound, measure

WORDS = ["hello", "Ġhello", "ĠĠĠĠĠĠĠĠ", "<0x", "a" * 40]


def bpe(vocab: list[str], **options: Any) -> Tokenizer:
    """A BPE tokenizer whose longer entries can all be reached by merges of their beginnings."""
    entries, merges = list(dict.fromkeys(vocab)), []
    for word in WORDS:
        for length in range(2, len(word) + 1):
            if all(char in vocab for char in word):
                merges.append((word[: length - 1], word[length - 1]))
                entries.append(word[:length])
    entries = list(dict.fromkeys(entries))
    ids = {entry: index for index, entry in enumerate(entries)}
    return Tokenizer(models.BPE(vocab=ids, merges=list(dict.fromkeys(merges)), **options))


def byte_level(*, without: str = "", normalizer: Any = None, regex: bool = True) -> Tokenizer:
    tokenizer = bpe([char for char in _byte_chars() if char not in without])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def pieces(*, fuse: bool = True, num_bytes: int = 256, unk: str | None = "<unk>") -> Tokenizer:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(num_bytes)), *"▁helowrdx"]
    tokenizer = bpe(words, unk_token=unk, fuse_unk=fuse, byte_fallback=num_bytes > 0)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def with_added(tokenizer: Tokenizer, **flags: bool) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<mask>", **flags), AddedToken("<|a rather long added token|>", special=True)])
    return tokenizer


CONTROLS = "".join(_byte_chars()[byte] for byte in (0x04, 0x1D, 0x7F))  # as SmolLM2's vocabulary lacks some
FIRST_BYTES = "".join(_byte_chars()[byte] for byte in (0xC0, 0xF1, 0xF2, 0xFF))
BOUNDED = {
    "bytes": byte_level(),
    "bytes-without-regex": byte_level(regex=False),
    "bytes-of-smollm2": byte_level(without=CONTROLS + FIRST_BYTES),
    "nfc": byte_level(normalizer=normalizers.NFC()),
    "nfkc": byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "shorter": byte_level(normalizer=normalizers.Replace("hello", "he")),
    "strip": byte_level(normalizer=normalizers.Strip()),
    "pieces": pieces(),
    "unknown": pieces(fuse=False, num_bytes=0),
    "added": with_added(byte_level()),
    "added-strip": with_added(byte_level(), lstrip=True),
    "added-strip-right": with_added(pieces(), rstrip=True, normalized=True),
    "oracle": build_byte_tokenizer(),
}
UNBOUNDED = {
    "unknown-fused": pieces(num_bytes=0),
    "unknown-dropped": pieces(num_bytes=0, unk=None),
    "bytes-missing": pieces(num_bytes=200, unk=None),
    "no-continuation-byte": byte_level(without=_byte_chars()[0x85]),
    "no-letter": byte_level(without="e"),
    "accents": byte_level(normalizer=normalizers.StripAccents()),
    "control-again": byte_level(without=CONTROLS, normalizer=normalizers.Replace("e", "\x04")),
    "deleted": byte_level(normalizer=normalizers.Replace("e", "")),
    "words": Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    "unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
}
LONG = "\u1f82\u03b1\u0313\u0300\u0345"  # the second is the first, decomposed: four characters that compose to one


def texts(rng: random.Random) -> list[str]:
    """What makes few tokens of many characters."""
    parts = [
        "hello",
        " hello",
        " " * 8,
        "a" * 40,
        "<mask>",
        "<|a rather long added token|>",
        "\n\t ",
        "\x04",
        "\x1d\x7f",
    ]
    parts += [LONG[1:], "e\u0301", "\U000f0000\U00040000", "é", "漢", "\u3000", "\x85", "\uac00\u11a8", "ﬁ①", "x", "İ"]
    found = [part * 50 for part in parts]
    return found + ["".join(rng.choices(parts, k=rng.randint(1, 60))) * rng.choice([1, 1, 9]) for _ in range(150)]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_text_that_fits_is_never_refused(name: str) -> None:
    tokenizer, rng = BOUNDED[name], random.Random(5)
    bound = measure(tokenizer)
    assert bound is not None
    for text in texts(rng):
        bound.check(text, len(tokenizer.encode(text, add_special_tokens=False).ids))


@pytest.mark.parametrize("name", BOUNDED)
def test_a_text_that_cannot_fit_is_refused(name: str) -> None:
    bound = measure(BOUNDED[name])
    assert bound is not None
    most = 10 * bound.per_token
    bound.check("x" * most, 10)
    bound.check("x" * most + bound.free * 100 + " " * 100 * bound.ignores_spaces, 10)
    with pytest.raises(InvalidRequest, match="maximum context length is 10 tokens") as caught:
        bound.check("x" * (most + 1), 10)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("name", UNBOUNDED)
def test_tokenizers_without_a_bound(name: str) -> None:
    assert measure(UNBOUNDED[name]) is None


@pytest.mark.parametrize("name", ["unknown-fused", "unknown-dropped", "accents", "deleted", "words", "unigram"])
def test_they_have_none_indeed(name: str) -> None:
    """Any number of characters may become one token or none, so that a bound would refuse what fits."""
    text = {"accents": "\u0301" * 5_000}.get(name, "e" * 5_000 if name == "deleted" else "漢" * 5_000)
    assert len(UNBOUNDED[name].encode(text).ids) <= 2


def test_what_is_measured() -> None:
    assert measure(BOUNDED["bytes"]) == CharBound(40, "", False)
    assert measure(BOUNDED["bytes-of-smollm2"]) == CharBound(40, "\x04\x1d\x7f", False)
    assert measure(BOUNDED["nfc"]) == CharBound(160, "", False)
    assert measure(BOUNDED["shorter"]) == CharBound(120, "", False)
    assert measure(BOUNDED["strip"]) == CharBound(40, "", True)
    assert measure(BOUNDED["added-strip"]) == CharBound(40, "", True)
    split = byte_level()
    split.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), split.pre_tokenizer])
    assert measure(split) is None
    digits = byte_level()
    digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), split.pre_tokenizer[1]])
    assert measure(digits) == CharBound(40, "", False)


def test_no_character_decomposes_into_more_than_four() -> None:
    """What NFC may make one, by Unicode's own tables."""
    import unicodedata

    most = max(
        len(unicodedata.normalize("NFD", chr(point))) for point in range(0x110000) if not 0xD800 <= point < 0xE000
    )
    assert most == 4
    assert json.loads(normalizers.NFC().__getstate__()) == {"type": "NFC"}


def test_a_refusal_is_cheap() -> None:
    bound = CharBound(1, "\x04", True)
    text = "x y" * 1_000_000
    began = time.thread_time()
    with pytest.raises(InvalidRequest):
        bound.check(text, 1_000)
    assert time.thread_time() - began < 1.0
