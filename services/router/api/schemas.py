"""What clients may send, field by field with its bounds. Decoded strictly: no coercion, no NaN, unknown fields ignored.

The same structs describe the bodies in the OpenAPI document. A field that is None counts as not given, as OpenAI's
clients send it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from elasticmoe.common.described import says
from elasticmoe.common.http.ids import REQUEST_ID_PATTERN
from elasticmoe.common.protocol.limits import (
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    PROMPT_TOKENS_MAX,
    STOP_STRING_CHARS_MAX,
    STOP_STRINGS_MAX,
    STOP_TOKEN_IDS_MAX,
    VOCAB_MAX,
)
from elasticmoe.common.protocol.rank import OutputPenalty, RepetitionPenalty, Share, Temperature, TokenBias, TokenId
from elasticmoe.services.router.api.whole import whole
from elasticmoe.services.router.api.words import UnsupportedMessageWords, UnsupportedWords
from elasticmoe.services.router.grammar.structure import CHOICES_MAX as CHOICES_MAX_OF_STRUCTURE

CHOICES_MAX = 128
BATCH_MAX = 64
MESSAGES_MAX = 4_096
PARTS_MAX = 256
USER_CHARS_MAX = 512
MODEL_CHARS_MAX = 256
TEMPLATE_KWARGS_MAX = 64
TOOLS_MAX = 128
TOOL_CALLS_MAX = 128
ARGUMENTS_CHARS_MAX = 1 << 20
DOCUMENTS_MAX = 256

if TYPE_CHECKING:  # what they are once `to_integers` has seen them
    Whole: TypeAlias = int
    Choices: TypeAlias = int
    NumTokens: TypeAlias = int
    OutputTokens: TypeAlias = int
    NumLogprobs: TypeAlias = int
    Seed: TypeAlias = int
    TopK: TypeAlias = int
    Priority: TypeAlias = int
    WholeId: TypeAlias = int
else:
    Whole = whole()
    Choices = whole(1, CHOICES_MAX)
    NumTokens = whole(0, PROMPT_TOKENS_MAX)
    OutputTokens = whole(1, PROMPT_TOKENS_MAX)
    NumLogprobs = whole(0, LOGPROBS_MAX)
    Seed = whole(-(1 << 63), (1 << 63) - 1)
    TopK = whole(-1, VOCAB_MAX)
    Priority = whole(-1_000, 1_000)
    WholeId = whole(0, VOCAB_MAX - 1)

StopString = Annotated[str, Meta(min_length=1, max_length=STOP_STRING_CHARS_MAX)]
Prompt = str | Annotated[list[str | Whole | list[Whole]], Meta(min_length=1, max_length=PROMPT_TOKENS_MAX)]
TemplateKwargs = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Any], Meta(max_length=TEMPLATE_KWARGS_MAX)
]
Documents = Annotated[list[dict[str, Any]], Meta(max_length=DOCUMENTS_MAX)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
FinalField = Literal["content", "reasoning_content", "thinking", "reasoning"]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream has beside tokens."""

    include_usage: Annotated[bool | None, says("One more chunk before the end, with the usage and no choices")] = None
    continuous_usage_stats: Annotated[bool | None, says("Every chunk has the usage so far")] = None


class JsonSchemaFormat(msgspec.Struct, frozen=True):
    """A schema that the answer satisfies."""

    name: Annotated[Annotated[str, Meta(max_length=64)] | None, says("Not used")] = None
    schema: Annotated[dict[str, Any] | None, says("The JSON schema; none: any JSON object")] = None
    description: Annotated[str | None, says("Not used")] = None
    strict: Annotated[bool | None, says("Not used: every schema is kept to")] = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """What the answer is."""

    type: Annotated[Annotated[str, Meta(max_length=64)], says("`text`, `json_object` or `json_schema`")]
    json_schema: Annotated[JsonSchemaFormat | None, says("Of `json_schema`")] = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer has to look like, in vLLM's words; one of them."""

    json: Annotated[dict[str, Any] | str | None, says("A JSON schema, or its text")] = None
    regex: Annotated[str | None, says("A regular expression that the whole answer matches")] = None
    choice: Annotated[
        Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=CHOICES_MAX_OF_STRUCTURE)]
        | None,
        says("One of these texts"),
    ] = None
    grammar: Annotated[str | None, says("A grammar in llguidance's Lark, or in GBNF")] = None
    json_object: Annotated[bool | None, says("Any JSON object")] = None
    structural_tag: Annotated[Any, says("Refused")] = None
    disable_any_whitespace: Annotated[bool | None, says("Refused where true")] = None
    disable_additional_properties: Annotated[bool | None, says("Refused where true: say it in the schema")] = None
    whitespace_pattern: Annotated[str | None, says("Refused")] = None
    disable_fallback: Annotated[bool | None, says("Not used: there is one backend")] = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only `text` parts are supported."""

    type: Annotated[Annotated[str, Meta(max_length=64)], says("`text`; others are refused")]
    text: Annotated[str | None, says("The text")] = None


ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}\Z")]
ToolKind = Annotated[str, Meta(max_length=64)]


class FunctionDefinition(msgspec.Struct, frozen=True):
    """What the model may call."""

    name: Annotated[ToolName, says("1 to 64 of `a-z A-Z 0-9 _ . -`")]
    description: Annotated[str | None, says("What it does, for the model")] = None
    parameters: Annotated[dict[str, Any] | None, says("A JSON schema of its arguments; none: it takes none")] = None
    strict: Annotated[bool | None, says("Calls satisfy the schema; those that are `required` do anyway")] = None


class Tool(msgspec.Struct, frozen=True):
    """A tool; there are functions only, and others are refused."""

    type: Annotated[ToolKind, says("`function`")]
    function: Annotated[FunctionDefinition | None, says("The function")] = None


class NamedFunction(msgspec.Struct, frozen=True):
    """One of the functions."""

    name: Annotated[str, says("Its name")]


class NamedTool(msgspec.Struct, frozen=True):
    """One of the tools, which is to be called."""

    type: Annotated[ToolKind, says("`function`; others are refused")]
    function: Annotated[NamedFunction | None, says("Which")] = None


class CalledFunction(msgspec.Struct, frozen=True):
    """What an assistant called."""

    name: Annotated[Annotated[str, Meta(max_length=256)], says("The function's name")]
    arguments: Annotated[Annotated[str, Meta(max_length=ARGUMENTS_CHARS_MAX)], says("Its arguments, as a JSON text")]


class ToolCall(msgspec.Struct, frozen=True):
    """A call that an assistant's message asks for."""

    function: Annotated[CalledFunction, says("What is called")]
    id: Annotated[Annotated[str, Meta(max_length=256)] | None, says("What the answer to it names")] = None
    type: Annotated[Literal["function"], says("`function`")] = "function"


class ChatMessage(UnsupportedMessageWords, frozen=True, kw_only=True):
    """One message of a conversation. An assistant's reasoning goes by any of its three names."""

    role: Annotated[Literal["system", "developer", "user", "assistant", "tool", "function"], says("Who says it")]
    content: Annotated[
        str | Annotated[list[ContentPart], Meta(max_length=PARTS_MAX)] | None,
        says("What is said, as a text or in parts"),
    ] = None
    name: Annotated[Annotated[str, Meta(max_length=USER_CHARS_MAX)] | None, says("Who of that role")] = None
    tool_calls: Annotated[
        Annotated[list[ToolCall], Meta(max_length=TOOL_CALLS_MAX)] | None, says("What an assistant called")
    ] = None
    tool_call_id: Annotated[
        Annotated[str, Meta(max_length=256)] | None, says("Of a tool's message: which call it answers")
    ] = None
    reasoning_content: Annotated[str | None, says("An assistant's reasoning")] = None
    thinking: Annotated[str | None, says("Another name of it")] = None
    reasoning: Annotated[str | None, says("Another name of it")] = None


class GenerateRequest(UnsupportedWords, frozen=True, kw_only=True):
    """What chat and completions have in common. What is None takes the model's default, else OpenAI's."""

    model: Annotated[
        Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None, says("The served model; `GET /v1/models` names it")
    ] = None
    max_tokens: Annotated[OutputTokens | None, says("Longest answer in tokens")] = None
    temperature: Annotated[
        Temperature | None, says("0 takes the most probable token; else the spread of the choice")
    ] = None
    top_p: Annotated[Share | None, says("Only the most probable tokens of this share together")] = None
    n: Annotated[Choices | None, says("Answers to each prompt")] = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Meta(max_length=STOP_STRINGS_MAX)] | None,
        says("Texts at which the answer ends, without them"),
    ] = None
    seed: Annotated[Seed | None, says("The same seed gives the same answer, whatever else is served")] = None
    stream: Annotated[bool | None, says("Send tokens as they come, as server-sent events")] = None
    stream_options: Annotated[StreamOptions | None, says("What a stream has beside tokens")] = None
    presence_penalty: Annotated[OutputPenalty | None, says("Taken from the score of tokens that the answer has")] = None
    frequency_penalty: Annotated[OutputPenalty | None, says("The same, for each time that it has them")] = None
    logit_bias: Annotated[
        Annotated[dict[TokenId, TokenBias], Meta(max_length=LOGIT_BIAS_MAX)] | None,
        says("Added to the scores of tokens, by their ids"),
    ] = None
    response_format: Annotated[ResponseFormat | None, says("What the answer is: any text, or JSON")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, says("What the answer has to look like; excludes `response_format` but for text")
    ] = None
    user: Annotated[Annotated[str, Meta(max_length=USER_CHARS_MAX)] | None, says("Checked, and not used")] = None
    top_k: Annotated[TopK | None, says("Only so many of the most probable tokens; 0 or -1: all")] = None
    min_p: Annotated[
        Share | None, says("Only tokens of at least this share of the most probable one's probability")
    ] = None
    repetition_penalty: Annotated[
        RepetitionPenalty | None, says("Divides the scores of tokens that prompt or answer have")
    ] = None
    min_tokens: Annotated[NumTokens | None, says("The answer does not end before")] = None
    ignore_eos: Annotated[bool | None, says("Go on after the model's own end")] = None
    stop_token_ids: Annotated[
        Annotated[list[WholeId], Meta(max_length=STOP_TOKEN_IDS_MAX // 2)] | None,
        says("Tokens at which the answer ends"),
    ] = None
    skip_special_tokens: Annotated[bool | None, says("Leave special tokens out of the text")] = None
    return_tokens_as_token_ids: Annotated[bool | None, says("Log probabilities call tokens `token_id:17`")] = None
    priority: Annotated[Priority | None, says("Lower goes first; refused unless `allow_priority` is set")] = None
    request_id: Annotated[
        Annotated[str, Meta(pattern=REQUEST_ID_PATTERN)] | None,
        says("The id of the request where `X-Request-Id` gives none"),
    ] = None


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[
        Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)], says("The conversation so far")
    ]
    max_completion_tokens: Annotated[
        OutputTokens | None, says("The newer name of `max_tokens`; without either the answer may fill the context")
    ] = None
    logprobs: Annotated[bool | None, says("Tell log probabilities of the answer")] = None
    top_logprobs: Annotated[NumLogprobs | None, says("And of so many alternatives to each token")] = None
    tools: Annotated[
        Annotated[list[Tool], Meta(max_length=TOOLS_MAX)] | None,
        says("What the model may call"),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        says("`auto`: the model decides; `none`: tools are ignored; `required`, or one tool: it calls"),
    ] = None
    parallel_tool_calls: Annotated[bool | None, says("Off: an answer's first call is told, and no other")] = None
    include_reasoning: Annotated[bool | None, says("Off: what the model thinks is not told")] = None
    separate_reasoning: Annotated[bool | None, says("Off: what it thinks is a part of the text")] = None
    functions: Annotated[list[msgspec.Raw] | None, says("The former name of `tools`: refused but for none")] = None
    function_call: Annotated[str | dict[str, msgspec.Raw] | None, says("The former name of `tool_choice`")] = None
    add_generation_prompt: Annotated[bool | None, says("End the prompt with the beginning of the assistant's turn")] = (
        None
    )
    continue_final_message: Annotated[
        bool | FinalField | None, says("Go on with the last message, or with the named field of it")
    ] = None
    add_special_tokens: Annotated[bool | None, says("Add special tokens to what the template wrote")] = None
    chat_template_kwargs: Annotated[
        TemplateKwargs | None, says("Variables of the chat template, such as `enable_thinking`")
    ] = None
    documents: Annotated[Documents | None, says("Documents for the chat template")] = None
    reasoning_effort: Annotated[ReasoningEffort | None, says("A variable that the chat template must read")] = None


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: Annotated[
        Prompt, says("A text, a list of texts, a list of token ids, or a list of those; at most 64 prompts")
    ]
    max_tokens: Annotated[
        NumTokens | None,
        says("Longest answer in tokens; 0, with `echo`: nothing is generated, and `logprobs` rate the prompt"),
    ] = None
    echo: Annotated[bool | None, says("Begin the answer with the prompt")] = None
    add_special_tokens: Annotated[
        bool | None, says("Off: tokenize a text without the special tokens that begin a sequence")
    ] = None
    logprobs: Annotated[NumLogprobs | None, says("Tell log probabilities, and those of so many alternatives")] = None
    best_of: Annotated[Choices | None, says("Has to be `n`")] = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`, whose options are those of chat."""

    model: Annotated[Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None, says("The served model")] = None
    prompt: Annotated[str | None, says("The text to tokenize; or give `messages`")] = None
    messages: Annotated[
        Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)] | None,
        says("The conversation to tokenize"),
    ] = None
    add_special_tokens: Annotated[bool | None, says("By default only around a `prompt`")] = None
    add_generation_prompt: Annotated[bool | None, says("End with the beginning of the assistant's turn")] = None
    continue_final_message: Annotated[bool | FinalField | None, says("Leave the last message open")] = None
    chat_template_kwargs: Annotated[TemplateKwargs | None, says("Variables of the chat template")] = None
    chat_template: Annotated[str | None, says("Refused: a template comes with the model only")] = None
    documents: Annotated[Documents | None, says("Documents for the chat template")] = None
    reasoning_effort: Annotated[ReasoningEffort | None, says("A variable that the chat template must read")] = None
    tools: Annotated[Annotated[list[Tool], Meta(max_length=TOOLS_MAX)] | None, says("As for chat")] = None
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool | None, says("As for chat")] = None
    functions: Annotated[list[msgspec.Raw] | None, says("The former name of `tools`")] = None
    function_call: Annotated[str | dict[str, msgspec.Raw] | None, says("The former name of `tool_choice`")] = None
    return_token_strs: Annotated[bool | None, says("Answer the tokens as texts, too")] = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: Annotated[Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None, says("The served model")] = None
    tokens: Annotated[Annotated[list[WholeId], Meta(max_length=PROMPT_TOKENS_MAX)], says("Token ids")]


# ---- answers ---------------------------------------------------------------------------------------------------------
