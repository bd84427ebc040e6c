"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from elasticmoe.services.router.api.docs import describe
from elasticmoe.services.router.api.gate import front_of

routes = APIRouter()


@routes.get("/metrics", **describe(None, None))
async def metrics(request: Request) -> Response:
    """Prometheus text. Always readable; counters never go back while the process lives."""
    return Response(front_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
