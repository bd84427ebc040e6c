"""POST /v1/responses, the stateless part of OpenAI's newer interface, on top of chat; /v1/embeddings is refused."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.services.router.api.chat import answer_of, start_chat
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.gate import front_of, request_id_of
from elasticmoe.services.router.api.parse import body_of
from elasticmoe.services.router.api.responses_input import chat_of
from elasticmoe.services.router.api.responses_renderer import ResponsesRenderer
from elasticmoe.services.router.api.responses_schemas import ResponsesRequest
from elasticmoe.services.router.api.told import ModelResponse, ResponsesEvent

routes = APIRouter()
_decoder = msgspec.json.Decoder(ResponsesRequest)


@routes.post("/v1/responses", **describe(ResponsesRequest, ModelResponse, event=ResponsesEvent))
async def responses(request: Request) -> Response:
    """Continue a conversation, as one response or (`stream`) event by event. Nothing is kept."""
    front = front_of(request)
    raw = await body_of(request, _decoder)
    asked, names = chat_of(raw)
    chat = await start_chat(request, asked, kind="resp", names=names, is_strict=True)  # as OpenAI's are by default
    answer_id = f"resp_{request_id_of(request, raw.request_id)}"
    return answer_of(front, chat, ResponsesRenderer(answer_id, front, raw, chat))


@routes.post("/v1/embeddings", include_in_schema=False)
async def embeddings(_request: Request) -> Response:
    """Refused by name, which says more than that there is no such path."""
    raise InvalidRequest("/v1/embeddings is not supported: the model generates text", code="unsupported")
