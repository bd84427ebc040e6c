"""From a request's fields to what the chat template is given; what cannot be given is refused by name."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.conversation import DEPTH_MAX, VALUE_CHARS_MAX, VALUES_MAX, conversation_of
from elasticmoe.services.router.api.parse import parse
from elasticmoe.services.router.api.schemas import ChatRequest, TokenizeRequest
from elasticmoe.services.router.text.jobs import Conversation
from elasticmoe.services.router.text.template import RESERVED_VARIABLES

KINDS = [ChatRequest, TokenizeRequest]
MESSAGES = [{"role": "user", "content": "hi"}]


def conversation(kind: Any, **fields: Any) -> Conversation:
    body = {"messages": MESSAGES, **fields}
    return conversation_of(parse(msgspec.json.Decoder(kind), msgspec.json.encode(body)))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_both_kinds(kind: Any) -> None:
    assert conversation(kind) == Conversation(messages=MESSAGES)
    given = conversation(kind, add_generation_prompt=None, continue_final_message=None)
    assert given == Conversation(messages=MESSAGES)
    assert not conversation(kind, add_generation_prompt=False).add_generation_prompt
    opened = conversation(kind, continue_final_message=True)
    assert (opened.continue_final_message, opened.add_generation_prompt) == (True, False)
    assert conversation(kind, continue_final_message=False, add_generation_prompt=True).add_generation_prompt
    assert conversation(kind, continue_final_message="reasoning").continue_final_message == "reasoning"
    assert conversation(kind, add_special_tokens=True).add_special


@pytest.mark.parametrize("kind", KINDS)
def test_variables(kind: Any) -> None:
    given = {"enable_thinking": False, "level": 3, "names": ["a", {"b": None}]}
    assert conversation(kind, chat_template_kwargs=given).variables == given
    documents = [{"title": "t", "text": "x"}]
    assert conversation(kind, documents=documents).documents == documents


def test_reasoning_effort_must_be_read_by_the_template() -> None:
    asked = conversation(ChatRequest, reasoning_effort="low", chat_template_kwargs={"a": 1})
    assert (asked.variables, asked.required) == ({"reasoning_effort": "low", "a": 1}, ("reasoning_effort",))


def test_messages() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": None, "reasoning": "r", "name": "n", "refusal": None},
    ]
    assert conversation(ChatRequest, messages=messages).messages == [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": "", "reasoning": "r", "name": "n"},
    ]


TOOL = {"type": "function", "function": {"name": "now", "description": None}}
NAMED = {"type": "function", "function": {"name": "now"}}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
NO_PARAMETERS = {"type": "object", "properties": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_tools(kind: Any) -> None:
    parameters = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"enum": [1, None]}}}
    described = {"type": "function", "function": {"name": "a.b-C_9", "description": "d", "parameters": parameters}}
    given = conversation(kind, tools=[TOOL, {**described, "more": 1}], tool_choice="auto")
    assert given.tools == [{"type": "function", "function": {"name": "now", "parameters": NO_PARAMETERS}}, described]
    assert json.dumps(given.tools[1]) == json.dumps(described)  # templates print them in their order
    assert given.required == ("tools",)
    for ignored in ({"tools": [TOOL], "tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}):
        assert conversation(kind, **ignored) == conversation(kind)
    assert conversation(kind, functions=[{"name": "f"}], function_call="none") == conversation(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_and_their_answers(kind: Any) -> None:
    said = [
        {"role": "assistant", "content": None, "tool_calls": [CALL, {"function": CALL["function"]}]},
        {"role": "tool", "tool_call_id": "c1", "name": "now", "content": [{"type": "text", "text": "noon"}]},
    ]
    calls = [CALL, {"type": "function", "function": CALL["function"]}]
    assert conversation(kind, messages=said).messages == [
        {"role": "assistant", "content": None, "tool_calls": calls},
        said[1],
    ]
    assert conversation(kind, messages=[{**said[0], "tool_calls": []}]).messages == [
        {"role": "assistant", "content": ""}
    ]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "text", "param"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt exclude one another",
            "continue_final_message",
        ),
        ({"continue_final_message": "role"}, "has to be one of content, ", "continue_final_message"),
        ({"chat_template_kwargs": {"x": deep(DEPTH_MAX)}}, f"levels or more; the limit is {DEPTH_MAX}", None),
        ({"chat_template_kwargs": {"x": [0] * VALUES_MAX}}, f"values or more; the limit is {VALUES_MAX}", None),
        ({"chat_template_kwargs": {"x": "y" * (VALUE_CHARS_MAX + 1)}}, "characters or more; the limit is", None),
        ({"chat_template_kwargs": {"x": {"y" * (VALUE_CHARS_MAX + 1): 0}}}, "characters or more; the limit is", None),
        ({"chat_template_kwargs": {str(i): i for i in range(65)}}, "at most 64 ", None),
        ({"chat_template_kwargs": {"y" * 65: 0}}, "at most 64 ", None),
        ({"chat_template_kwargs": [1]}, "has to be an object", None),
        ({"chat_template_kwargs": {"x": [1 << 63]}}, "an integer beyond 9223372036854775807", None),
        ({"documents": [{"a": -(1 << 64)}]}, "an integer beyond", "documents"),
        ({"documents": [{"a": deep(DEPTH_MAX)}]}, "levels or more", "documents"),
        ({"documents": [{}] * 257}, "at most 256 entries", "documents"),
        ({"documents": ["text"]}, "has to be an object", "documents[0]"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "use 'tool'", "messages[0]"),
        ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, "messages[0] has tool_calls", "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "at most 128 entries", None),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "function", None),
        ({"tools": [TOOL] * 2}, "tools has 'now' twice", "tools"),
        ({"tools": [TOOL] * 129}, "at most 128 entries", "tools"),
        ({"tools": [{"type": "web_search"}]}, "type", None),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "1 to 64 of", None),
        ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"a": deep(17)}}}]}, "levels or more", "tools"),
        ({"tools": [TOOL], "tool_choice": {**NAMED, "function": {"name": "x"}}}, "is no tool", "tool_choice"),
        ({"tool_choice": "required"}, "there are no tools", "tool_choice"),
        ({"tool_choice": NAMED}, "there are no tools", "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice", None),
        ({"functions": [{"name": "f"}]}, "pass them as tools", "functions"),
        ({"function_call": {"name": "f"}}, "there are no functions", "function_call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "supported: text", None),
    ],
)
def test_what_cannot_be_given(kind: Any, fields: dict[str, Any], text: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        conversation(kind, **fields)
    assert text in caught.value.message
    assert param is None or caught.value.param == param


def test_a_template_of_a_request_is_refused_by_tokenize_too() -> None:
    """Chat refuses the word with all others that it does not know."""
    with pytest.raises(InvalidRequest, match="a template comes with the model only") as caught:
        conversation(TokenizeRequest, chat_template="{{ 1 }}")
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES))
def test_reserved_variables(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot set {name}: it is reserved") as caught:
        conversation(ChatRequest, chat_template_kwargs={"enable_thinking": True, name: []})
    assert caught.value.param == "chat_template_kwargs"


def test_no_option_of_transformers_can_be_set() -> None:
    """What apply_chat_template would take as an argument is no variable of the template."""
    import inspect

    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import render_jinja_template

    names = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"self", "kwargs"}
    names |= set(inspect.signature(render_jinja_template).parameters) - {"kwargs", "conversations"}
    assert names <= RESERVED_VARIABLES
