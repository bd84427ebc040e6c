"""A request to /v1/messages as the chat request that it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from elasticmoe.common.protocol.errors import InvalidRequest
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
from elasticmoe.services.router.api.words import ANTHROPIC_WORDS


def chat_of(raw: CountRequest) -> ChatRequest:
    """The chat that is asked for. Raises InvalidRequest for what this server cannot do."""
    sampling = {}
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
    thinking = raw.thinking
    if thinking is not None and thinking.type == "between_tools":
        raise unsupported("thinking.type", "between_tools; supported: enabled, disabled, adaptive")
    thinks = thinking is not None and thinking.type != "adaptive"
    messages = [*_system(raw), *(told for n, given in enumerate(raw.messages) for told in _messages(given, n))]
    last = messages[-1]
    return ChatRequest(
        messages=messages,
        continue_final_message=last.role == "assistant" and bool(last.content) and not last.tool_calls,
        model=raw.model,
        tools=[Tool("function", FunctionDefinition(t.name, t.description, t.input_schema)) for t in raw.tools or ()],
        tool_choice=_choice(raw.tool_choice),
        parallel_tool_calls=not (raw.tool_choice and raw.tool_choice.disable_parallel_tool_use),
        include_reasoning=thinking is None or thinking.display != "omitted",
        chat_template_kwargs={"enable_thinking": thinking.type == "enabled"} if thinking and thinks else None,
        **sampling,  # type: ignore[arg-type]
    )


def _format(raw: MessagesRequest) -> ResponseFormat | None:
    """What the text is, in chat's words."""
    config = raw.output_config.format if raw.output_config else None
    if config is not None and raw.output_format is not None:
        raise InvalidRequest("output_config.format and output_format exclude one another", param="output_format")
    given, param = (config, "output_config.format") if config is not None else (raw.output_format, "output_format")
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


def _system(raw: CountRequest) -> list[ChatMessage]:
    if not raw.system:
        return []
    return [ChatMessage(role="system", content=_texts(raw.system, "system"))]


def _messages(given: InputMessage, number: int) -> list[ChatMessage]:
    """A message of blocks: results of tools are messages of their own, before what else is said."""
    where = f"messages[{number}].content"
    if isinstance(given.content, str):
        return [ChatMessage(role=given.role, content=given.content)]
    results, parts, calls, thoughts = list[ChatMessage](), list[ContentPart](), list[ToolCall](), list[str]()
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
                results.append(ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=content))
            case "thinking" if given.role == "assistant":
                thoughts.append(block.thinking or "")
            case _:
                raise unsupported(at, f"type {block.type[:40]!r} of role {given.role}; supported: text and tools")
    if given.role != "assistant":
        if not given.content:
            raise InvalidRequest(f"{where} has no blocks", param=where)
        return [*results, *([ChatMessage(role=given.role, content=parts)] if parts else [])]
    return [
        ChatMessage(
            role="assistant",
            content=parts or None,
            tool_calls=calls or None,
            reasoning_content="\n".join(thoughts) or None,
        )
    ]


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
