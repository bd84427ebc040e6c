"""What clients may send to /v1/messages, and what they are told: the common part of Anthropic's interface.

Source: Anthropic's API reference, "Messages".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from elasticmoe.common.described import says
from elasticmoe.common.protocol.limits import STOP_STRINGS_MAX
from elasticmoe.common.protocol.rank import Share, Temperature
from elasticmoe.services.router.api.schemas import (
    MESSAGES_MAX,
    MODEL_CHARS_MAX,
    PARTS_MAX,
    TOOLS_MAX,
    OutputTokens,
    StopString,
    ToolKind,
    ToolName,
    TopK,
)
from elasticmoe.services.router.api.words import UnsupportedAnthropicWords, UnsupportedToolWords

_Id = Annotated[str, Meta(max_length=256)]


class ResultBlock(msgspec.Struct, frozen=True):
    """A part of what a tool gave; texts only."""

    type: Annotated[Annotated[str, Meta(max_length=64)], says("`text`; others are refused")]
    text: Annotated[str | None, says("The text")] = None


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A block of a message's content."""

    type: Annotated[
        Annotated[str, Meta(max_length=64)], says("`text`, `tool_use`, `tool_result`, `thinking`; others are refused")
    ]
    text: Annotated[str | None, says("Of a text")] = None
    thinking: Annotated[str | None, says("Of thinking")] = None
    id: Annotated[_Id | None, says("Of a call: what its result names")] = None
    name: Annotated[Annotated[str, Meta(max_length=256)] | None, says("Of a call: the tool")] = None
    input: Annotated[dict[str, Any] | None, says("Of a call: its arguments")] = None
    tool_use_id: Annotated[_Id | None, says("Of a result: whose")] = None
    content: Annotated[
        str | Annotated[list[ResultBlock], Meta(max_length=PARTS_MAX)] | None, says("Of a result: what the tool gave")
    ] = None


class InputMessage(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Annotated[Literal["user", "assistant", "system"], says("Who says it; the system's are texts")]
    content: Annotated[str | Annotated[list[Block], Meta(max_length=PARTS_MAX)], says("A text, or blocks")]


class MessagesTool(UnsupportedToolWords, frozen=True):
    """What the model may call. Those that the server would run have types of their own, and are refused by name."""

    name: Annotated[ToolName | None, says("1 to 64 of `a-z A-Z 0-9 _ . -`")] = None
    input_schema: Annotated[dict[str, Any] | None, says("A JSON schema of its arguments")] = None
    description: Annotated[str | None, says("What it does, for the model")] = None
    type: Annotated[ToolKind | None, says("`custom`; others are refused")] = None
    strict: Annotated[bool | None, says("Its arguments satisfy the schema, also where the model calls by itself")] = (
        None
    )


class MessagesToolChoice(msgspec.Struct, frozen=True):
    """Whether tools are called."""

    type: Annotated[Literal["auto", "none", "any", "tool"], says("`any`: some tool is called; `tool`: the named one")]
    name: Annotated[str | None, says("Of `tool`: which")] = None
    disable_parallel_tool_use: Annotated[bool | None, says("On: only the first call is told")] = None


class Thinking(msgspec.Struct, frozen=True):
    """Whether the model thinks before it answers, where its chat template asks `enable_thinking`."""

    type: Annotated[
        Literal["enabled", "disabled", "adaptive", "between_tools"],
        says("`adaptive`: as the template has it; `between_tools` is refused"),
    ]
    budget_tokens: Annotated[int | None, says("Not used: thinking counts as the answer's tokens")] = None
    display: Annotated[Literal["summarized", "omitted"] | None, says("`omitted`: it is not told; else whole")] = None


class OutputFormat(msgspec.Struct, frozen=True):
    """What the answer's text is."""

    type: Annotated[Annotated[str, Meta(max_length=64)], says("`json_schema`; others are refused")]
    schema: Annotated[dict[str, Any], says("The JSON schema that it satisfies")]


class OutputConfig(msgspec.Struct, frozen=True):
    """Of the answer."""

    format: Annotated[OutputFormat | None, says("What its text is; none: any text")] = None
    effort: Annotated[Any, says("Not used")] = None


class CountRequest(UnsupportedAnthropicWords, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens. Words that would change an answer are refused where there is one."""

    messages: Annotated[
        Annotated[list[InputMessage], Meta(min_length=1, max_length=MESSAGES_MAX)], says("The conversation so far")
    ]
    model: Annotated[Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None, says("The served model")] = None
    system: Annotated[
        str | Annotated[list[ResultBlock], Meta(max_length=PARTS_MAX)] | None, says("What the model shall be")
    ] = None
    tools: Annotated[Annotated[list[MessagesTool], Meta(max_length=TOOLS_MAX)] | None, says("What may be called")] = (
        None
    )
    tool_choice: Annotated[MessagesToolChoice | None, says("Whether tools are called")] = None
    thinking: Annotated[Thinking | None, says("Whether it thinks before it answers")] = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[OutputTokens, says("Longest answer in tokens, thinking included")]
    stop_sequences: Annotated[
        Annotated[list[StopString], Meta(max_length=STOP_STRINGS_MAX)] | None, says("Texts at which the answer ends")
    ] = None
    stream: Annotated[bool | None, says("Send events as they come")] = None
    temperature: Annotated[Temperature | None, says("As for chat")] = None
    top_p: Annotated[Share | None, says("As for chat")] = None
    top_k: Annotated[TopK | None, says("As for chat")] = None
    output_config: Annotated[OutputConfig | None, says("What the answer has to look like")] = None
    output_format: Annotated[OutputFormat | None, says("The former name of `output_config.format`")] = None


class MessagesUsage(msgspec.Struct, frozen=True):
    """Tokens."""

    input_tokens: Annotated[int, says("Of the conversation")]
    output_tokens: Annotated[int, says("Generated, thinking included")]


class MessageAnswer(msgspec.Struct, frozen=True):
    """Answer of /v1/messages. A stream's events have Anthropic's names and shapes."""

    id: Annotated[str, says("The id of the request")]
    type: Annotated[str, says("`message`")]
    role: Annotated[str, says("`assistant`")]
    content: Annotated[list[dict[str, Any]], says("Blocks: `thinking`, `text`, `tool_use`")]
    model: Annotated[str, says("The served model")]
    stop_reason: Annotated[str | None, says("`end_turn`, `max_tokens`, `stop_sequence` or `tool_use`")]
    stop_sequence: Annotated[str | None, says("The text that ended it")]
    usage: Annotated[MessagesUsage, says("Tokens")]


class MessagesEvent(msgspec.Struct, frozen=True):
    """What all events of a streamed message have; the rest has Anthropic's names and shapes, by the type."""

    type: Annotated[str, says("Which: `content_block_delta`, `message_stop`, `error` and others")]


class CountedTokens(msgspec.Struct, frozen=True):
    """Answer of /v1/messages/count_tokens."""

    input_tokens: Annotated[int, says("Of the conversation")]
