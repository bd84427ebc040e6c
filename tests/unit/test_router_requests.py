"""Requests before they reach a rank: whatever the body, it is a valid request or a refusal that names its reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.http.errors import error_response
from elasticmoe.common.protocol.errors import ElasticMoEError, InvalidRequest
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.services.router.api.options import options_of
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.schemas import ChatRequest, CompletionRequest
from elasticmoe.services.router.text.tokenizer import ServedModel

CHAT, COMPLETION = msgspec.json.Decoder(ChatRequest), msgspec.json.Decoder(CompletionRequest)
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, "unknown"})
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.integers(-2, 300)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["text", "user", "none", "97"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
def test_any_body_is_valid_or_refused(model: ServedModel, body: dict[str, Any]) -> None:
    for decoder, base in ((COMPLETION, {"prompt": "x"}), (CHAT, {"messages": [{"role": "user", "content": "x"}]})):
        raw = msgspec.json.encode({**base, **body})
        try:
            request = parse(decoder, raw)
            options = options_of(request, model, max_tokens=request.max_tokens, logprobs=-1)
        except InvalidRequest:
            continue
        for choice in range(options.num_choices):
            submit = Submit("r", (1,), 1, options.sampling_of(choice), options.stop_token_ids, options.min_tokens)
            wire = msgspec.msgpack.decode(msgspec.msgpack.encode(submit), type=Submit)  # the rank's own bounds hold
            assert wire == submit


@given(st.binary(max_size=60))
def test_any_bytes(raw: bytes) -> None:
    try:
        request = parse(COMPLETION, raw)
    except InvalidRequest:
        return
    assert request.prompt == msgspec.json.decode(raw)["prompt"]  # bytes may happen to be a request


LONG_USER = "user: has to be a text of at most 512 characters; it is a text of 600 characters"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"prompt":"x","n":129}', "n: has to be a whole number of at most 128; it is 129"),
        (b'{"prompt":"x","n":4.5}', "n: has to be a whole number; it is 4.5"),
        (b'{"prompt":[97,98.5]}', "prompt[1]: has to be a whole number; it is 98.5"),
        (b'{"prompt":"x","temperature":-1.5}', "temperature: has to be a number of at least 0; it is -1.5"),
        (b'{"prompt":"x","stop":["a",""]}', "stop[1]: has to be a text of at least 1 character; it is empty"),
        (
            b'{"prompt":"x","user":"' + b"u" * 600 + b'"}',
            LONG_USER,
        ),
        (b'{"prompt":"x","n":true}', "n: has to be a whole number; it is true"),
        (b'{"prompt":"x","stream":"yes"}', 'stream: has to be true or false; it is "yes"'),
    ],
)
def test_refusals_give_limit_and_value(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(COMPLETION, raw)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("code", "retryable", "status", "told"),
    [
        ("queue_full", True, 429, "text"),
        ("rank_lost", True, 503, "text"),
        ("anything_new", True, 503, "text"),
        ("anything_new", False, 500, "internal error"),
        ("device_error", False, 500, "internal error"),
        ("context_length_exceeded", False, 400, "text"),
        ("request_failed", False, 500, "text"),
        ("bad_logits", False, 500, "text"),
    ],
)
def test_what_ranks_say_becomes_a_status(code: str, retryable: bool, status: int, told: str) -> None:
    response = error_response(ElasticMoEError("text", code=code, retryable=retryable))
    assert response.status_code == status
    error = msgspec.json.decode(response.body)["error"]
    assert (error["message"], error["code"]) == (told, code if told == "text" else "internal_error")
    assert ("retry-after" in response.headers) == (status in (429, 503))
