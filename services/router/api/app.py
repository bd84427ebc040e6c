"""The HTTP application: FastAPI for routing and the OpenAPI document, behind the gate."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from common.protocol.errors import ElasticMoEError
from services.router.api import chat, completions, docs, health, metrics, models, tokens
from services.router.api.errors import on_error, on_status
from services.router.api.gate import Gate
from services.router.front import Front


def build_app(front: Front) -> Gate:
    """The ASGI application of a running router. No cross-origin headers, no redirects, no pages from elsewhere."""
    app = FastAPI(title="ElasticMoE router", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.front = front
    for family in (chat, completions, models, tokens, health, metrics):
        app.include_router(family.routes)
    app.add_exception_handler(ElasticMoEError, on_error)
    app.add_exception_handler(HTTPException, on_status)
    app.add_exception_handler(Exception, on_error)
    docs.install(app)
    return Gate(app, front)
