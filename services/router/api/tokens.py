"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from common.protocol.errors import InvalidRequest
from services.router.api.conversation import conversation_of, encode_chat
from services.router.api.docs import describe
from services.router.api.errors import json_response
from services.router.api.gate import front_of
from services.router.api.options import check_ids
from services.router.api.parse import parse
from services.router.api.schemas import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

routes = APIRouter()
_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


@routes.post("/tokenize", **describe(TokenizeRequest, Tokenized))
async def tokenize(request: Request) -> Response:
    """The tokens of a text or a conversation."""
    front = front_of(request)
    raw = parse(_tokenize_decoder, await request.body())
    front.check_model(raw.model)
    model = front.model
    if (raw.prompt is None) == (raw.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if raw.messages is not None:
        ids = await encode_chat(front, conversation_of(raw))
    else:
        text, add_special = raw.prompt or "", raw.add_special_tokens is not False
        ids = await model.run(lambda: model.encode(text, add_special=add_special), len(text))
    texts = [model.table.text_of(token_id) for token_id in ids] if raw.return_token_strs else None
    return json_response(Tokenized(len(ids), front.dispatcher.max_model_len(), ids, texts))


@routes.post("/detokenize", **describe(DetokenizeRequest, Detokenized))
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    front = front_of(request)
    raw = parse(_detokenize_decoder, await request.body())
    front.check_model(raw.model)
    check_ids(raw.tokens, front.model, "tokens")
    model = front.model
    text = await model.run(lambda: model.decode(raw.tokens, skip_special=False), len(raw.tokens))
    return json_response(Detokenized(text))
