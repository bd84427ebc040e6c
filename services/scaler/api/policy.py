"""The policy's routes of the admin surface."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from elasticmoe.common.http.app import json_response
from elasticmoe.services.scaler.api import docs
from elasticmoe.services.scaler.api.docs import describe
from elasticmoe.services.scaler.api.policy_views import DecisionsView, PolicyBody, parse_policy, policy_view
from elasticmoe.services.scaler.api.query import LIMIT, limit_of
from elasticmoe.services.scaler.api.snapshot import StatusCache
from elasticmoe.services.scaler.control.admission import CommandQueue


def add_policy(app: FastAPI, status_cache: StatusCache, commands: CommandQueue) -> None:
    """Add them to the app."""

    @app.get("/v1/policy", **describe("PolicyView", docs.READING))
    async def policy() -> Response:
        """Objectives, bounds and mode; how the deployment stands by them; and the last decision."""
        return json_response(policy_view(status_cache.snapshot))

    @app.put("/v1/policy", **describe("PolicyView", docs.ORDERING, body=PolicyBody, told="It is in force from now on"))
    async def change(request: Request) -> Response:
        """Let another policy be in force; it outlives restarts. Refused where somebody else has changed it since."""
        await commands.set_policy(parse_policy(await request.body()))
        return json_response(policy_view(status_cache.snapshot))

    @app.get("/v1/decisions", **describe("DecisionsView", docs.READING, query=LIMIT))
    async def decisions(request: Request) -> Response:
        """What the policy has decided, with the figures that each decision rests on; in the mode `advise` too."""
        return json_response(DecisionsView(status_cache.snapshot.decided[: limit_of(request)]))
