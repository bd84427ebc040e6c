"""POST /v1/chat/completions."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Request, Response

from common.protocol.errors import InvalidRequest
from services.router.api.answer import Answer
from services.router.api.conversation import conversation_of, encode_chat
from services.router.api.docs import describe
from services.router.api.gate import front_of, permit_of, request_id_of
from services.router.api.generate import Generation, start
from services.router.api.options import Options, options_of, unsupported
from services.router.api.parse import parse
from services.router.api.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from services.router.detokenizer import TokenTable
from services.router.front import Front
from services.router.streams import Output, Stream, TokenInfo

IMPOSSIBLE = -9999.0

routes = APIRouter()
_decoder = msgspec.json.Decoder(ChatRequest)
_encode = msgspec.json.encode


@routes.post("/v1/chat/completions", **describe(ChatRequest, ChatCompletion, is_stream=True))
async def chat_completions(request: Request) -> Response:
    """Continue a conversation."""
    front = front_of(request)
    raw = parse(_decoder, await request.body())
    front.check_model(raw.model)
    _refuse_tools(raw)
    options = _options(raw, front)
    prompt = await encode_chat(front, conversation_of(raw))
    front.model.check_embedded(prompt)
    generation = start(front, permit_of(request), options, [prompt], kind="chatcmpl")
    renderer = ChatRenderer(f"chatcmpl-{request_id_of(request, raw.request_id)}", front, options)
    return Answer(generation, renderer, is_stream=options.is_stream)


def _options(raw: ChatRequest, front: Front) -> Options:
    if raw.top_logprobs and not raw.logprobs:
        raise InvalidRequest("top_logprobs is only allowed with logprobs", param="top_logprobs")
    most = raw.max_completion_tokens if raw.max_completion_tokens is not None else raw.max_tokens
    logprobs = (raw.top_logprobs or 0) if raw.logprobs else -1
    return options_of(raw, front.model, max_tokens=most, logprobs=logprobs)


def _refuse_tools(raw: ChatRequest) -> None:
    if raw.tools and raw.tool_choice != "none":
        raise unsupported("tools", "pass tool_choice none to have them ignored")
    if not raw.tools and raw.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "there are no tools")


class ChatRenderer:
    """Chat's shapes. The parts of an event that do not change are made once."""

    def __init__(self, answer_id: str, front: Front, options: Options) -> None:
        self._id = answer_id
        self._model = front.model.name
        self._table = front.model.table
        self._created = int(time.time())
        self._wants_logprobs = options.sampling.logprobs >= 0
        self._num_top = options.sampling.logprobs
        self._include_usage = options.include_usage
        facts = {"id": answer_id, "object": "chat.completion.chunk", "created": self._created, "model": self._model}
        self._head = b"data: " + _encode(facts)[:-1]
        self._end = b'}],"usage":null}\n\n' if options.include_usage else b"}]}\n\n"

    def _event(self, index: int, delta: bytes, logprobs: bytes, finish: bytes) -> bytes:
        return b'%b,"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            delta,
            logprobs,
            finish,
            self._end,
        )

    def opening(self, index: int, _stream: Stream) -> bytes:
        """The event with the role."""
        return self._event(index, b'{"role":"assistant","content":""}', b"null", b"null")

    def events(self, index: int, output: Output, finish_reason: str | None) -> bytes:
        """An event with text, one with the finish reason."""
        events = b""
        if output.text or output.tokens:
            logprobs = _encode(self._logprobs(output.tokens)) if self._wants_logprobs else b"null"
            events = self._event(index, b'{"content":%b}' % _encode(output.text), logprobs, b"null")
        if finish_reason is not None:
            events += self._event(index, b"{}", b"null", _encode(finish_reason))
        return events

    def usage_event(self, generation: Generation) -> bytes:
        """The event with the usage and no choices."""
        if not self._include_usage:
            return b""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, _encode(usage_of(generation)))

    def body(self, generation: Generation, outputs: list[Output]) -> bytes:
        """A chat.completion object."""
        choices = []
        for index, (stream, output) in enumerate(zip(generation.streams, outputs, strict=True)):
            assert stream.ending is not None
            logprobs = self._logprobs(output.tokens) if self._wants_logprobs else None
            message = AnswerMessage("assistant", output.text)
            choices.append(ChatChoice(index, message, logprobs, stream.ending.reason))
        usage = usage_of(generation)
        return _encode(ChatCompletion(self._id, "chat.completion", self._created, self._model, choices, usage))

    def _logprobs(self, tokens: list[TokenInfo]) -> ChatLogprobs:
        return ChatLogprobs([_token_logprob(self._table, token, self._num_top) for token in tokens])


def _token_logprob(table: TokenTable, token: TokenInfo, num_top: int) -> TokenLogprob:
    top = [
        TopLogprob(table.text_of(token_id), finite(value), list(table.bytes_of(token_id)))
        for token_id, value in token.logprob.top[:num_top]
    ]
    raw = table.bytes_of(token.token_id)
    return TokenLogprob(raw.decode(errors="replace"), finite(token.logprob.token), list(raw), top)


def finite(logprob: float) -> float:
    """JSON has no infinities: an impossible token's log probability becomes OpenAI's -9999."""
    return max(logprob, IMPOSSIBLE)


def usage_of(generation: Generation) -> Usage:
    """Tokens of prompts and choices."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return Usage(prompt, completion, prompt + completion)
