"""GET /health, /ready, /version and /load."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from elasticmoe.common.http.app import json_response
from elasticmoe.common.version import version
from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.gate import front_of
from elasticmoe.services.router.api.told import Health, Load, Ready, ReplicaLoad, Version

routes = APIRouter()


@routes.get("/health", **describe(None, Health))
async def health() -> Response:
    """Answers as long as the event loop turns."""
    return json_response(Health("ok"))


@routes.get("/ready", **describe(None, Ready, unready=Ready))
async def ready(request: Request) -> Response:
    """200 when requests are served, else 503."""
    front = front_of(request)
    is_ready, reason = front.dispatcher.readiness(time.monotonic())
    if front.is_draining:
        return json_response(Ready("draining", "the router is shutting down"), 503)
    return json_response(Ready("serving" if is_ready else "waiting", reason), 200 if is_ready else 503)


@routes.get("/version", **describe(None, Version))
async def version_of_software() -> Response:
    """The installed version, or `unknown` for a source tree that is not installed."""
    return json_response(Version(version()))


@routes.get("/load", **describe(None, Load))
async def load(request: Request) -> Response:
    """How busy the router and each replica are."""
    front = front_of(request)
    dispatcher = front.dispatcher
    replicas = [
        ReplicaLoad(
            rank=str(candidate.rank),
            requests=candidate.requests,
            prompt_tokens_queued=candidate.tokens_queued,
            kv_blocks_free=candidate.blocks_free,
            kv_blocks_total=candidate.blocks_total,
            is_fresh=candidate.is_fresh,
        )
        for candidate in sorted(dispatcher.candidates(time.monotonic()))
    ]
    epoch = dispatcher.layout.epoch if dispatcher.layout else 0
    return json_response(Load(front.permits.num_held, front.permits.most, epoch, replicas))
