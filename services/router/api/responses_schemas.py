"""What clients may send to /v1/responses: the stateless part of it. Nothing is kept, so a conversation comes whole with
each request. Source: OpenAI's API reference, "Create a model response"."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from elasticmoe.common.described import says
from elasticmoe.common.http.ids import REQUEST_ID_PATTERN
from elasticmoe.common.protocol.rank import Share, Temperature
from elasticmoe.services.router.api.schemas import (
    ARGUMENTS_CHARS_MAX,
    MESSAGES_MAX,
    MODEL_CHARS_MAX,
    PARTS_MAX,
    TOOLS_MAX,
    USER_CHARS_MAX,
    OutputTokens,
    ReasoningEffort,
    ToolKind,
    ToolName,
)
from elasticmoe.services.router.api.words import UnsupportedResponsesWords, UnsupportedToolWords

_Id = Annotated[str, Meta(max_length=256)]


class InputPart(msgspec.Struct, frozen=True):
    """A part of a content; texts only."""

    type: Annotated[
        Annotated[str, Meta(max_length=64)], says("`input_text`, `output_text` or `text`; others are refused")
    ]
    text: Annotated[str | None, says("The text")] = None


Content = str | Annotated[list[InputPart], Meta(max_length=PARTS_MAX)]


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of a conversation: a message, a call, what it gave, or what the model thought. Others are refused."""

    type: Annotated[
        Annotated[str, Meta(max_length=64)],
        says("`message`, also where it is absent, `function_call`, `function_call_output` or `reasoning`"),
    ] = "message"
    role: Annotated[Literal["system", "developer", "user", "assistant"] | None, says("Of a message: who says it")] = (
        None
    )
    content: Annotated[Content | None, says("Of a message, or of what was thought")] = None
    call_id: Annotated[_Id | None, says("Of a call and of what it gave: which")] = None
    name: Annotated[Annotated[str, Meta(max_length=256)] | None, says("Of a call: the function")] = None
    arguments: Annotated[
        Annotated[str, Meta(max_length=ARGUMENTS_CHARS_MAX)] | None, says("Of a call: its arguments, as a JSON text")
    ] = None
    output: Annotated[Content | None, says("Of what a call gave")] = None


class FunctionTool(UnsupportedToolWords, frozen=True):
    """What the model may call; there are functions only, and others are refused by name."""

    type: Annotated[ToolKind, says("`function`")]
    name: Annotated[ToolName | None, says("1 to 64 of `a-z A-Z 0-9 _ . -`")] = None
    description: Annotated[str | None, says("What it does, for the model")] = None
    parameters: Annotated[dict[str, Any] | None, says("A JSON schema of its arguments")] = None
    strict: Annotated[bool | None, says("Calls satisfy the schema; absent: where all tools' can be kept to")] = None


class ChosenTool(msgspec.Struct, frozen=True):
    """A tool that is to be called; a function."""

    type: Annotated[ToolKind, says("`function`")]
    name: Annotated[str | None, says("Its name")] = None


class TextFormat(msgspec.Struct, frozen=True):
    """What the text is."""

    type: Annotated[Annotated[str, Meta(max_length=64)], says("`text`, `json_object` or `json_schema`")] = "text"
    name: Annotated[Annotated[str, Meta(max_length=64)] | None, says("Not used")] = None
    schema: Annotated[dict[str, Any] | None, says("Of `json_schema`: the schema; none: any JSON object")] = None
    description: Annotated[str | None, says("Not used")] = None
    strict: Annotated[bool | None, says("Not used: every schema is kept to")] = None


class TextOptions(msgspec.Struct, frozen=True):
    """Of the answer's text."""

    format: Annotated[TextFormat | None, says("Text, or JSON")] = None
    verbosity: Annotated[Annotated[str, Meta(max_length=64)] | None, says("Only `medium`: say it in a message")] = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    """Of what the model thinks."""

    effort: Annotated[ReasoningEffort | None, says("A variable that the chat template must read")] = None


class ResponsesRequest(UnsupportedResponsesWords, frozen=True, kw_only=True):
    """POST /v1/responses. What would need something that is kept, or is no text, is refused by name."""

    input: Annotated[
        str | Annotated[list[InputItem], Meta(min_length=1, max_length=MESSAGES_MAX)],
        says("A text, or the conversation so far"),
    ]
    model: Annotated[Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None, says("The served model")] = None
    instructions: Annotated[str | None, says("A system message before the conversation")] = None
    max_output_tokens: Annotated[OutputTokens | None, says("Longest answer in tokens")] = None
    temperature: Annotated[Temperature | None, says("As for chat")] = None
    top_p: Annotated[Share | None, says("As for chat")] = None
    stream: Annotated[bool | None, says("Send events as they come")] = None
    tools: Annotated[Annotated[list[FunctionTool], Meta(max_length=TOOLS_MAX)] | None, says("What may be called")] = (
        None
    )
    tool_choice: Annotated[Literal["none", "auto", "required"] | ChosenTool | None, says("As for chat")] = None
    parallel_tool_calls: Annotated[bool | None, says("Off: only the first call is told")] = None
    text: Annotated[TextOptions | None, says("What the text is")] = None
    reasoning: Annotated[ReasoningOptions | None, says("How the model thinks")] = None
    metadata: Annotated[dict[str, str] | None, says("Told back, and not used")] = None
    user: Annotated[Annotated[str, Meta(max_length=USER_CHARS_MAX)] | None, says("Checked, and not used")] = None
    request_id: Annotated[Annotated[str, Meta(pattern=REQUEST_ID_PATTERN)] | None, says("As for chat")] = None
    previous_response_id: Annotated[Any, says("Refused: nothing is kept")] = None
    conversation: Annotated[Any, says("Refused: nothing is kept")] = None
    background: Annotated[bool | None, says("Refused where true: nothing is kept")] = None
    prompt: Annotated[Any, says("Refused: no prompts are kept")] = None
    truncation: Annotated[Literal["disabled", "auto"] | None, says("`disabled`; `auto` is refused")] = None
    top_logprobs: Annotated[int | None, says("0; more is refused")] = None
    max_tool_calls: Annotated[Any, says("Refused: it concerns tools that the server runs")] = None
