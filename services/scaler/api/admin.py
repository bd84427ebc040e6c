"""The operator's REST surface, on a listener of its own. Everything but /health, /ready and the web page's files asks
for the token.

The app reads one immutable snapshot that the scaler's loop replaces, and hands orders to the loop through the command
queue; it never touches the loop's sockets or the store.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import StreamingResponse

from elasticmoe.common.http.app import json_response, make_app
from elasticmoe.common.http.body import Body, Receive
from elasticmoe.common.http.connection import Rules
from elasticmoe.common.http.door import Door, Scope, Send, bearer_of, headers_of
from elasticmoe.common.http.errors import error_response
from elasticmoe.common.http.hosts import OwnPages
from elasticmoe.common.http.listener import HttpServer, make_server
from elasticmoe.common.protocol.errors import ConfigError, Unauthorized
from elasticmoe.common.protocol.limits import NAME_CHARS_MAX
from elasticmoe.common.sse import escape_separators
from elasticmoe.services.scaler.api import docs, views
from elasticmoe.services.scaler.api.contract import check_instance, scale_status
from elasticmoe.services.scaler.api.docs import describe
from elasticmoe.services.scaler.api.event_stream import EventStream
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.page import PAGES, add_page
from elasticmoe.services.scaler.api.policy import add_policy
from elasticmoe.services.scaler.api.prometheus import render_metrics
from elasticmoe.services.scaler.api.query import LIMIT, limit_of
from elasticmoe.services.scaler.api.requests import (
    RebalanceBody,
    ScaleBody,
    caller_of,
    parse_rebalance,
    parse_scale,
)
from elasticmoe.services.scaler.api.series import Series
from elasticmoe.services.scaler.api.snapshot import (
    StatusCache,
    devices_view,
    find_operation,
    layout_view,
    operation_moves,
    operation_view,
    operations_view,
    plan_view,
    ready_view,
)
from elasticmoe.services.scaler.api.watching import add_watching
from elasticmoe.services.scaler.control.admission import CancelOperation, CommandQueue, Running
from elasticmoe.services.scaler.metrics import Meters

BODY_BYTES_MAX = 1024 * 1024
BODY_S_MAX = 10.0
HEARTBEAT_S = 10.0
CONNECTIONS_MAX = 128
PROBES = frozenset({"/health", "/ready"})
PUBLIC_PATHS = PROBES | PAGES.keys()
OpIdInPath = Annotated[str, Path(description="The operation's `op_id`")]


class AdminGate:
    """The ASGI application behind the door: default deny, and bodies within their bounds. Raises ConfigError for an
    empty token."""

    def __init__(self, app: Any, token: str) -> None:
        if not token:
            raise ConfigError("the admin token is empty")
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. Raises its refusal, or ClientLeft."""
        if scope["path"] not in PUBLIC_PATHS and not hmac.compare_digest(bearer_of(scope), self._token):
            raise Unauthorized("admin token is missing or wrong", code="invalid_admin_token")
        if scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        body = Body(receive, BODY_BYTES_MAX, BODY_S_MAX)
        await body.read(headers_of(scope))
        await self._app(scope, body.replay, send)


def build_app(
    status_cache: StatusCache,
    commands: CommandQueue,
    events: EventStream,
    series: Series,
    experts: ExpertLoads,
    meters: Meters,
    token: str,
    deadline_s: float,
    host: str,
    run_dir: FilePath,
) -> Door:
    """The admin app; `deadline_s`: of operations that name none; `host`: that it listens on; `run_dir`: of the
    deployment. Raises ConfigError for an empty token."""
    app = make_app("ElasticMoE scaler", docs.ABOUT)
    _add_views(app, status_cache, meters)
    _add_orders(app, status_cache, commands, deadline_s)
    add_policy(app, status_cache, commands)
    add_watching(app, status_cache, series, experts, run_dir)
    _add_events(app, events)
    hosts = OwnPages(host)
    add_page(app, hosts)
    docs.install(app, PUBLIC_PATHS)
    return Door(AdminGate(app, token), hosts, PROBES, meters.refused)


def serve(app: Door, meters: Meters, keep_alive_s: float) -> HttpServer:
    """The admin listener's server, for a bound socket and a thread of its own."""
    rules = Rules(CONNECTIONS_MAX, BODY_BYTES_MAX, PROBES | {"/metrics"}, meters.refused)
    return make_server(app, rules, keep_alive_s=keep_alive_s, stop_s=2)


def _add_views(app: FastAPI, status_cache: StatusCache, meters: Meters) -> None:
    """Coroutines, though they wait for nothing: for others a thread each would be started, and kept."""

    @app.get("/health", **describe("Health", docs.PUBLIC))
    async def health() -> Response:
        """Answers as long as the listener lives. Asks for no token."""
        return json_response(views.Health("ok"))

    @app.get("/ready", **docs.describe_ready())
    async def ready() -> Response:
        """200 while all ranks of the layout step, else 503, with the reason. Asks for no token."""
        snapshot = status_cache.snapshot
        return json_response(ready_view(snapshot), 200 if snapshot.phase == "serving" else 503)

    @app.get("/v1/layout", **describe("Layout", docs.READING))
    async def layout() -> Response:
        """The layout in force: its ranks with their devices and memory, and where each expert is."""
        return json_response(layout_view(status_cache.snapshot))

    @app.get("/v1/scale", **describe("ScaleStatus", docs.READING))
    async def size() -> Response:
        """How large the deployment is and will be, and by which operation: the status of orchestrators' contracts."""
        return json_response(scale_status(status_cache.snapshot))

    @app.get("/v1/devices", **describe("Devices", docs.READING))
    async def devices() -> Response:
        """All devices, used or not, with their memory."""
        return json_response(devices_view(status_cache.snapshot))

    @app.get("/v1/operations", **describe("Operations", docs.READING, query=LIMIT))
    async def operations(request: Request) -> Response:
        """The operation in progress, and the last 100 that have ended."""
        return json_response(operations_view(status_cache.snapshot, limit_of(request)))

    @app.get("/v1/operations/{op_id}", **describe("Operation", docs.FINDING))
    async def operation(op_id: OpIdInPath) -> Response:
        """One operation: its phase, what it waits for, and what it has cost."""
        return json_response(find_operation(status_cache.snapshot, op_id))

    @app.get("/v1/operations/{op_id}/moves", **describe("Moves", docs.FINDING))
    async def moves(op_id: OpIdInPath) -> Response:
        """Which device sends how much to which, while the operation is in progress."""
        return json_response(operation_moves(status_cache.snapshot, op_id))

    @app.get("/v1/config", **describe("Config", docs.READING))
    async def config() -> Response:
        """The settings that are in force, without secrets."""
        return json_response(status_cache.snapshot.config)

    @app.get("/metrics", **describe("text/plain", docs.READING))
    async def metrics() -> Response:
        """Prometheus text: `docs/reference/metrics.md`."""
        return Response(render_metrics(status_cache.snapshot, meters), media_type="text/plain; version=0.0.4")


def _add_orders(app: FastAPI, status_cache: StatusCache, commands: CommandQueue, deadline_s: float) -> None:
    @app.post("/v1/scale", **describe("Operation", docs.ORDERING, body=ScaleBody, status=202, told="It is accepted"))
    async def scale(request: Request) -> Response:
        """Grow or shrink while it serves: `replicas`, `devices` or `remove`. One operation at a time; with an `op_id` a
        repetition starts no second one. With `dry_run` only the plan is made."""
        order = parse_scale(await request.body(), deadline_s, caller_of(request.headers))
        if order.instance:
            check_instance(order.instance, status_cache.snapshot)
        try:
            accepted = await commands.ask(order)
        except Running as running:
            response = error_response(running)
            response.headers["location"] = f"/v1/operations/{running.op_id}"
            return response
        if accepted.plan is not None:
            assert accepted.sizes is not None, "they come with the plan"
            return json_response(plan_view(accepted.plan, accepted.operation, accepted.sizes))
        return json_response(operation_view(accepted.operation), 202)

    @app.post(
        "/v1/rebalance", **describe("Operation", docs.ORDERING, body=RebalanceBody, status=202, told="It is accepted")
    )
    async def rebalance(request: Request) -> Response:
        """Level the running requests over the replicas. The body may be empty."""
        accepted = await commands.ask(parse_rebalance(await request.body(), deadline_s, caller_of(request.headers)))
        return json_response(operation_view(accepted.operation), 202)

    @app.delete(
        "/v1/operations/{op_id}", **describe("Operation", docs.CANCELLING, status=202, told="It is being undone")
    )
    async def cancel(op_id: OpIdInPath) -> Response:
        """Cancel an operation that is not committed yet. Refused with `committed` afterwards."""
        return json_response(operation_view((await commands.ask(CancelOperation(op_id))).operation), 202)


def _add_events(app: FastAPI, source: EventStream) -> None:
    @app.get("/v1/events", **describe("text/event-stream", docs.READING))
    async def events(request: Request) -> Response:
        """What the scaler decides and does, as server-sent events, for ever: `docs/reference/events.md`. With
        `Last-Event-ID` it goes on after that one."""
        source.check()
        last_id = request.headers.get("last-event-id", "")[:NAME_CHARS_MAX]

        async def stream() -> AsyncIterator[bytes]:
            yield b": events\n\n"
            async for entry in source.listen(last_id, HEARTBEAT_S):
                if entry is None:
                    yield b": heartbeat\n\n"
                else:
                    event_id, event = entry
                    data = escape_separators(msgspec.json.encode(event))
                    yield f"id: {event_id}\nevent: {event.kind}\ndata: ".encode() + data + b"\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
