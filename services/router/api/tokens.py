"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from elasticmoe.common.http.app import json_response
from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.conversation import conversation_of, refuse_without_messages
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.field_names import CHAT, PLAIN
from elasticmoe.services.router.api.gate import client_of, front_of
from elasticmoe.services.router.api.options import check_ids
from elasticmoe.services.router.api.parse import body_of
from elasticmoe.services.router.api.pieces import JsonPieces
from elasticmoe.services.router.api.schemas import DetokenizeRequest, TokenizeRequest
from elasticmoe.services.router.api.told import Detokenized, Tokenized
from elasticmoe.services.router.text.jobs import Tokenize

routes = APIRouter()
_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


@routes.post("/tokenize", **describe(TokenizeRequest, Tokenized))
async def tokenize(request: Request) -> Response:
    """The tokens of a text or a conversation."""
    front = front_of(request)
    raw = await body_of(request, _tokenize_decoder)
    front.check_model(raw.model)
    if (raw.prompt is None) == (raw.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if raw.messages is None:
        refuse_without_messages(raw)
    names = PLAIN if raw.messages is None else CHAT
    with names.in_errors():
        job = Tokenize(
            text=raw.prompt or "",
            conversation=conversation_of(raw) if raw.messages is not None else None,
            add_special=raw.add_special_tokens is not False,
            with_strings=bool(raw.return_token_strs),
            context=front.dispatcher.max_model_len(),
        )
        tokenized = await front.texts.tokenize(job, client_of(request))
    return JsonPieces([tokenized], front.turns)


@routes.post("/detokenize", **describe(DetokenizeRequest, Detokenized))
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    front = front_of(request)
    raw = await body_of(request, _detokenize_decoder)
    front.check_model(raw.model)
    check_ids(raw.tokens, front.model, "tokens")
    text = await front.texts.decode(raw.tokens, client_of(request), skip_special=False)
    return json_response(Detokenized(text))
