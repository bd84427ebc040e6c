"""What chat's fields are called in errors of the interfaces that stand on chat."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.errors import ContextLengthExceeded, InvalidRequest
from elasticmoe.services.router.api import messages_input, responses_input
from elasticmoe.services.router.api.field_names import CHAT, COMPLETION_TOKENS, FieldNames
from elasticmoe.services.router.api.messages_schemas import MessagesRequest
from elasticmoe.services.router.api.responses_schemas import ResponsesRequest
from elasticmoe.services.router.api.schemas import ChatRequest

TOOL: dict[str, Any] = {"name": "weather"}
SCHEMA: dict[str, Any] = {"type": "json_schema", "schema": {"type": "object"}}
RESPONSES: dict[str, Any] = {
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "weather"},
        {"type": "function_call_output", "call_id": "c", "output": "dry"},
    ],
    "max_output_tokens": 3,
    "temperature": 1,
    "top_p": 1,
    "stream": True,
    "tools": [{"type": "function", **TOOL}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "text": {"format": SCHEMA},
    "reasoning": {"effort": "low"},
    "request_id": "r",
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "system": "Be brief.",
    "messages": [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": {}}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c", "content": "dry"}, {"type": "text", "text": "So?"}],
        },
        {"role": "assistant", "content": "It is"},
    ],
    "max_tokens": 3,
    "temperature": 1,
    "top_p": 1,
    "top_k": 2,
    "stop_sequences": ["x"],
    "stream": True,
    "tools": [{**TOOL, "input_schema": {}}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"format": SCHEMA},
}


def asked(request: dict[str, Any]) -> tuple[ChatRequest, FieldNames]:
    if "input" in request:
        return responses_input.chat_of(msgspec.convert(request, ResponsesRequest))
    return messages_input.chat_of(msgspec.convert(request, MessagesRequest))


@pytest.mark.parametrize("given", [RESPONSES, MESSAGES])
def test_what_chat_is_given_has_a_name_in_the_request(given: dict[str, Any]) -> None:
    chat, names = asked(given)
    blank = ChatRequest(messages=[])
    used = {name for name in ChatRequest.__struct_fields__ if getattr(chat, name) != getattr(blank, name)}
    assert len(used) > 8
    for name in used - {"stream_options"}:  # what it asks for is given with `stream`
        assert names.of(name).split(".")[0] in given, (name, names.of(name))


@pytest.mark.parametrize(
    ("given", "places"),
    [
        (RESPONSES, ["instructions", "input[0]", "input[1]", "input[3]"]),
        (MESSAGES, ["system", "messages[0]", "messages[1].content[0]", "messages[1]", "messages[2]"]),
        ({"input": "Hi"}, ["input"]),
    ],
)
def test_each_message_has_its_place_in_the_request(given: dict[str, Any], places: list[str]) -> None:
    chat, names = asked(given)
    assert [names.of(f"messages[{number}]") for number in range(len(chat.messages))] == places
    assert names.of("messages[1].content[2]") == (places[1:2] or ["messages[1]"])[0] + ".content[2]"


@pytest.mark.parametrize(
    ("error", "text", "param"),
    [
        (
            InvalidRequest(
                "response_format.json_schema.schema is too complex: 'response_format'",
                param="response_format.json_schema.schema",
            ),
            "text.format.schema is too complex: 'response_format'",
            "text.format.schema",
        ),
        (
            InvalidRequest("messages[2]: the arguments are no JSON object", param="messages"),
            "input[1]: the arguments are no JSON object",
            "input",
        ),
        (InvalidRequest("messages[2] has audio", param="messages[2].audio"), "input[1] has audio", "input[1].audio"),
        (
            InvalidRequest(
                "response_format.json_schema.schema has the keyword 'not' at /properties/max_tokens",
                param="response_format.json_schema.schema",
            ),
            "text.format.schema has the keyword 'not' at /properties/max_tokens",
            "text.format.schema",
        ),
        (
            InvalidRequest("tools: parameters of max_tokens have no place", param="tools"),
            "tools: parameters of max_tokens have no place",
            "tools",
        ),
        (InvalidRequest("n is 3, a prompt of 5", param="n"), "n is 3, a prompt of 5", "n"),
        (InvalidRequest("the body is no JSON"), "the body is no JSON", None),
        (InvalidRequest("ask for less, or set max_tokens", param="n"), "ask for less, or set max_output_tokens", "n"),
    ],
)
def test_an_error_is_told_in_the_words_of_the_request(error: InvalidRequest, text: str, param: str | None) -> None:
    _, names = asked(RESPONSES)
    with pytest.raises(InvalidRequest) as told, names.in_errors():
        raise error
    assert (str(told.value), told.value.message, told.value.param) == (text, text, param)


@pytest.mark.parametrize(
    ("names", "what", "param"),
    [
        (CHAT, "messages", "max_tokens"),
        (COMPLETION_TOKENS, "messages", "max_completion_tokens"),
        (asked(RESPONSES)[1], "input", "max_output_tokens"),
    ],
)
def test_a_prompt_that_does_not_fit_is_called_by_its_name(names: FieldNames, what: str, param: str) -> None:
    with pytest.raises(ContextLengthExceeded, match=rf"\(5 in the {what}, 10 in the completion\)") as told:
        with names.in_errors():
            raise ContextLengthExceeded(8, 5, 10, param="max_tokens")
    assert told.value.param == param


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="messages"), CHAT.in_errors():
        raise ValueError("the messages")
