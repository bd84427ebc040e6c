"""A request to /v1/responses as the chat request that it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.field_names import FieldNames, Place
from elasticmoe.services.router.api.options import refuse_words, unsupported
from elasticmoe.services.router.api.responses_schemas import ChosenTool, Content, InputItem, ResponsesRequest
from elasticmoe.services.router.api.schemas import (
    CalledFunction,
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    StreamOptions,
    Tool,
    ToolCall,
)
from elasticmoe.services.router.api.tool_use import check_kind
from elasticmoe.services.router.api.words import RESPONSES_WORDS, TOOL_WORDS

T = TypeVar("T")
ToolMode = Literal["none", "auto", "required"]

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_NAMES = {
    "prompt": "input",
    "messages": "input",
    "continue_final_message": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
    "reasoning_effort": "reasoning.effort",
}
_NOT_KEPT = "no answer and no conversation is kept: send the conversation whole"
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def chat_of(raw: ResponsesRequest) -> tuple[ChatRequest, FieldNames]:
    """The chat that is asked for, and what its fields are called here. Raises InvalidRequest for what this server
    cannot do."""
    refuse_words(raw, RESPONSES_WORDS)
    _refuse(raw)
    placed = [*_instructions(raw), *messages_of(raw.input)]
    chat = ChatRequest(
        messages=[message for _, message in placed],
        model=raw.model,
        max_completion_tokens=raw.max_output_tokens,
        temperature=raw.temperature,
        top_p=raw.top_p,
        stream=raw.stream,
        stream_options=StreamOptions(include_usage=True) if raw.stream else None,
        tools=_tools(raw),
        tool_choice=_choice(raw.tool_choice),
        parallel_tool_calls=raw.parallel_tool_calls,
        response_format=_format(raw),
        reasoning_effort=raw.reasoning.effort if raw.reasoning else None,
        request_id=raw.request_id,
    )
    return chat, FieldNames(_NAMES, [place for place, _ in placed])


def _tools(raw: ResponsesRequest) -> list[Tool]:
    """In chat's words. Raises InvalidRequest for tools that the server would run, by their types."""
    tools = []
    for number, tool in enumerate(raw.tools or ()):
        where = f"tools[{number}]"
        check_kind(where, tool.type)
        refuse_words(tool, TOOL_WORDS, f"{where}.")
        name = _needed(tool.name, where, "name")
        tools.append(Tool("function", FunctionDefinition(name, tool.description, tool.parameters, tool.strict)))
    return tools


def _choice(choice: ToolMode | ChosenTool | None) -> ToolMode | NamedTool | None:
    if not isinstance(choice, ChosenTool):
        return choice
    check_kind("tool_choice", choice.type)
    return NamedTool("function", NamedFunction(_needed(choice.name, "tool_choice", "name")))


def _refuse(raw: ResponsesRequest) -> None:
    for name, is_asked, why in (
        ("previous_response_id", raw.previous_response_id is not None, _NOT_KEPT),
        ("conversation", raw.conversation is not None, _NOT_KEPT),
        ("background", raw.background, _NOT_KEPT),
        ("prompt", raw.prompt is not None, "no prompts are kept"),
        ("truncation", raw.truncation == "auto", "send what is to be read"),
        ("top_logprobs", bool(raw.top_logprobs), "use /v1/chat/completions"),
        ("text.verbosity", raw.text is not None and raw.text.verbosity not in (None, "medium"), "say it in a message"),
        ("max_tool_calls", raw.max_tool_calls is not None, "the server runs no tools"),
    ):
        if is_asked:
            raise unsupported(name, why)


def _format(raw: ResponsesRequest) -> ResponseFormat | None:
    """What the text is, in chat's words."""
    given = raw.text.format if raw.text else None
    if given is None:
        return None
    if given.type not in ("text", "json_object", "json_schema"):
        raise unsupported("text.format", f"type {given.type[:40]!r}; supported: text, json_object, json_schema")
    return ResponseFormat(given.type, JsonSchemaFormat(given.name, given.schema))


def _instructions(raw: ResponsesRequest) -> list[tuple[Place, ChatMessage]]:
    said = raw.instructions
    return [(Place("instructions"), ChatMessage(role="system", content=said))] if said else []


def messages_of(given: str | Sequence[InputItem]) -> list[tuple[Place, ChatMessage]]:
    """Items as messages, each with the place of its first item, and of those that are its calls: what an assistant
    thought, said and called in a row is one. Raises InvalidRequest for other items."""
    if isinstance(given, str):
        return [(Place("input"), ChatMessage(role="user", content=given))]
    turns: list[_Turn | tuple[Place, ChatMessage]] = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if item.type not in _ITEMS:
            raise unsupported(where, f"type {item.type[:40]!r}; supported: {', '.join(_ITEMS)}")
        if item.type == "function_call_output":
            content, call_id = _content(item.output, f"{where}.output"), _needed(item.call_id, where, "call_id")
            turns.append((Place(where), ChatMessage(role="tool", tool_call_id=call_id, content=content)))
        elif item.type == "message" and item.role != "assistant":
            content = _content(item.content, f"{where}.content")
            turns.append((Place(where), ChatMessage(role=_needed(item.role, where, "role"), content=content)))
        else:
            last = turns[-1] if turns else None
            if not isinstance(last, _Turn) or (item.type == "message" and last.is_said):
                last = _Turn(where)
                turns.append(last)
            last.add(item, where)
    return [(turn.place, turn.message()) if isinstance(turn, _Turn) else turn for turn in turns]


class _Turn:
    """An assistant's, as its items come. `where`: the first of them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._content: str | list[ContentPart] | None = None
        self._reasoning = ""
        self._calls: dict[str, ToolCall] = {}  # by their places

    @property
    def is_said(self) -> bool:
        """Whether a further message is another turn. After a call it is none: the call's result follows this one."""
        return self._content is not None and not self._calls

    @property
    def place(self) -> Place:
        """Where it stands in the request."""
        return Place(self._where, list(self._calls))

    def add(self, item: InputItem, where: str) -> None:
        """One more item of the turn."""
        if item.type == "message":
            self._content = _joined(self._content, _content(item.content, f"{where}.content"))
        elif item.type == "reasoning":
            thought = _content(item.content, f"{where}.content") if item.content is not None else ""
            self._reasoning += thought if isinstance(thought, str) else "\n".join(part.text or "" for part in thought)
        else:
            function = CalledFunction(_needed(item.name, where, "name"), item.arguments or "{}")
            self._calls[where] = ToolCall(function, _needed(item.call_id, where, "call_id"))

    def message(self) -> ChatMessage:
        """All of it."""
        return ChatMessage(
            role="assistant",
            content=self._content,
            tool_calls=list(self._calls.values()) or None,
            reasoning_content=self._reasoning or None,
        )


def _joined(one: str | list[ContentPart] | None, other: str | list[ContentPart]) -> str | list[ContentPart]:
    if one is None:
        return other
    if isinstance(one, str) and isinstance(other, str):
        return one + other
    return [part for some in (one, other) for part in ([ContentPart("text", some)] if isinstance(some, str) else some)]


def _needed(value: T | None, where: str, name: str) -> T:
    if value is None:
        raise InvalidRequest(f"{where} has no {name}", param=f"{where}.{name}")
    return value


def _content(content: Content | None, where: str) -> str | list[ContentPart]:
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for number, part in enumerate(content):
        if part.type not in _TEXTS or part.text is None:
            raise unsupported(f"{where}[{number}]", f"type {part.type[:40]!r}; supported: texts")
        parts.append(ContentPart("text", part.text))
    return parts
