"""The HTTP application: FastAPI for routing and the OpenAPI document, behind the gate, behind the door."""

from __future__ import annotations

from elasticmoe.common.http.app import make_app
from elasticmoe.common.http.door import Door
from elasticmoe.common.http.hosts import HostPolicy, split
from elasticmoe.services.router.api import chat, completions, docs, health, messages, metrics, models, responses, tokens
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.gate import PUBLIC_PATHS, Gate


def build_app(front: Front) -> Door:
    """The ASGI application of a running router. No redirects, no pages from elsewhere; cross-origin headers only for
    the origins that a setting names. Raises ConfigError for an origin that is none."""
    app = make_app("ElasticMoE router", docs.ABOUT)
    app.state.front = front
    for family in (chat, completions, responses, messages, models, tokens, health, metrics):
        app.include_router(family.routes)
    docs.install(app, PUBLIC_PATHS, has_key=front.api_key is not None)
    config, is_open = front.config, front.api_key is None
    policy = HostPolicy(config.host, split(config.allowed_hosts), split(config.cors_origins), is_open=is_open)
    return Door(Gate(app, front), policy, PUBLIC_PATHS, front.metrics.refused)
