"""The operator's REST surface, on a listener of its own. Everything but /health and /ready asks for the token.

The app reads one immutable snapshot that the scaler's loop replaces, and hands orders to the loop through the desk; it
never touches the loop's sockets or the store.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from common.protocol.errors import (
    ConfigError,
    DeadlineExceeded,
    ElasticMoEError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    Unauthorized,
)
from common.protocol.limits import NAME_CHARS_MAX
from services.scaler import docs
from services.scaler.desk import Cancel, Desk, Feed
from services.scaler.docs import describe
from services.scaler.meters import Meters, render_metrics
from services.scaler.orders import RebalanceBody, ScaleBody, parse_rebalance, parse_scale
from services.scaler.snapshot import (
    Board,
    devices_view,
    find_operation,
    layout_view,
    operation_view,
    operations_view,
    plan_view,
    ready_view,
)

BODY_BYTES_MAX = 1024 * 1024
BODY_S_MAX = 10.0
HEARTBEAT_S = 10.0
PUBLIC_PATHS = frozenset({"/health", "/ready"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class AdminGate:
    """ASGI middleware: default deny. Decides on the path that the router will see, not on the Host header's URL."""

    def __init__(self, app: Any, token: str) -> None:
        if not token:
            raise ConfigError("the admin token is empty")
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 (no or wrong token) or 403 (a browser's cross-origin request)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if b"origin" in headers:
            error: ElasticMoEError | None = Unauthorized("requests from browsers are refused", code="origin_refused")
            status = 403
        elif scope["path"] in PUBLIC_PATHS or hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            error, status = None, 200
        else:
            error, status = Unauthorized("admin token is missing or wrong", code="invalid_admin_token"), 401
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error, status)(scope, receive, send)


def error_response(error: ElasticMoEError, status: int | None = None) -> Response:
    """The JSON shape of every error of this surface."""
    body = {"error": {"code": error.code, "message": error.message, "retryable": error.retryable}}
    return Response(msgspec.json.encode(body), status or error.http_status, media_type="application/json")


def build_app(board: Board, desk: Desk, feed: Feed, meters: Meters, token: str, deadline_s: float) -> AdminGate:
    """The admin app; `deadline_s`: of operations that name none. Raises ConfigError for an empty token."""
    app = FastAPI(title="ElasticMoE scaler", docs_url=None, redoc_url=None)
    _add_views(app, board, meters)
    _add_orders(app, desk, deadline_s)
    _add_events(app, feed)
    docs.install(app)

    async def on_error(_: Any, error: Exception) -> Response:
        assert isinstance(error, ElasticMoEError)
        return error_response(error)

    async def on_status(_: Any, error: Exception) -> Response:
        status = int(getattr(error, "status_code", 500))
        known = {404: NotFound("no such path"), 405: InvalidRequest("method not allowed", code="method_not_allowed")}
        return error_response(known.get(status, ElasticMoEError("request failed")), status)

    app.add_exception_handler(ElasticMoEError, on_error)
    app.add_exception_handler(404, on_status)
    app.add_exception_handler(405, on_status)
    return AdminGate(app, token)


def _add_views(app: FastAPI, board: Board, meters: Meters) -> None:
    @app.get("/health", **describe("Health", docs.PUBLIC))
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", **docs.describe_ready())
    def ready() -> Response:
        snapshot = board.snapshot
        return _json(ready_view(snapshot), 200 if snapshot.phase == "serving" else 503)

    @app.get("/v1/layout", **describe("Layout", docs.READING))
    def layout() -> Response:
        return _json(layout_view(board.snapshot))

    @app.get("/v1/devices", **describe("Devices", docs.READING))
    def devices() -> Response:
        return _json(devices_view(board.snapshot))

    @app.get("/v1/operations", **describe("Operations", docs.READING))
    def operations() -> Response:
        return _json(operations_view(board.snapshot))

    @app.get("/v1/operations/{op_id}", **describe("Operation", docs.FINDING))
    def operation(op_id: str) -> Response:
        return _json(find_operation(board.snapshot, op_id))

    @app.get("/v1/config", **describe("Config", docs.READING))
    def config() -> Response:
        return _json(board.snapshot.config)

    @app.get("/metrics", **describe("text/plain", docs.READING))
    def metrics() -> Response:
        return Response(render_metrics(board.snapshot, meters), media_type="text/plain; version=0.0.4")


def _add_orders(app: FastAPI, desk: Desk, deadline_s: float) -> None:
    @app.post("/v1/scale", **describe("Operation", docs.ORDERING, body=ScaleBody, status=202))
    async def scale(request: Request) -> Response:
        order = parse_scale(await _body(request), deadline_s)
        accepted = await desk.ask(order)
        if accepted.plan is not None:
            return _json(plan_view(accepted.plan, accepted.operation))
        return _json(operation_view(accepted.operation), 202)

    @app.post("/v1/rebalance", **describe("Operation", docs.ORDERING, body=RebalanceBody, status=202))
    async def rebalance(request: Request) -> Response:
        accepted = await desk.ask(parse_rebalance(await _body(request), deadline_s))
        return _json(operation_view(accepted.operation), 202)

    @app.delete("/v1/operations/{op_id}", **describe("Operation", docs.CANCELLING, status=202))
    async def cancel(op_id: str) -> Response:
        return _json(operation_view((await desk.ask(Cancel(op_id))).operation), 202)


def _add_events(app: FastAPI, feed: Feed) -> None:
    @app.get("/v1/events", **describe("text/event-stream", docs.READING))
    async def events(request: Request) -> Response:
        feed.check()
        last_id = request.headers.get("last-event-id", "")[:NAME_CHARS_MAX]

        async def stream() -> AsyncIterator[bytes]:
            yield b": events\n\n"
            async for entry in feed.listen(last_id, HEARTBEAT_S):
                if entry is None:
                    yield b": heartbeat\n\n"
                else:
                    event_id, event = entry
                    yield f"id: {event_id}\nevent: {event.kind}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _body(request: Request) -> bytes:
    """The whole body. Raises PayloadTooLarge beyond BODY_BYTES_MAX, DeadlineExceeded when it does not come in time."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S_MAX):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > BODY_BYTES_MAX:
                    raise PayloadTooLarge(f"body exceeds the limit of {BODY_BYTES_MAX} bytes")
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not come within {BODY_S_MAX:g} s") from None
    except ClientDisconnect:
        raise InvalidRequest("the client left before its body had come") from None
    return b"".join(parts)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigError when the port is taken or the address is not this machine's."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"port {port} on {host} cannot be used: {error.strerror}", code="port_in_use") from None
    sock.listen(128)
    return sock
