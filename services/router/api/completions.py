"""POST /v1/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.answer import Answer
from elasticmoe.services.router.api.completion_renderer import CompletionRenderer, Prompts
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.gate import caller_of, client_of, front_of, permit_of
from elasticmoe.services.router.api.generate import counting_refusals, start, with_grammar
from elasticmoe.services.router.api.options import Options, check_ids, options_of, unsupported
from elasticmoe.services.router.api.parse import body_of
from elasticmoe.services.router.api.schemas import BATCH_MAX, CompletionRequest
from elasticmoe.services.router.api.told import Completion, CompletionChunk

MAX_TOKENS_DEFAULT = 16

routes = APIRouter()
_decoder = msgspec.json.Decoder(CompletionRequest)


@routes.post("/v1/completions", **describe(CompletionRequest, Completion, chunk=CompletionChunk))
async def completions(request: Request) -> Response:
    """Continue a text, as one answer or (`stream`) token by token."""
    front = front_of(request)
    raw = await body_of(request, _decoder)
    front.check_model(raw.model)
    options = _options(raw, front)
    client = client_of(request)
    prompts = await _encode_prompts(front, raw, front.dispatcher.max_model_len(), client)
    with counting_refusals(front, len(prompts.ids) * options.num_choices):
        options = await with_grammar(front, options, None, client)
    caller, is_echo = caller_of(request, raw.request_id), bool(raw.echo)
    generation = await start(front, permit_of(request), caller, options, prompts.ids, kind="cmpl", is_echo=is_echo)
    answer_id = f"cmpl-{caller.request_id}"
    renderer = CompletionRenderer(answer_id, front, options, client, prompts if is_echo else None)
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
        allow_priority=front.config.allow_priority,
    )


async def _encode_prompts(front: Front, raw: CompletionRequest, context: int, client: str) -> Prompts:
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
    with counting_refusals(front, len(texts) * (raw.n or 1)):
        ids = await front.texts.encode(texts, context, client, add_special=raw.add_special_tokens is not False)
    for prompt in ids:
        front.model.check_embedded(prompt)
    return Prompts(ids, texts)


def _checked(front: Front, prompts: list[list[int]]) -> Prompts:
    for ids in prompts:
        check_ids(ids, front.model, "prompt")
    return Prompts(prompts)
