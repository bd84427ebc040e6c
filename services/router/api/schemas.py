"""What clients may send, field by field with its bounds. Decoded strictly: no coercion, no NaN, unknown fields ignored.

The same structs describe the bodies in the OpenAPI document. A field that is None counts as not given, as OpenAI's
clients send it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from common.http.ids import REQUEST_ID_PATTERN
from common.protocol.limits import (
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    PROMPT_TOKENS_MAX,
    STOP_STRING_CHARS_MAX,
    STOP_STRINGS_MAX,
    STOP_TOKEN_IDS_MAX,
    VOCAB_MAX,
)
from common.protocol.rank import OutputPenalty, RepetitionPenalty, Share, Temperature, TokenBias, TokenId
from services.router.api.whole import whole
from services.router.api.words import UnsupportedMessageWords, UnsupportedWords

CHOICES_MAX = 128
BATCH_MAX = 64
MESSAGES_MAX = 4_096
PARTS_MAX = 256
USER_CHARS_MAX = 512
MODEL_CHARS_MAX = 256
TEMPLATE_KWARGS_MAX = 64
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
    """`include_usage`: one more chunk before the end, with the usage and no choices. `continuous_usage_stats`: every
    chunk has the usage so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """Only `text` is supported; `json_object` and `json_schema` are refused."""

    type: Annotated[str, Meta(max_length=64)]


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only `text` parts are supported."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None


class ChatMessage(UnsupportedMessageWords, frozen=True, kw_only=True):
    """One message of a conversation. An assistant's reasoning goes by any of its three names."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Meta(max_length=PARTS_MAX)] | None = None
    name: Annotated[str, Meta(max_length=USER_CHARS_MAX)] | None = None
    tool_calls: list[msgspec.Raw] | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    reasoning: str | None = None


class GenerateRequest(UnsupportedWords, frozen=True, kw_only=True):
    """What chat and completions have in common. What is None takes the model's default, else OpenAI's."""

    model: Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None = None
    max_tokens: OutputTokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    n: Choices | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=STOP_STRINGS_MAX)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: OutputPenalty | None = None
    frequency_penalty: OutputPenalty | None = None
    logit_bias: Annotated[dict[TokenId, TokenBias], Meta(max_length=LOGIT_BIAS_MAX)] | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Meta(max_length=USER_CHARS_MAX)] | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None
    min_tokens: NumTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[WholeId], Meta(max_length=STOP_TOKEN_IDS_MAX // 2)] | None = None
    skip_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Priority | None = None
    request_id: Annotated[str, Meta(pattern=REQUEST_ID_PATTERN)] | None = None


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions. `max_completion_tokens` is the newer name of `max_tokens`; without either, the rest of
    the context may be used. `tools`, and `functions` as they were called before, are accepted only with `tool_choice`
    (`function_call`) "none". `continue_final_message`: the answer goes on with the last message, or the named field of
    it. `chat_template_kwargs` are variables of the chat template (`enable_thinking`); `reasoning_effort` is one that
    the template must read."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: OutputTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: str | dict[str, msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None
    function_call: str | dict[str, msgspec.Raw] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | FinalField | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    documents: Documents | None = None
    reasoning_effort: ReasoningEffort | None = None


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt`: a text, a list of texts, a list of token ids, or a list of those; at most 64
    prompts. `max_tokens` 0, with `echo`: nothing is generated; with `logprobs`, the prompt is rated. `best_of` has to
    be `n`. `add_special_tokens` False: a text is tokenized without the special tokens that begin a sequence."""

    prompt: Prompt
    max_tokens: NumTokens | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Choices | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: either `prompt` or `messages`, whose options are those of chat. `add_special_tokens`: by default
    only around a `prompt`; a chat template writes its own."""

    model: Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MESSAGES_MAX)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | FinalField | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    chat_template: str | None = None
    documents: Documents | None = None
    reasoning_effort: ReasoningEffort | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: str | dict[str, msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None
    function_call: str | dict[str, msgspec.Raw] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: Annotated[str, Meta(max_length=MODEL_CHARS_MAX)] | None = None
    tokens: Annotated[list[WholeId], Meta(max_length=PROMPT_TOKENS_MAX)]


# ---- answers ---------------------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, frozen=True):
    """Tokens: the prompts' (each once, whatever `n`), and those generated, up to a stop string's last."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative to a token. `bytes`: what it stands for, also where it is no whole character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A generated token with its alternatives, best first."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a chat choice."""

    content: list[TokenLogprob]


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's message."""

    role: str
    content: str


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of /v1/chat/completions without streaming."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message: the first its role, the last nothing."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """An event of a streamed chat. `usage`: null but in the last, or in every one, or not there at all: as asked for by
    `stream_options`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a completion, one entry a token; null for a prompt's first."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True):
    """Answer of /v1/completions without streaming."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(msgspec.Struct, frozen=True):
    """An event of a streamed completion. `usage`: as a chat's chunk has it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Tokenized(msgspec.Struct, frozen=True):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """Answer of /detokenize."""

    prompt: str


class ModelCard(msgspec.Struct, frozen=True):
    """A served model. `max_model_len`: null until a replica has reported. `default_sampling_params`: what requests that
    say nothing else get, where the model asks for other defaults than OpenAI's."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    default_sampling_params: dict[str, float]


class ModelList(msgspec.Struct, frozen=True):
    """Answer of /v1/models."""

    object: str
    data: list[ModelCard]


class Health(msgspec.Struct, frozen=True):
    """The process lives."""

    status: str


class Ready(msgspec.Struct, frozen=True):
    """Whether a request would be served, and why (not). `phase`: `serving`, `waiting` for replicas, or `draining`."""

    phase: str
    reason: str


class Version(msgspec.Struct, frozen=True):
    """The software's version."""

    version: str


class ReplicaLoad(msgspec.Struct, frozen=True):
    """One replica as the balancer sees it. `is_fresh`: it makes progress and gets new work."""

    rank: str
    requests: int
    prompt_tokens_queued: int
    kv_blocks_free: int
    kv_blocks_total: int
    is_fresh: bool


class Load(msgspec.Struct, frozen=True):
    """`server_load`: generations that run, of at most `limit`."""

    server_load: int
    limit: int
    epoch: int
    replicas: list[ReplicaLoad]
