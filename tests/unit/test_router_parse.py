"""Bodies of many parts: refused before they become objects, and what is wrong is told without decoding all again."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX
from elasticmoe.services.router.api.parse import LARGE_BYTES, parse
from elasticmoe.services.router.api.parts import CONTAINERS_MAX, PIECE_BYTES, STRINGS_MAX, BodyParts
from elasticmoe.services.router.api.schemas import ChatRequest, CompletionRequest

CHAT, COMPLETION = msgspec.json.Decoder(ChatRequest), msgspec.json.Decoder(CompletionRequest)
BODY_BYTES = 8 * 1024 * 1024


def filled(before: bytes, part: bytes, after: bytes, count: int | None = None) -> bytes:
    """A body with `part` as often as 8 MiB hold."""
    count = count or (BODY_BYTES - len(before) - len(after)) // (len(part) + 1)
    return before + b",".join([part] * count) + after


def counted(decoder: Any, raw: bytes, *, tokens_max: int = PROMPT_TOKENS_MAX, size: int = PIECE_BYTES) -> Any:
    """As the router takes a large body."""
    parts = BodyParts(tokens_max)
    for start in range(0, len(raw), size):
        parts.count(raw[start : start + size])
    return parse(decoder, raw)


MANY = {
    "lists": (COMPLETION, filled(b'{"prompt":[', b"[1]", b"]}")),
    "empty lists": (COMPLETION, filled(b'{"prompt":[', b"[]", b"]}")),
    "texts": (COMPLETION, filled(b'{"prompt":[', b'"a"', b"]}")),
    "numbers": (COMPLETION, filled(b'{"prompt":[', b"1", b"]}")),
    "names": (COMPLETION, filled(b'{"prompt":"x",', b'"a":1', b"}")),
    "biases": (COMPLETION, filled(b'{"prompt":"x","logit_bias":{', b'"1":1', b"}}")),
    "stops": (COMPLETION, filled(b'{"prompt":"x","stop":[', b'"a"', b"]}")),
    "depth": (COMPLETION, b'{"prompt":"x","unknown":' + b"[" * BODY_BYTES),
    "escaped texts": (COMPLETION, filled(b'{"prompt":[', b'"\\\\\\"\\\\"', b"]}")),
    "messages": (CHAT, filled(b'{"messages":[', b'{"role":"user"}', b"]}")),
    "parts": (CHAT, filled(b'{"messages":[{"role":"user","content":[', b'{"type":"t"}', b"]}]}")),
    "tools": (CHAT, filled(b'{"messages":[{"role":"user","content":""}],"tools":[', b"{}", b"]}")),
}


@pytest.mark.parametrize("name", MANY)
def test_a_body_of_too_many_parts_is_refused_before_it_becomes_objects(name: str) -> None:
    decoder, raw = MANY[name]
    begun = time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        counted(decoder, raw)
    assert caught.value.code == "body_too_complex"
    assert "the limit is" in caught.value.message
    # Decoding the first of them takes 2.5 s and 400 MB.
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    "text",
    ["{[,]}, " * 300_000, '"a", ' * 400_000, "\\" * 500_000, '\\"{[,' * 300_000, "é" * 200_000],
    ids=["brackets", "quotes", "backslashes", "all", "letters"],
)
def test_a_text_may_have_any_characters(text: str) -> None:
    for raw in (json.dumps({"prompt": text, "stop": ["\\", '"']}).encode(), msgspec.json.encode({"prompt": text})):
        assert counted(COMPLETION, raw).prompt == text


def test_what_fits_is_decoded() -> None:
    assert counted(COMPLETION, filled(b'{"prompt":[', b"1", b"]}", 1_048_576)).prompt == [1] * 1_048_576
    assert len(counted(COMPLETION, filled(b'{"prompt":[', b'"a"', b"]}", STRINGS_MAX - 1)).prompt) == STRINGS_MAX - 1
    assert (
        len(counted(COMPLETION, filled(b'{"prompt":[', b"[1]", b"]}", CONTAINERS_MAX - 2)).prompt) == CONTAINERS_MAX - 2
    )
    with pytest.raises(InvalidRequest, match=f"{CONTAINERS_MAX + 1} arrays and objects or more; the limit"):
        counted(COMPLETION, filled(b'{"prompt":[', b"[1]", b"]}", CONTAINERS_MAX - 1))
    with pytest.raises(InvalidRequest, match="values or more; the limit is 263144"):
        counted(COMPLETION, filled(b'{"prompt":[', b"1", b"]}", 300_000), tokens_max=1_000)


@given(
    st.recursive(
        st.text(st.sampled_from('a\\"[{,}]é')) | st.integers() | st.none(),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('k\\",')), inner, max_size=4)
        ),
        max_leaves=30,
    ),
    st.booleans(),
    st.integers(1, 64),
)
def test_parts_are_counted_as_they_are(value: Any, is_ascii: bool, size: int) -> None:
    """What is counted outside of texts is what the document has, wherever it is cut."""

    def count(value: Any) -> tuple[int, int]:
        if isinstance(value, dict):
            inner = [count(item) for item in value.values()]
            return 1 + sum(found[0] for found in inner), len(value) + sum(found[1] for found in inner)
        if isinstance(value, list):
            inner = [count(item) for item in value]
            return 1 + sum(found[0] for found in inner), sum(found[1] for found in inner)
        return 0, isinstance(value, str)

    raw = json.dumps(value, ensure_ascii=is_ascii).encode()
    parts = BodyParts(1_000)
    for start in range(0, len(raw), size):
        parts.count(raw[start : start + size])
    assert (parts._num_containers, parts._num_quotes // 2) == count(value)


LONG_USER = "user: has to be a text of at most 512 characters; it is a text of 600 characters"
LARGE = {"unknown": "x" * LARGE_BYTES}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": "x", "n": 999, **LARGE}, "n: has to be a whole number of at most 128; it is 999"),
        ({"prompt": "x", **LARGE, "temperature": -3}, "temperature: has to be a number of at least 0; it is -3"),
        ({"prompt": "x", "stop": ["a", ""], **LARGE}, "stop[1]: has to be a text of at least 1 character; it is empty"),
        (
            {"prompt": "x", "user": "u" * 600, **LARGE},
            LONG_USER,
        ),
        ({"prompt": [97] * 40_000 + [1.5]}, "prompt[40000]: has to be a whole number"),  # too long to look it up
        ({"prompt": "x", "user": "u" * 100_000}, "user: has to be a text of at most 512 characters"),
    ],
)
def test_the_value_is_told_of_large_bodies_too(body: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(COMPLETION, json.dumps(body).encode())
    assert caught.value.message == told


def test_telling_what_is_wrong_costs_no_more_than_having_it_right() -> None:
    rng = random.Random(5)
    tokens = [rng.randrange(1_000_000) for _ in range(1_000_000)]

    def cost(n: int) -> float:
        raw = msgspec.json.encode({"prompt": tokens, "n": n})
        times = []
        for _ in range(5):
            begun = time.process_time()
            with suppress(InvalidRequest):
                parse(COMPLETION, raw)
            times.append(time.process_time() - begun)
        return min(times)

    assert cost(999) < 1.5 * cost(1) + 0.02  # it was decoded twice
