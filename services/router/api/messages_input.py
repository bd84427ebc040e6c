"""A request to /v1/messages as the chat request that it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.field_names import FieldNames, Place
from elasticmoe.services.router.api.messages_schemas import (
    Block,
    CountRequest,
    InputMessage,
    MessagesRequest,
    MessagesToolChoice,
    ResultBlock,
)
from elasticmoe.services.router.api.options import refuse_words, unsupported
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
    Tool,
    ToolCall,
)
from elasticmoe.services.router.api.tool_use import check_kind
from elasticmoe.services.router.api.words import ANTHROPIC_WORDS, TOOL_WORDS

_FORMAT = "output_config.format"
_NAMES = {
    "prompt": "messages",
    "continue_final_message": "messages",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "chat_template_kwargs": "thinking",
    "include_reasoning": "thinking.display",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


def chat_of(raw: CountRequest) -> tuple[ChatRequest, FieldNames]:
    """The chat that is asked for, and what its fields are called here. Raises InvalidRequest for what this server
    cannot do."""
    sampling, names = {}, _NAMES
    if isinstance(raw, MessagesRequest):
        refuse_words(raw, ANTHROPIC_WORDS)
        sampling = {
            "max_completion_tokens": raw.max_tokens,
            "stop": raw.stop_sequences or None,
            "stream": raw.stream,
            "temperature": raw.temperature,
            "top_p": raw.top_p,
            "top_k": raw.top_k,
            "response_format": _format(raw),
        }
        param = _FORMAT if raw.output_format is None else "output_format"
        names = _NAMES | {"response_format": param, "response_format.json_schema.schema": f"{param}.schema"}
    thinking = raw.thinking
    if thinking is not None and thinking.type == "between_tools":
        raise unsupported("thinking.type", "between_tools; supported: enabled, disabled, adaptive")
    thinks = thinking is not None and thinking.type != "adaptive"
    placed = [*_system(raw), *(told for n, given in enumerate(raw.messages) for told in _messages(given, n))]
    _, last = placed[-1]
    chat = ChatRequest(
        messages=[message for _, message in placed],
        continue_final_message=last.role == "assistant" and bool(last.content) and not last.tool_calls,
        model=raw.model,
        tools=_tools(raw),
        tool_choice=_choice(raw.tool_choice),
        parallel_tool_calls=not (raw.tool_choice and raw.tool_choice.disable_parallel_tool_use),
        include_reasoning=thinking is None or thinking.display != "omitted",
        chat_template_kwargs={"enable_thinking": thinking.type == "enabled"} if thinking and thinks else None,
        **sampling,  # type: ignore[arg-type]
    )
    return chat, FieldNames(names, [Place(place) for place, _ in placed])


def _tools(raw: CountRequest) -> list[Tool]:
    """In chat's words. Raises InvalidRequest for tools that the server would run, by their types."""
    tools = []
    for number, tool in enumerate(raw.tools or ()):
        where = f"tools[{number}]"
        check_kind(where, tool.type, "custom")
        refuse_words(tool, TOOL_WORDS, f"{where}.")
        if tool.name is None or tool.input_schema is None:
            lacking = "name" if tool.name is None else "input_schema"
            raise InvalidRequest(f"{where} has no {lacking}", param=f"{where}.{lacking}")
        function = FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict)
        tools.append(Tool("function", function))
    return tools


def _format(raw: MessagesRequest) -> ResponseFormat | None:
    """What the text is, in chat's words."""
    config = raw.output_config.format if raw.output_config else None
    if config is not None and raw.output_format is not None:
        raise InvalidRequest(f"{_FORMAT} and output_format exclude one another", param="output_format")
    given, param = (config, _FORMAT) if config is not None else (raw.output_format, "output_format")
    if given is None:
        return None
    if given.type != "json_schema":
        raise unsupported(param, f"type {given.type[:40]!r}; supported: json_schema")
    return ResponseFormat(given.type, JsonSchemaFormat(schema=given.schema))


def _choice(choice: MessagesToolChoice | None) -> Literal["none", "auto", "required"] | NamedTool | None:
    match choice.type if choice else None:
        case None:
            return None
        case "any":
            return "required"
        case "tool":
            return NamedTool("function", NamedFunction((choice.name if choice else None) or ""))
        case "auto" | "none" as same:
            return same


def _system(raw: CountRequest) -> list[tuple[str, ChatMessage]]:
    if not raw.system:
        return []
    return [("system", ChatMessage(role="system", content=_texts(raw.system, "system")))]


def _messages(given: InputMessage, number: int) -> list[tuple[str, ChatMessage]]:
    """A message of blocks, with its place: results of tools are messages of their own, before what else is said."""
    place = f"messages[{number}]"
    where = f"{place}.content"
    if isinstance(given.content, str):
        return [(place, ChatMessage(role=given.role, content=given.content))]
    results, parts = list[tuple[str, ChatMessage]](), list[ContentPart]()
    calls, thoughts = list[ToolCall](), list[str]()
    for index, block in enumerate(given.content):
        at = f"{where}[{index}]"
        match block.type:
            case "text" if block.text is not None:
                parts.append(ContentPart("text", block.text))
            case "tool_use" if given.role == "assistant":
                calls.append(_call(block, at))
            case "tool_result" if given.role == "user" and block.tool_use_id is None:
                raise InvalidRequest(f"{at} has no tool_use_id", param=at)
            case "tool_result" if given.role == "user":
                content = _texts(block.content or "", f"{at}.content")
                results.append((at, ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=content)))
            case "thinking" if given.role == "assistant":
                thoughts.append(block.thinking or "")
            case _:
                raise unsupported(at, f"type {block.type[:40]!r} of role {given.role}; supported: text and tools")
    if given.role != "assistant":
        if not given.content:
            raise InvalidRequest(f"{where} has no blocks", param=where)
        return [*results, *([(place, ChatMessage(role=given.role, content=parts))] if parts else [])]
    thought = "\n".join(thoughts) or None
    said = ChatMessage(role="assistant", content=parts or None, tool_calls=calls or None, reasoning_content=thought)
    return [(place, said)]


def _call(block: Block, where: str) -> ToolCall:
    if block.name is None or block.id is None:
        raise InvalidRequest(f"{where} has no {'id' if block.name else 'name'}", param=where)
    return ToolCall(CalledFunction(block.name, json.dumps(block.input or {}, ensure_ascii=False)), block.id)


def _texts(given: str | Sequence[ResultBlock], where: str) -> str | list[ContentPart]:
    if isinstance(given, str):
        return given
    parts = []
    for index, block in enumerate(given):
        if block.type != "text" or block.text is None:
            raise unsupported(f"{where}[{index}]", f"type {block.type[:40]!r}; supported: text")
        parts.append(ContentPart("text", block.text))
    return parts
