"""The decoders' complaints in plain words: every form that they have, and every regular expression of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, inspect

from elasticmoe.common.config import CONFIGS
from elasticmoe.common.http.decode import decode
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.wording import Complaint, broken_json, counted, nearest, of_pattern, read, shown, undecodable
from elasticmoe.services.router.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from elasticmoe.services.scaler.api.requests import RebalanceBody, ScaleBody
from tests.wording import LIBRARY

BODIES = (ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, RebalanceBody, ScaleBody)


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    kind: Literal["big", "small"]
    names: list[Annotated[str, Meta(max_length=3)]] = []


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    number: Annotated[int, Meta(ge=1, le=9)] = 1
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    name: Annotated[str, Meta(min_length=1, max_length=4)] = "x"
    flag: bool = False
    inner: Inner | None = None
    many: Annotated[list[Inner], Meta(max_length=1)] = []
    table: Annotated[dict[Annotated[str, Meta(max_length=2)], int], Meta(max_length=1)] = {}
    either: int | str | None = None
    code: Annotated[str, Meta(pattern=r"^[a-z_]{1,3}$")] = "a"


CASES: list[tuple[Any, str]] = [
    ({"number": 0}, "number: has to be a whole number of at least 1; it is 0"),
    ({"number": 10}, "number: has to be a whole number of at most 9; it is 10"),
    ({"number": "1"}, 'number: has to be a whole number; it is "1"'),
    ({"number": None}, "number: has to be a whole number; it is null"),
    ({"share": 0}, "share: has to be a number above 0; it is 0"),
    ({"share": 1.5}, "share: has to be a number below 1; it is 1.5"),
    ({"name": ""}, "name: has to be a text of at least 1 character; it is empty"),
    ({"name": "x" * 5}, 'name: has to be a text of at most 4 characters; it is "xxxxx"'),
    ({"name": "x" * 50}, "name: has to be a text of at most 4 characters; it is a text of 50 characters"),
    ({"name": ["a"]}, "name: has to be a text; it is a list of 1 entry"),
    ({"flag": 1}, "flag: has to be true or false; it is 1"),
    ({"inner": {"kind": "tiny"}}, 'inner.kind: has to be one of big, small; it is "tiny"'),
    ({"inner": {}}, "inner: needs a field 'kind'"),
    (
        {"inner": {"kind": "big", "nmaes": []}},
        "inner: has no field 'nmaes'; did you mean 'names'?",
    ),
    (
        {"inner": {"kind": "big", "names": ["a", "long"]}},
        'inner.names[1]: has to be a text of at most 3 characters; it is "long"',
    ),
    ({"many": [{"kind": "big"}] * 2}, "many: has to be a list of at most 1 entry; it is a list of 2 entries"),
    ({"many": [{"kind": 1}]}, "many[0].kind: has to be a text; it is 1"),
    ({"table": {"a": 1, "b": 2}}, "table: has to be an object of at most 1 member; it is an object of 2 members"),
    ({"table": {"long": 1}}, "a name in table: has to be a text of at most 2 characters"),
    ({"table": {"a": "x"}}, "table[...]: has to be a whole number; it is a text"),
    ({"either": 1.5}, "either: has to be a whole number or a text; it is 1.5"),
    ({"code": "A"}, 'code: has to be 1 to 3 of the characters a-z _; it is "A"'),
    ({"nmuber": 1}, "the body has no field 'nmuber'; did you mean 'number'?"),
    ({"x" * 100: 1}, f"the body has no field '{'x' * 40}'"),
    ([], "the body has to be an object; it is a list"),
    ("x", "the body has to be an object; it is a text"),
]


@pytest.mark.parametrize(("body", "text"), CASES, ids=[text[:50] for _, text in CASES])
def test_every_form_of_a_complaint(body: Any, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode(msgspec.json.Decoder(Outer), json.dumps(body).encode())
    assert refused.value.message == text
    assert LIBRARY.search(text) is None


def patterns(described: inspect.Type, seen: set[int]) -> Iterator[str]:
    if id(described) in seen:
        return
    seen.add(id(described))
    if getattr(described, "pattern", None):
        yield described.pattern  # type: ignore[attr-defined]
    for name in ("type", "item_type", "key_type", "value_type"):
        if isinstance(inner := getattr(described, name, None), inspect.Type):
            yield from patterns(inner, seen)
    for inner in (*getattr(described, "types", ()), *(field.type for field in getattr(described, "fields", ()))):
        yield from patterns(inner, seen)


def test_every_regular_expression_of_ours_is_put_in_words() -> None:
    ours = {text for kind in (*CONFIGS, *BODIES) for text in patterns(inspect.type_info(kind), set())}
    assert len(ours) >= 9
    for text in ours:
        assert of_pattern(text).startswith("has to be "), text
        assert LIBRARY.search(of_pattern(text)) is None
    assert of_pattern("^unheard of$") == "is not of the form that is needed"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=5
    )
)
def test_any_value_gets_an_answer_in_words(value: Any) -> None:
    for field in ("number", "share", "name", "flag", "inner", "many", "table", "either", "code"):
        try:
            decode(msgspec.json.Decoder(Outer), msgspec.json.encode({field: value}))
        except InvalidRequest as refused:
            told = refused.message
        else:
            continue
        assert told.startswith((field, f"a name in {field}"))
        assert len(told) < 200
        assert "`" not in told.partition("; it is ")[0]


def test_a_struct_that_checks_itself_says_what_is_wrong() -> None:
    class Pair(msgspec.Struct):
        low: int
        high: int

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError(f"{self.low} is above {self.high}")

    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert([{"low": 2, "high": 1}], list[Pair])
    assert undecodable(caught.value) == "[0]: 2 is above 1"


def test_values_are_short_and_printable() -> None:
    values = [None, True, 3, 2.5, "", "a\x1b", "y" * 99, [], [1], {}, {"a": 1}, 10**60]
    told = ["null", "true", "3", "2.5", "empty", '"a\\u001b"', "a text of 99 characters", "empty", "a list of 1 entry"]
    assert [shown(value) for value in values] == [*told, "empty", "an object of 1 member", "1" + "0" * 39]


def test_broken_files_and_messages() -> None:
    with pytest.raises(json.JSONDecodeError) as broken:
        json.loads('{"a":\n x}')
    assert broken_json(broken.value) == "at line 2, column 2"
    assert broken_json(RecursionError()) == "because it is nested too deeply"
    with pytest.raises(msgspec.ValidationError) as wrong:
        msgspec.msgpack.decode(msgspec.msgpack.encode({"number": 0}), type=Outer)
    assert undecodable(wrong.value) == "number: has to be a whole number of at least 1"
    assert undecodable(msgspec.DecodeError("MessagePack data is malformed")) == "its bytes are not of its format"
    assert read(msgspec.ValidationError("a form of tomorrow")) == Complaint("", "is not valid")


def test_small_words() -> None:
    assert [counted(n, "replica") for n in (0, 1, 2)] == ["0 replicas", "1 replica", "2 replicas"]
    assert counted(2, "entry", "entries") == "2 entries"
    assert nearest("prot", ["port", "host"]) == "; did you mean 'port'?"
    assert nearest("zzz", ["port", "host"]) == ""
