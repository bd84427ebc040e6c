"""4.0 is 4, everywhere where a number has to be whole; 4.5, "4", true and what no float holds are not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api import schemas
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.whole import to_integers, whole

KINDS = [schemas.ChatRequest, schemas.CompletionRequest, schemas.DetokenizeRequest]
BASES: dict[type, dict[str, Any]] = {
    schemas.ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
    schemas.CompletionRequest: {"prompt": "x"},
    schemas.DetokenizeRequest: {"tokens": [1]},
}
FIELDS = [(kind, name) for kind in KINDS for name in kind.__struct_fields__]


def read(kind: type, **body: Any) -> Any:
    return parse(msgspec.json.Decoder(kind), msgspec.json.encode(BASES[kind] | body))


def takes(kind: type, name: str, value: object) -> bool:
    try:
        read(kind, **{name: value})
    except InvalidRequest:
        return False
    return not isinstance(getattr(read(kind, **{name: value}), name), msgspec.Raw)  # Raw: refused later


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_whatever_takes_a_whole_number_takes_a_whole_float_as_the_same(kind: type, name: str) -> None:
    if takes(kind, name, 2) and not takes(kind, name, 0.5):
        found = getattr(read(kind, **{name: 2.0}), name)
        assert (type(found), found) == (int, 2)
        for value in (2.5, True, "2", 1e300):
            assert not takes(kind, name, value), value
    if takes(kind, name, [2]) and not takes(kind, name, [0.5]):
        found = getattr(read(kind, **{name: [1, 2.0, 3]}), name)
        assert ([type(item) for item in found], found) == ([int] * 3, [1, 2, 3])
        assert not takes(kind, name, [True])
    if takes(kind, name, [[2]]) and not takes(kind, name, [["a"]]):
        found = getattr(read(kind, **{name: [[1, 2.0], [3.0]]}), name)
        assert found == [[1, 2], [3]]
        assert {type(item) for items in found for item in items} == {int}
        assert not takes(kind, name, [[2, 2.5]])


def test_these_are_all_of_them() -> None:
    found = {name for kind, name in FIELDS if takes(kind, name, 2) and not takes(kind, name, 0.5)}
    assert found == {
        "best_of",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "min_tokens",
        "n",
        "priority",
        "seed",
        "top_k",
        "top_logprobs",
    }
    lists = {name for kind, name in FIELDS if takes(kind, name, [2])}
    assert lists == {"prompt", "stop_token_ids", "tokens", "functions"}


def test_floats_stay_floats_where_they_are_meant() -> None:
    request = read(schemas.CompletionRequest, temperature=1.0, logit_bias={"1": 2.0})
    assert isinstance(request.temperature, float)
    assert isinstance(request.logit_bias[1], float)


@pytest.mark.parametrize("most", [(1 << 53) + 1, (1 << 62) + 1, 10, 0, -((1 << 53) + 1)])
def test_bounds_that_no_float_holds_are_kept(most: int) -> None:
    decoder = msgspec.json.Decoder(msgspec.defstruct("Number", [("value", whole(-(1 << 63), most))]))
    for candidate in (most, most + 1, most - 1, most + 5_000, most - 5_000):
        raw = b'{"value":%b}' % repr(float(candidate)).encode()
        try:
            found = to_integers(decoder.decode(raw)).value
        except msgspec.ValidationError:
            assert int(float(candidate)) > most
        else:
            assert type(found) is int
            assert found <= most


@pytest.mark.parametrize("raw", [b'{"prompt":"x","n":1e400}', b'{"prompt":"x","n":NaN}', b'{"prompt":[1e400]}'])
def test_what_is_no_number_at_all(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(msgspec.json.Decoder(schemas.CompletionRequest), raw)


def test_exponents_are_numbers_too() -> None:
    assert read(schemas.CompletionRequest).n is None
    assert parse(msgspec.json.Decoder(schemas.CompletionRequest), b'{"prompt":"x","n":1e1}').n == 10
