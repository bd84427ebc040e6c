"""What comes back of an answer to POST /v1/responses, as messages."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.field_names import FieldNames
from elasticmoe.services.router.api.responses_input import messages_of
from elasticmoe.services.router.api.responses_schemas import InputItem

CALL: dict[str, Any] = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "c1", "output": "dry"}


def message(text: str | list[Any], role: str = "assistant") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


def turns(*items: dict[str, Any]) -> list[tuple[str, Any, int]]:
    """Role, content and number of calls of each message."""
    told = messages_of(msgspec.convert(list(items), list[InputItem]))
    return [(one.role, one.content, len(one.tool_calls or ())) for _, one in told]


def test_what_is_said_after_a_call_is_of_its_turn_so_that_the_result_follows_it() -> None:
    assert turns(message("Hi", "user"), message("A "), CALL, message("B"), RESULT) == [
        ("user", "Hi", 0),
        ("assistant", "A B", 1),
        ("tool", "dry", 0),
    ]
    parts = [{"type": "output_text", "text": "B"}]
    ((_, content, num_calls),) = turns(message("A"), CALL, message(parts))
    assert (msgspec.to_builtins(content), num_calls) == (
        [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
        1,
    )


def test_messages_without_calls_between_them_are_turns_of_their_own() -> None:
    assert turns(message("A"), message("B"), CALL) == [("assistant", "A", 0), ("assistant", "B", 1)]


def test_each_call_of_a_turn_has_its_own_place() -> None:
    thought = {"type": "reasoning", "content": "hm"}
    items = [message("Hi", "user"), thought, message("A"), CALL, message("B"), CALL, RESULT, CALL]
    told = messages_of(msgspec.convert(items, list[InputItem]))
    names = FieldNames({"messages": "input"}, [place for place, _ in told])
    paths = {
        "messages[0]": "input[0]",
        "messages[1]": "input[1]",
        "messages[1].tool_calls[0]": "input[3]",
        "messages[1].tool_calls[1].function": "input[5].function",
        "messages[2]": "input[6]",
        "messages[3].tool_calls[0]": "input[7]",
        "messages[2].tool_calls[4]": "input[6].tool_calls[4]",
    }
    assert {path: names.of(path) for path in paths} == paths
    text = ", ".join(f"{path}: no" for path in paths)
    with pytest.raises(InvalidRequest) as refused, names.in_errors():
        raise InvalidRequest(text, param="messages")
    assert refused.value.message == ", ".join(f"{path}: no" for path in paths.values())
    assert refused.value.param == "input"


def test_items_of_other_types_are_refused_by_name() -> None:
    for kind in ("item_reference", "web_search_call", "computer_call_output", "mcp_call"):
        with pytest.raises(InvalidRequest, match=rf"^input\[1\] is not supported: type '{kind}'") as refused:
            turns(message("Hi", "user"), {"type": kind, "id": "x"})
        assert (refused.value.code, refused.value.param) == ("unsupported", "input[1]")
