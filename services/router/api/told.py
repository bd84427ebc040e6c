"""What clients are told: the bodies of answers, field by field. They describe answers in the OpenAPI document too."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from elasticmoe.common.described import says


class CompletionDetails(msgspec.Struct, frozen=True):
    """Of the tokens that were generated."""

    reasoning_tokens: Annotated[int, says("What the model thought, up to the mark that closes it")]


class Usage(msgspec.Struct, frozen=True):
    """Tokens: the prompts' (each once, whatever `n`), and those generated, up to a stop string's last."""

    prompt_tokens: Annotated[int, says("Of the prompts, each once whatever `n`")]
    completion_tokens: Annotated[int, says("Generated, up to a stop string's last")]
    total_tokens: Annotated[int, says("Both")]
    completion_tokens_details: Annotated[
        CompletionDetails | msgspec.UnsetType, says("In chat, where the model thinks")
    ] = msgspec.UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative to a token."""

    token: Annotated[str, says("The token as a text")]
    logprob: Annotated[float, says("Log probability")]
    bytes: Annotated[list[int], says("What it stands for, also where it is no whole character")]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A generated token with its alternatives, best first."""

    token: Annotated[str, says("The token as a text")]
    logprob: Annotated[float, says("Log probability")]
    bytes: Annotated[list[int], says("What it stands for")]
    top_logprobs: Annotated[list[TopLogprob], says("Alternatives, best first")]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a chat choice."""

    content: Annotated[list[TokenLogprob], says("One entry a token")]


class ToldFunction(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is called."""

    arguments: Annotated[str, says("Its arguments as a JSON text, as the model writes them")]
    name: Annotated[str | msgspec.UnsetType, says("The function")] = msgspec.UNSET


class ToldCall(msgspec.Struct, frozen=True):
    """A call that the model asks for."""

    id: Annotated[str, says("What the message with its result names")]
    type: Annotated[str, says("`function`")]
    function: Annotated[ToldFunction, says("What is called")]


class AnswerMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """The assistant's message."""

    role: Annotated[str, says("`assistant`")]
    content: Annotated[str | None, says("The text; null where there are calls and no text")]
    tool_calls: Annotated[list[ToldCall] | msgspec.UnsetType, says("Calls, where there are any")] = msgspec.UNSET
    reasoning_content: Annotated[str | msgspec.UnsetType, says("What the model thought, where it did")] = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: Annotated[int, says("Its number")]
    message: Annotated[AnswerMessage, says("What the model says")]
    logprobs: Annotated[ChatLogprobs | None, says("Where they were asked for")]
    finish_reason: Annotated[str, says("`stop`, `length` or `tool_calls`")]


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of /v1/chat/completions without streaming."""

    id: Annotated[str, says("The id of the request")]
    object: Annotated[str, says("`chat.completion`")]
    created: Annotated[int, says("When, in seconds since 1970")]
    model: Annotated[str, says("The served model")]
    choices: Annotated[list[ChatChoice], says("`n` answers")]
    usage: Annotated[Usage, says("Tokens")]


class CallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of a call: the first has its id and name, the following ones continue its arguments."""

    index: Annotated[int, says("The call's number in the message")]
    function: Annotated[ToldFunction, says("Its name, or the next part of its arguments")]
    id: Annotated[str | msgspec.UnsetType, says("What the message with its result names")] = msgspec.UNSET
    type: Annotated[str | msgspec.UnsetType, says("`function`")] = msgspec.UNSET


class ResponsesUsage(msgspec.Struct, frozen=True):
    """Tokens of a response."""

    input_tokens: Annotated[int, says("Of the conversation")]
    input_tokens_details: Annotated[dict[str, int], says("`cached_tokens`, always 0")]
    output_tokens: Annotated[int, says("Generated")]
    output_tokens_details: Annotated[dict[str, int], says("`reasoning_tokens`: as for chat")]
    total_tokens: Annotated[int, says("Both")]


class ResponsesEvent(msgspec.Struct, frozen=True):
    """What all events of a streamed response have; the rest has OpenAI's names and shapes, by the type."""

    type: Annotated[str, says("Which: `response.output_text.delta`, `response.completed`, `error` and others")]
    sequence_number: Annotated[int, says("Of the event, from 0")]


class ModelResponse(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer of /v1/responses. A stream's events have OpenAI's names and shapes; the last one has this."""

    id: Annotated[str, says("The id of the request")]
    object: Annotated[str, says("`response`")]
    created_at: Annotated[int, says("When, in seconds since 1970")]
    model: Annotated[str, says("The served model")]
    status: Annotated[str, says("`completed`; `incomplete` where the answer was cut off")]
    output: Annotated[
        list[dict[str, Any]], says("Items in their order: `reasoning`, `message`, `function_call`, in OpenAI's shapes")
    ]
    usage: Annotated[ResponsesUsage | None, says("Tokens")]
    incomplete_details: Annotated[dict[str, str] | None, says("Why it was cut off")] = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message: the first its role, the last nothing."""

    role: Annotated[str | msgspec.UnsetType, says("`assistant`")] = msgspec.UNSET
    content: Annotated[str | msgspec.UnsetType, says("The next part of the text")] = msgspec.UNSET
    tool_calls: Annotated[list[CallDelta] | msgspec.UnsetType, says("The next part of a call")] = msgspec.UNSET
    reasoning_content: Annotated[str | msgspec.UnsetType, says("The next part of what it thinks")] = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer."""

    index: Annotated[int, says("Its number")]
    delta: Annotated[ChatDelta, says("What is new")]
    logprobs: Annotated[ChatLogprobs | None, says("Of what is new, where they were asked for")]
    finish_reason: Annotated[str | None, says("`stop`, `length` or `tool_calls` in the choice's last chunk")]


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """An event of a streamed chat."""

    id: Annotated[str, says("The id of the request")]
    object: Annotated[str, says("`chat.completion.chunk`")]
    created: Annotated[int, says("When, in seconds since 1970")]
    model: Annotated[str, says("The served model's name")]
    choices: Annotated[list[ChatChunkChoice], says("One choice's piece; none beside the usage at the end")]
    usage: Annotated[
        Usage | msgspec.UnsetType | None, says("As `stream_options` ask: absent, in the last chunk, or in each")
    ] = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a completion, one entry a token; null for a prompt's first."""

    tokens: Annotated[list[str], says("The tokens as texts")]
    token_logprobs: Annotated[list[float | None], says("Of each token; null for a prompt's first")]
    top_logprobs: Annotated[list[dict[str, float] | None], says("Of alternatives, by their texts")]
    text_offset: Annotated[list[int], says("Where each token begins in the text")]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One completion."""

    index: Annotated[int, says("Its number")]
    text: Annotated[str, says("The text")]
    logprobs: Annotated[CompletionLogprobs | None, says("Where they were asked for")]
    finish_reason: Annotated[str | None, says("`stop` or `length`")]


class Completion(msgspec.Struct, frozen=True):
    """Answer of /v1/completions without streaming."""

    id: Annotated[str, says("The id of the request")]
    object: Annotated[str, says("`text_completion`")]
    created: Annotated[int, says("When, in seconds since 1970")]
    model: Annotated[str, says("The served model")]
    choices: Annotated[list[CompletionChoice], says("`n` answers to each prompt")]
    usage: Annotated[Usage, says("Tokens")]


class CompletionChunk(msgspec.Struct, frozen=True):
    """An event of a streamed completion."""

    id: Annotated[str, says("The id of the request")]
    object: Annotated[str, says("`text_completion`")]
    created: Annotated[int, says("When, in seconds since 1970")]
    model: Annotated[str, says("The served model's name")]
    choices: Annotated[list[CompletionChoice], says("One choice's piece; none beside the usage at the end")]
    usage: Annotated[
        Usage | msgspec.UnsetType | None, says("As `stream_options` ask: absent, in the last chunk, or in each")
    ] = msgspec.UNSET


class Tokenized(msgspec.Struct, frozen=True):
    """Answer of /tokenize."""

    count: Annotated[int, says("How many tokens")]
    max_model_len: Annotated[int, says("Longest sequence of the model")]
    tokens: Annotated[list[int], says("Token ids")]
    token_strs: Annotated[list[str] | None, says("The tokens as texts, where they were asked for")] = None


class Detokenized(msgspec.Struct, frozen=True):
    """Answer of /detokenize."""

    prompt: Annotated[str, says("The text")]


class ModelCard(msgspec.Struct, frozen=True):
    """A served model."""

    id: Annotated[str, says("Its name")]
    object: Annotated[str, says("`model`")]
    created: Annotated[int, says("When it was first served, in seconds since 1970")]
    owned_by: Annotated[str, says("`elasticmoe`")]
    max_model_len: Annotated[int | None, says("Longest sequence in tokens; null until a replica has reported")]
    default_sampling_params: Annotated[
        dict[str, float], says("What requests that say nothing else get, where that is not OpenAI's")
    ]


class ModelList(msgspec.Struct, frozen=True):
    """Answer of /v1/models."""

    object: Annotated[str, says("`list`")]
    data: Annotated[list[ModelCard], says("One model")]


class Health(msgspec.Struct, frozen=True):
    """The process lives."""

    status: Annotated[str, says("`ok`")]


class Ready(msgspec.Struct, frozen=True):
    """Whether a request would be served, and why (not)."""

    phase: Annotated[str, says("`serving`, `waiting` for replicas, or `draining`")]
    reason: Annotated[str, says("Why (not)")]


class Version(msgspec.Struct, frozen=True):
    """The software's version."""

    version: Annotated[str, says("Of the software")]


class ReplicaLoad(msgspec.Struct, frozen=True):
    """One replica as the balancer sees it."""

    rank: Annotated[str, says("Its leading rank")]
    requests: Annotated[int, says("Running and waiting")]
    prompt_tokens_queued: Annotated[int, says("Prompt tokens to be computed")]
    kv_blocks_free: Annotated[int, says("KV blocks that are free")]
    kv_blocks_total: Annotated[int, says("KV blocks")]
    is_fresh: Annotated[bool, says("It makes progress and gets new work")]


class Load(msgspec.Struct, frozen=True):
    """How busy the router and its replicas are."""

    server_load: Annotated[int, says("Requests that are served")]
    limit: Annotated[int, says("Most at once: `requests_max`")]
    epoch: Annotated[int, says("Of the layout that requests are sent by")]
    replicas: Annotated[list[ReplicaLoad], says("All replicas that have reported")]
