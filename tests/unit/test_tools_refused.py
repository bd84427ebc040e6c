"""Tools of other kinds than functions, which other servers run themselves, are refused by their types."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from anthropic.types import ToolParam as AnthropicTool
from anthropic.types import ToolUnionParam
from openai.types.chat import ChatCompletionToolChoiceOptionParam, ChatCompletionToolUnionParam
from openai.types.responses import FunctionToolParam, ToolParam, response_create_params
from openai.types.shared_params import FunctionDefinition as OpenaiFunction

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api import messages_input, responses_input
from elasticmoe.services.router.api.conversation import conversation_of
from elasticmoe.services.router.api.messages_schemas import CountRequest, MessagesRequest, MessagesTool
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.responses_schemas import FunctionTool, ResponsesRequest
from elasticmoe.services.router.api.schemas import ChatRequest, FunctionDefinition
from elasticmoe.services.router.api.words import TOOL_WORDS
from tests.unit.test_router_words import section, words_in

HELLO = [{"role": "user", "content": "x"}]
WAYS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "chat": (ChatRequest, conversation_of, {"messages": HELLO}),
    "responses": (ResponsesRequest, responses_input.chat_of, {"input": "x"}),
    "messages": (MessagesRequest, messages_input.chat_of, {"messages": HELLO, "max_tokens": 5}),
    "count": (CountRequest, messages_input.chat_of, {"messages": HELLO}),
}
FUNCTION: dict[str, dict[str, Any]] = {
    "chat": {"type": "function", "function": {"name": "f"}},
    "responses": {"type": "function", "name": "f"},
    "messages": {"name": "f", "input_schema": {}},
}


def types_of(params: Any) -> set[str]:
    """What a client's types of a union say that their `type` may be."""
    found: set[str] = set()
    for member in get_args(params):
        if hasattr(member, "__annotations__") and get_origin(member) is None:
            found |= set(_literals(get_type_hints(member).get("type")))
    return found


def _literals(hint: Any) -> list[str]:
    return [text for part in get_args(hint) for text in ([part] if isinstance(part, str) else _literals(part))]


def ask(way: str, **fields: Any) -> Any:
    kind, asked, base = WAYS[way]
    return asked(parse(msgspec.json.Decoder(kind), msgspec.json.encode({**base, **fields})))


def refused(way: str, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        ask(way, **fields)
    assert caught.value.code == "unsupported"
    return caught.value


OTHERS = [
    *(("chat", kind) for kind in sorted(types_of(ChatCompletionToolUnionParam) - {"function"})),
    *(("responses", kind) for kind in sorted(types_of(ToolParam) - {"function"})),
    *(("messages", kind) for kind in sorted(types_of(ToolUnionParam) - {"custom"})),
    ("count", "web_search_20250305"),
]


def test_the_clients_know_some() -> None:
    known = {kind for _, kind in OTHERS}
    assert known >= {"custom", "web_search", "file_search", "code_interpreter", "computer_use_preview", "mcp"}
    assert known >= {"image_generation", "web_search_20250305", "bash_20250124", "memory_20250818"}


@pytest.mark.parametrize(("way", "kind"), OTHERS)
def test_tools_of_other_types_are_refused_by_name(way: str, kind: str) -> None:
    """Whatever else they have, or have not."""
    for more in ({}, {"name": kind.split("_2")[0], "custom": {"name": "x"}, "container": {"type": "auto"}}):
        error = refused(way, tools=[{"type": kind, **more}])
        assert error.param == "tools[0]"
        assert error.message.startswith(f"tools[0] is not supported: type '{kind}")


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        *(("chat", kind) for kind in sorted(types_of(ChatCompletionToolChoiceOptionParam) - {"function"})),
        *(("responses", kind) for kind in sorted(types_of(response_create_params.ToolChoice) - {"function"})),
    ],
)
def test_choices_of_other_types_are_refused_by_name(way: str, kind: str) -> None:
    error = refused(way, tools=[FUNCTION[way]], tool_choice={"type": kind, "mode": "auto", "tools": []})
    assert error.param == "tool_choice"
    assert error.message.startswith(f"tool_choice is not supported: type '{kind}")


@pytest.mark.parametrize("word", TOOL_WORDS)
@pytest.mark.parametrize("way", ["responses", "messages"])
def test_words_of_tools_that_would_change_the_answer_are_refused_by_name(way: str, word: str) -> None:
    error = refused(way, tools=[{**FUNCTION[way], word: ["programmatic"]}])
    assert error.param == f"tools[0].{word}"
    for value in (None, *TOOL_WORDS[word].neutral):
        ask(way, tools=[{**FUNCTION[way], word: value}])


@pytest.mark.parametrize(
    ("kind", "params", "title"),
    [
        (FunctionDefinition, OpenaiFunction, "Ignored"),
        (FunctionTool, FunctionToolParam, "Responses"),
        (MessagesTool, AnthropicTool, "Messages"),
    ],
)
def test_each_word_of_a_client_s_function_has_its_place(kind: type[msgspec.Struct], params: Any, title: str) -> None:
    ignored = words_in(section(title).partition("**Ignored**")[2].partition("\n- ")[0])
    assert set(get_type_hints(params)) <= set(kind.__struct_fields__) | ignored
