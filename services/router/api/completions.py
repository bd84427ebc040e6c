"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from common.protocol.errors import InvalidRequest
from common.protocol.router import Logprob
from services.router.api.answer import Answer
from services.router.api.chat import finite, usage_of
from services.router.api.docs import describe
from services.router.api.gate import front_of, permit_of, request_id_of
from services.router.api.generate import Generation, start
from services.router.api.options import Options, check_ids, options_of, unsupported
from services.router.api.parse import parse
from services.router.api.schemas import (
    BATCH_MAX,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from services.router.detokenizer import TextStream, TokenTable
from services.router.front import Front
from services.router.streams import Output, Stream, TokenInfo

MAX_TOKENS_DEFAULT = 16

routes = APIRouter()
_decoder = msgspec.json.Decoder(CompletionRequest)
_encode = msgspec.json.encode


@routes.post("/v1/completions", **describe(CompletionRequest, Completion, is_stream=True))
async def completions(request: Request) -> Response:
    """Continue a text."""
    front = front_of(request)
    raw = parse(_decoder, await request.body())
    front.check_model(raw.model)
    if raw.suffix is not None:
        raise unsupported("suffix", "the model only continues texts")
    if (raw.best_of or 1) > 1:
        raise unsupported("best_of", "only 1; use n")
    logprobs = -1 if raw.logprobs is None else raw.logprobs
    most = MAX_TOKENS_DEFAULT if raw.max_tokens is None else raw.max_tokens
    options = options_of(raw, front.model, max_tokens=most, logprobs=logprobs)
    prompts = await _encode_prompts(front, raw.prompt, add_special=raw.add_special_tokens is not False)
    echoes = [_echo(front, prompt) for prompt in prompts] if raw.echo else []
    ids = [prompt if isinstance(prompt, list) else prompt.ids for prompt in prompts]
    generation = start(
        front, permit_of(request), options, ids, kind="cmpl", prompt_logprobs=bool(raw.echo) and logprobs >= 0
    )
    renderer = CompletionRenderer(f"cmpl-{request_id_of(request, raw.request_id)}", front, options, echoes)
    return Answer(generation, renderer, is_stream=options.is_stream)


class _TextPrompt(msgspec.Struct, frozen=True):
    """A prompt that came as text, with its tokens."""

    text: str
    ids: list[int]


async def _encode_prompts(
    front: Front, prompt: str | list[str | int | list[int]], *, add_special: bool
) -> list[_TextPrompt | list[int]]:
    """Every prompt as tokens. Raises InvalidRequest for a mixed or too long list and for ids that do not exist."""
    if isinstance(prompt, str):
        return [await _encode_text(front, prompt, add_special)]
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        raise InvalidRequest("prompt mixes texts and tokens", param="prompt")
    if kinds == {int}:
        return [_checked(front, [item for item in prompt if isinstance(item, int)])]
    if len(prompt) > BATCH_MAX:
        raise InvalidRequest(f"{len(prompt)} prompts exceed the limit of {BATCH_MAX}", param="prompt")
    encoded: list[_TextPrompt | list[int]] = []
    for item in prompt:
        if isinstance(item, str):
            encoded.append(await _encode_text(front, item, add_special))
        elif isinstance(item, list):
            encoded.append(_checked(front, item))
    return encoded


async def _encode_text(front: Front, text: str, add_special: bool) -> _TextPrompt:
    model = front.model
    ids = await model.run(lambda: model.encode(text, add_special=add_special), len(text))
    model.check_embedded(ids)
    return _TextPrompt(text, ids)


def _checked(front: Front, ids: list[int]) -> list[int]:
    check_ids(ids, front.model, "prompt")
    return ids


def _echo(front: Front, prompt: _TextPrompt | list[int]) -> str:
    return prompt.text if isinstance(prompt, _TextPrompt) else front.model.decode(prompt, skip_special=True)


class CompletionRenderer:
    """Completions' shapes. `echoes`: the prompts' texts where they are to be repeated."""

    def __init__(self, answer_id: str, front: Front, options: Options, echoes: Sequence[str]) -> None:
        self._id = answer_id
        self._model = front.model.name
        self._table = front.model.table
        self._created = int(time.time())
        self._num_top = options.sampling.logprobs
        self._num_choices = options.num_choices
        self._include_usage = options.include_usage
        self._echoes = echoes
        facts = {"id": answer_id, "object": "text_completion", "created": self._created, "model": self._model}
        self._head = b"data: " + _encode(facts)[:-1]
        self._end = b'}],"usage":null}\n\n' if options.include_usage else b"}]}\n\n"

    def _event(self, index: int, text: str, logprobs: bytes, finish: bytes) -> bytes:
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            _encode(text),
            logprobs,
            finish,
            self._end,
        )

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._num_choices] if self._echoes else ""

    def opening(self, index: int, stream: Stream) -> bytes:
        """The event with the repeated prompt, where it was asked for."""
        if not self._echoes:
            return b""
        logprobs = self._logprobs(stream, [], with_prompt=True, index=index)
        return self._event(index, self._echo_of(index), _encode(logprobs), b"null")

    def events(self, index: int, output: Output, finish_reason: str | None) -> bytes:
        """An event with text, and the finish reason if it is the last."""
        if not output.text and not output.tokens and finish_reason is None:
            return b""
        logprobs = None
        if self._num_top >= 0:
            logprobs = _token_logprobs(self._table, output.tokens, self._num_top, len(self._echo_of(index)))
        return self._event(index, output.text, _encode(logprobs), _encode(finish_reason))

    def usage_event(self, generation: Generation) -> bytes:
        """The event with the usage and no choices."""
        if not self._include_usage:
            return b""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, _encode(usage_of(generation)))

    def body(self, generation: Generation, outputs: list[Output]) -> bytes:
        """A text_completion object."""
        choices = []
        for index, (stream, output) in enumerate(zip(generation.streams, outputs, strict=True)):
            assert stream.ending is not None
            logprobs = self._logprobs(stream, output.tokens, with_prompt=bool(self._echoes), index=index)
            text = self._echo_of(index) + output.text
            choices.append(CompletionChoice(index, text, logprobs, stream.ending.reason))
        usage = usage_of(generation)
        return _encode(Completion(self._id, "text_completion", self._created, self._model, choices, usage))

    def _logprobs(
        self, stream: Stream, tokens: list[TokenInfo], *, with_prompt: bool, index: int
    ) -> CompletionLogprobs | None:
        if self._num_top < 0:
            return None
        output = _token_logprobs(self._table, tokens, self._num_top, len(self._echo_of(index)))
        if not with_prompt:
            return output
        prompt = _prompt_logprobs(self._table, stream, self._num_top)
        return CompletionLogprobs(
            prompt.tokens + output.tokens,
            prompt.token_logprobs + output.token_logprobs,
            prompt.top_logprobs + output.top_logprobs,
            prompt.text_offset + output.text_offset,
        )


def _token_logprobs(table: TokenTable, tokens: list[TokenInfo], num_top: int, offset: int) -> CompletionLogprobs:
    return CompletionLogprobs(
        [table.label_of(token.token_id) for token in tokens],
        [finite(token.logprob.token) for token in tokens],
        [_top(table, token.logprob, num_top) for token in tokens],
        [offset + token.text_offset for token in tokens],
    )


def _prompt_logprobs(table: TokenTable, stream: Stream, num_top: int) -> CompletionLogprobs:
    """The prompt's tokens; the first has no probability, because nothing comes before it."""
    ids = stream.submit.prompt
    known: Sequence[Logprob | None] = stream.prompt_logprobs or ()
    padded = [*[None] * (len(ids) - len(known)), *known[-len(ids) :]]
    padded[0] = None
    text, offsets = TextStream(table), []
    for token_id in ids:
        offsets.append(text.num_chars)
        text.feed(token_id)
    return CompletionLogprobs(
        [table.label_of(token_id) for token_id in ids],
        [None if logprob is None else finite(logprob.token) for logprob in padded],
        [None if logprob is None else _top(table, logprob, num_top) for logprob in padded],
        offsets,
    )


def _top(table: TokenTable, logprob: Logprob, num_top: int) -> dict[str, float]:
    return {table.label_of(token_id): finite(value) for token_id, value in logprob.top[:num_top]}
