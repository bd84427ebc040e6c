"""GET /v1/models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from elasticmoe.common.http.app import json_response
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.gate import front_of
from elasticmoe.services.router.api.told import ModelCard, ModelList

routes = APIRouter()
NameInPath = Annotated[str, Path(description="A model's name; it may have slashes")]


def _card(front: Front) -> ModelCard:
    try:
        length: int | None = front.dispatcher.max_model_len()
    except Unavailable:
        length = None
    return ModelCard(front.model.name, "model", front.started_unix, "elasticmoe", length, front.defaults.given())


@routes.get("/v1/models", **describe(None, ModelList))
async def models(request: Request) -> Response:
    """The models that are served: one."""
    return json_response(ModelList("list", [_card(front_of(request))]))


@routes.get("/v1/models/{name:path}", **describe(None, ModelCard, names_model=True))
async def model(request: Request, name: NameInPath) -> Response:
    """One model."""
    front = front_of(request)
    front.check_model(name)
    return json_response(_card(front))
