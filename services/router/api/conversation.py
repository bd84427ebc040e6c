"""From a request's messages and template options to a conversation that the chat template can be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.options import refuse_words, unsupported
from elasticmoe.services.router.api.schemas import ChatMessage, ChatRequest, TokenizeRequest
from elasticmoe.services.router.api.tool_use import calls_of, told_to_model, tools_of
from elasticmoe.services.router.api.words import MESSAGE_WORDS
from elasticmoe.services.router.text.jobs import Conversation
from elasticmoe.services.router.text.template import RESERVED_VARIABLES

VALUES_MAX = 4_096  # values in all template variables and documents of a request, containers included
VALUE_CHARS_MAX = 1 << 20  # characters of texts and keys in them
DEPTH_MAX = 16
_OF_CONVERSATIONS = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "chat_template",
    "documents",
    "reasoning_effort",
    "tools",
    "functions",
)
_OPTIONAL = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
INTEGER_MAX = (1 << 63) - 1


def conversation_of(raw: ChatRequest | TokenizeRequest) -> Conversation:
    """What the template is given. Raises InvalidRequest for what it cannot be given."""
    tools = told_to_model(tools_of(raw))
    for index, message in enumerate(raw.messages or ()):
        refuse_words(message, MESSAGE_WORDS, f"messages[{index}].")
    if isinstance(raw, TokenizeRequest) and raw.chat_template is not None:  # chat refuses the word itself
        raise unsupported("chat_template", "a template comes with the model only")
    opens_final = raw.continue_final_message or False
    if opens_final and raw.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude one another", param="continue_final_message"
        )
    variables = raw.chat_template_kwargs or {}
    reserved = sorted(RESERVED_VARIABLES.intersection(variables))
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs cannot set {reserved[0]}: it is reserved", param="chat_template_kwargs"
        )
    _check_size(variables, "chat_template_kwargs")
    _check_size(raw.documents, "documents")
    _check_size(tools, "tools")
    effort = raw.reasoning_effort
    needed = {"reasoning_effort": effort is not None, "tools": tools is not None}
    return Conversation(
        messages=plain_messages(raw.messages or ()),
        add_generation_prompt=not opens_final and raw.add_generation_prompt is not False,
        continue_final_message=opens_final,
        documents=raw.documents,
        tools=tools,
        variables=variables if effort is None else {"reasoning_effort": effort, **variables},
        required=tuple(name for name, is_needed in needed.items() if is_needed),
        add_special=bool(raw.add_special_tokens),
    )


def refuse_without_messages(raw: TokenizeRequest) -> None:
    """Raises InvalidRequest for what only a conversation has, beside a plain prompt."""
    for name in _OF_CONVERSATIONS:
        if getattr(raw, name):
            raise InvalidRequest(f"{name} is only allowed with messages", param=name)


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """What the template sees: texts and calls. Raises InvalidRequest for images and the like."""
    return [_plain(message, index) for index, message in enumerate(messages)]


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    if message.role == "function":
        raise unsupported(f"messages[{index}]", "role 'function'; use 'tool'")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"messages[{index}] has tool_calls, and its role is {message.role}", param="messages")
    role = "system" if message.role == "developer" else message.role
    optional = {name: getattr(message, name) for name in _OPTIONAL}
    plain = {"role": role, "content": _content(message, index)}
    plain |= {name: value for name, value in optional.items() if value is not None}
    if message.tool_calls:
        plain["tool_calls"] = calls_of(message)
    return plain


def _content(message: ChatMessage, index: int) -> str | list[dict[str, str]] | None:
    if message.content is None and message.tool_calls:
        return None
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    parts = []
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise unsupported(f"messages[{index}].content[{number}]", f"type {part.type[:40]!r}; supported: text")
        parts.append({"type": "text", "text": part.text})
    return parts


def _check_size(given: Any, param: str) -> None:
    """Raises InvalidRequest for values that are too many, too long, too deep or too large. Does not recurse."""
    num_values, num_chars = 0, 0
    pending = [(given, 0)]
    while pending:
        value, depth = pending.pop()
        num_values += 1
        num_chars += len(value) if isinstance(value, str) else 0
        if isinstance(value, dict):
            num_chars += sum(len(key) for key in value)
        if isinstance(value, int) and not -INTEGER_MAX <= value <= INTEGER_MAX:
            raise InvalidRequest(f"{param} has an integer beyond {INTEGER_MAX}", param=param)
        inner: Any = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for what, count, most in (
            ("levels", depth, DEPTH_MAX),
            ("values", num_values + len(pending) + len(inner), VALUES_MAX),
            ("characters", num_chars, VALUE_CHARS_MAX),
        ):
            if count > most:
                raise InvalidRequest(f"{param} has {count} {what} or more; the limit is {most}", param=param)
        pending += [(entry, depth + 1) for entry in inner]
