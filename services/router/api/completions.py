"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from fastapi import APIRouter, Request, Response

from common.protocol.errors import InvalidRequest
from services.router.api.answer import Answer
from services.router.api.chat import end_of_event, usage_of
from services.router.api.docs import describe
from services.router.api.gate import client_of, front_of, permit_of, request_id_of
from services.router.api.generate import Generation, start
from services.router.api.logprobs import TokenNames, output_logprobs, prompt_logprobs
from services.router.api.options import Options, check_ids, options_of, unsupported
from services.router.api.parse import parse
from services.router.api.schemas import (
    BATCH_MAX,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
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
    options = _options(raw, front)
    context, client = front.dispatcher.max_model_len(), client_of(request)
    prompts = await _encode_prompts(front, raw, context, client)
    echoes = await _echoes(front, prompts, context, client) if raw.echo else []
    generation = start(
        front,
        permit_of(request),
        options,
        prompts.ids,
        kind="cmpl",
        prompt_logprobs=bool(raw.echo) and raw.logprobs is not None,
    )
    renderer = CompletionRenderer(f"cmpl-{request_id_of(request, raw.request_id)}", front, options, echoes)
    keepalive_s = front.config.stream_keepalive_s
    return Answer(generation, renderer, is_stream=options.is_stream, keepalive_s=keepalive_s)


def _options(raw: CompletionRequest, front: Front) -> Options:
    num_choices = raw.n or 1
    if raw.best_of is not None and raw.best_of != num_choices:
        raise unsupported("best_of", f"all choices are answered, so it has to be n, {num_choices}; got {raw.best_of}")
    if raw.max_tokens == 0 and not raw.echo:
        raise InvalidRequest("max_tokens 0 is only allowed with echo", param="max_tokens")
    defaults = front.defaults
    return options_of(
        raw,
        front.model,
        max_tokens=raw.max_tokens,
        logprobs=-1 if raw.logprobs is None else raw.logprobs,
        default_tokens=min(MAX_TOKENS_DEFAULT, defaults.max_new_tokens or MAX_TOKENS_DEFAULT),
        defaults=defaults,
    )


class _Prompts(msgspec.Struct, frozen=True):
    """Each prompt's tokens, and its text where it came as one."""

    ids: list[list[int]]
    texts: list[str] | None = None


async def _encode_prompts(front: Front, raw: CompletionRequest, context: int, client: str) -> _Prompts:
    """Every prompt as tokens. Raises InvalidRequest for a mixed or too long list and for ids that do not exist."""
    if isinstance(raw.prompt, str):
        texts: list[str] = [raw.prompt]
    else:
        kinds = {type(item) for item in raw.prompt}
        if len(kinds) != 1:
            raise InvalidRequest("prompt mixes texts and tokens", param="prompt")
        if kinds == {int}:
            return _checked(front, [[item for item in raw.prompt if isinstance(item, int)]])
        if len(raw.prompt) > BATCH_MAX:
            raise InvalidRequest(f"{len(raw.prompt)} prompts exceed the limit of {BATCH_MAX}", param="prompt")
        if kinds == {list}:
            return _checked(front, [item for item in raw.prompt if isinstance(item, list)])
        texts = [item for item in raw.prompt if isinstance(item, str)]
    ids = await front.texts.encode(texts, context, client, add_special=raw.add_special_tokens is not False)
    for prompt in ids:
        front.model.check_embedded(prompt)
    return _Prompts(ids, texts)


def _checked(front: Front, prompts: list[list[int]]) -> _Prompts:
    for ids in prompts:
        check_ids(ids, front.model, "prompt")
    return _Prompts(prompts)


async def _echoes(front: Front, prompts: _Prompts, context: int, client: str) -> list[str]:
    """The prompts' texts. Longer ones than the context are refused afterwards, so no more than that is decoded."""
    if prompts.texts is not None:
        return prompts.texts
    return [await front.texts.decode(ids[:context], client, skip_special=True) for ids in prompts.ids]


class CompletionRenderer:
    """Completions' shapes. `echoes`: the prompts' texts where they are to be repeated."""

    def __init__(self, answer_id: str, front: Front, options: Options, echoes: Sequence[str]) -> None:
        self._id = answer_id
        self._model = front.model.name
        self._names = TokenNames(front.model.table, as_ids=options.as_ids)
        self._created = int(time.time())
        self._num_top = options.sampling.logprobs
        self._num_choices = options.num_choices
        self._usage = options.usage
        self._echoes = echoes
        facts = {"id": answer_id, "object": "text_completion", "created": self._created, "model": self._model}
        self._head = b"data: " + _encode(facts)[:-1]

    def _event(self, index: int, stream: Stream, text: str, logprobs: bytes, finish: bytes) -> bytes:
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            _encode(text),
            logprobs,
            finish,
            end_of_event(self._usage, stream),
        )

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._num_choices] if self._echoes else ""

    def opening(self, index: int, stream: Stream) -> bytes:
        """The event with the repeated prompt, where it was asked for."""
        if not self._echoes:
            return b""
        logprobs = self._logprobs(stream, [], with_prompt=True, index=index)
        return self._event(index, stream, self._echo_of(index), _encode(logprobs), b"null")

    def events(self, index: int, stream: Stream, output: Output, finish_reason: str | None) -> bytes:
        """An event with text, and the finish reason if it is the last."""
        if not output.text and not output.tokens and finish_reason is None:
            return b""
        logprobs = None
        if self._num_top >= 0:
            logprobs = output_logprobs(self._names, output.tokens, self._num_top, len(self._echo_of(index)))
        return self._event(index, stream, output.text, _encode(logprobs), _encode(finish_reason))

    def usage_event(self, generation: Generation) -> bytes:
        """The event with the usage and no choices."""
        if not self._usage.at_end:
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
        output = output_logprobs(self._names, tokens, self._num_top, len(self._echo_of(index)))
        if not with_prompt:
            return output
        prompt = prompt_logprobs(self._names, stream, self._num_top)
        return CompletionLogprobs(
            prompt.tokens + output.tokens,
            prompt.token_logprobs + output.token_logprobs,
            prompt.top_logprobs + output.top_logprobs,
            prompt.text_offset + output.text_offset,
        )
