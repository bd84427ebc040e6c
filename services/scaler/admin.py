"""The operator's REST surface, on a listener of its own. Everything but /health and /ready asks for the token.

The app reads one immutable snapshot that the scaler's loop replaces; it never touches the loop's sockets or the store.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from common.layout import Layout
from common.protocol.errors import ConfigError, ElasticMoEError, InvalidRequest, NotFound, Unauthorized, Unavailable
from common.protocol.replies import Refused
from common.protocol.scaler import HmmStatus, PoolStatus

PUBLIC_PATHS = frozenset({"/health", "/ready"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Snapshot(msgspec.Struct, frozen=True):
    """What the scaler knows at one moment. `config` is the resolved configuration without secrets."""

    phase: str
    reason: str
    error: Refused | None
    layout: Layout | None
    hmm: HmmStatus | None
    pool: PoolStatus | None
    fence: int
    config: dict[str, Any]


class Board:
    """Where the loop puts the newest snapshot and the app reads it. Assignment is atomic; no lock is needed."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot


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


def build_app(board: Board, token: str) -> AdminGate:
    """The admin app. Raises ConfigError for an empty token."""
    app = FastAPI(title="ElasticMoE scaler", docs_url=None, redoc_url=None)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> Response:
        return _ready(board.snapshot)

    @app.get("/v1/layout")
    def layout() -> Response:
        return _json(layout_view(board.snapshot))

    @app.get("/v1/devices")
    def devices() -> Response:
        return _json(devices_view(board.snapshot))

    @app.get("/v1/config")
    def config() -> Response:
        return _json(board.snapshot.config)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(render_metrics(board.snapshot), media_type="text/plain; version=0.0.4")

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


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _ready(snapshot: Snapshot) -> Response:
    hmm = snapshot.hmm
    body = {
        "phase": snapshot.phase,
        "reason": snapshot.reason,
        "bytes_done": hmm.bytes_done if hmm else 0,
        "bytes_total": hmm.bytes_total if hmm else 0,
        "error": snapshot.error,
    }
    status = 200 if snapshot.phase == "serving" else 503
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def layout_view(snapshot: Snapshot) -> dict[str, Any]:
    """GET /v1/layout. Raises Unavailable before the first layout."""
    layout = snapshot.layout
    if layout is None:
        raise Unavailable("no layout has been made yet")
    by_device = {status.device: status for status in snapshot.hmm.devices} if snapshot.hmm else {}
    pids = {rank.slot: rank for rank in snapshot.pool.ranks} if snapshot.pool else {}
    ranks = []
    for seat in layout.seats:
        device, rank = by_device.get(seat.device), pids.get(seat.slot)
        ranks.append(
            {
                "replica": seat.rank.replica,
                "tp": seat.rank.tp,
                "slot": seat.slot,
                "device": seat.device,
                "incarnation": rank.incarnation if rank else None,
                "pid": rank.pid if rank else None,
                "ready": bool(rank and rank.ready),
                "attach_ms": rank.attach_ms if rank else None,
                "experts": layout.num_experts_on(seat.slot),
                "kv_blocks": device.kv_blocks if device else 0,
                "memory": _memory(device) if device else None,
            }
        )
    return {
        "epoch": layout.epoch,
        "fence": snapshot.fence,
        "phase": snapshot.phase,
        "reason": snapshot.reason,
        "tp": layout.tp,
        "replicas": layout.dp,
        "ranks": ranks,
        "experts": layout.homes,
    }


def devices_view(snapshot: Snapshot) -> dict[str, Any]:
    """GET /v1/devices. Raises Unavailable while the HMM does not answer."""
    if snapshot.hmm is None:
        raise Unavailable("the HMM does not answer")
    used = {seat.device for seat in snapshot.layout.seats} if snapshot.layout else set()
    return {
        "standby_processes": snapshot.pool.standby if snapshot.pool else 0,
        "devices": [
            {
                "device": status.device,
                "state": "used" if status.device in used else "free",
                "attached": status.attached,
                "memory": _memory(status),
            }
            for status in snapshot.hmm.devices
        ],
    }


def _memory(device: Any) -> dict[str, int]:
    return {name: getattr(device, name) for name in ("budget", "weights", "kv", "other", "free")}


def render_metrics(snapshot: Snapshot) -> bytes:
    """Prometheus text of the snapshot."""
    registry = CollectorRegistry()
    epoch = Gauge("elasticmoe:epoch", "Epoch of the layout", registry=registry)
    fence = Gauge("elasticmoe:fence", "Fencing epoch of this scaler", registry=registry)
    serving = Gauge("elasticmoe:serving", "1 while all ranks of the layout step", registry=registry)
    experts = Gauge("elasticmoe:experts_per_rank", "Expert records of a rank's device", ["rank"], registry=registry)
    memory = Gauge("elasticmoe:device_bytes", "Device memory", ["device", "state"], registry=registry)
    standby = Gauge("elasticmoe:standby_ranks", "Processes that wait for a seat", registry=registry)
    fence.set(snapshot.fence)
    serving.set(snapshot.phase == "serving")
    if snapshot.layout:
        epoch.set(snapshot.layout.epoch)
        for seat in snapshot.layout.seats:
            experts.labels(str(seat.rank)).set(snapshot.layout.num_experts_on(seat.slot))
    for device in snapshot.hmm.devices if snapshot.hmm else ():
        for state, nbytes in _memory(device).items():
            memory.labels(device.device, state).set(nbytes)
    standby.set(snapshot.pool.standby if snapshot.pool else 0)
    return generate_latest(registry)


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
