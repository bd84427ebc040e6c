"""What comes back of an answer to POST /v1/responses, as messages."""

from __future__ import annotations

from typing import Any

import msgspec

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
