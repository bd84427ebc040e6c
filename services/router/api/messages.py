"""POST /v1/messages and /v1/messages/count_tokens: the common part of Anthropic's interface, on top of chat."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from elasticmoe.services.router.api.chat import answer_of, start_chat
from elasticmoe.services.router.api.conversation import conversation_of
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.gate import client_of, front_of, request_id_of
from elasticmoe.services.router.api.messages_input import chat_of
from elasticmoe.services.router.api.messages_renderer import MessagesRenderer
from elasticmoe.services.router.api.messages_schemas import (
    CountedTokens,
    CountRequest,
    MessageAnswer,
    MessagesEvent,
    MessagesRequest,
)
from elasticmoe.services.router.api.parse import body_of
from elasticmoe.services.router.api.pieces import JsonPieces

routes = APIRouter()
_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountRequest)


@routes.post("/v1/messages", **describe(MessagesRequest, MessageAnswer, event=MessagesEvent))
async def messages(request: Request) -> Response:
    """Continue a conversation, as one message or (`stream`) event by event."""
    front = front_of(request)
    raw = await body_of(request, _decoder)
    asked, names = chat_of(raw)
    chat = await start_chat(request, asked, kind="msg", names=names)
    return answer_of(front, chat, MessagesRenderer(f"msg_{request_id_of(request, None)}", front, chat.form))


@routes.post("/v1/messages/count_tokens", **describe(CountRequest, CountedTokens))
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has, as the model is told it."""
    front = front_of(request)
    asked, names = chat_of(await body_of(request, _count_decoder))
    front.check_model(asked.model)
    context = front.dispatcher.max_model_len()
    with names.in_errors():
        ids, _ = await front.texts.encode_chat(conversation_of(asked), context, client_of(request))
    return JsonPieces([msgspec.json.encode(CountedTokens(len(ids)))], front.turns)
