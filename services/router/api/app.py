"""The HTTP application: FastAPI for routing and the OpenAPI document, behind the gate, behind the door."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from elasticmoe.common.http.door import Door
from elasticmoe.common.http.errors import on_error, on_status
from elasticmoe.common.http.hosts import HostPolicy, split
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.version import version
from elasticmoe.services.router.api import chat, completions, docs, health, metrics, models, tokens
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.gate import PUBLIC_PATHS, Gate


def build_app(front: Front) -> Door:
    """The ASGI application of a running router. No redirects, no pages from elsewhere; cross-origin headers only for
    the origins that a setting names. Raises ConfigError for an origin that is none."""
    app = FastAPI(
        title="ElasticMoE router",
        description=docs.ABOUT,
        version=version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.front = front
    for family in (chat, completions, models, tokens, health, metrics):
        app.include_router(family.routes)
    app.add_exception_handler(ElasticMoEError, on_error)
    app.add_exception_handler(HTTPException, on_status)
    app.add_exception_handler(Exception, on_error)
    docs.install(app, PUBLIC_PATHS, has_key=front.api_key is not None)
    config, is_open = front.config, front.api_key is None
    policy = HostPolicy(config.host, split(config.allowed_hosts), split(config.cors_origins), is_open=is_open)
    return Door(Gate(app, front), policy, PUBLIC_PATHS, front.metrics.refused)
