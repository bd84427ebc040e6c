"""Whatever is sent to an address that the OpenAPI documents name, the router and the admin listener answer in their own
shape and go on (promise P15)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import RouterConfig
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.services.router.api.app import build_app as build_router
from elasticmoe.services.router.api.front import make_front
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher, router_identity
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.router.text.tokenizer import ServedModel
from elasticmoe.services.scaler.api.admin import build_app as build_admin
from elasticmoe.services.scaler.api.event_stream import EventStream
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.series import Series
from elasticmoe.services.scaler.api.snapshot import StatusCache, StatusSnapshot
from elasticmoe.services.scaler.control.admission import CommandQueue
from elasticmoe.services.scaler.metrics import Meters
from tests.procs.router_harness import write_model
from tests.unit.in_process import InProcess

App = Callable[..., Any]

STREAMS = {"/v1/events"}  # without an end
SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["r0", "host:0", "m", -1, 0, 1 << 31, 1e308])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
RAW = st.binary(max_size=40) | st.sampled_from(
    [b"NaN", b'{"a":' * 5_000, b"[" * 5_000, b'{"replicas": 1e999}', b"\xff"]
)
SEGMENTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).map(lambda text: quote(text, ""))


def document_of(app: App, path: str = "/openapi.json", headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = asyncio.run(call(app, "GET", path, b"", headers or {}))
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def call(app: App, method: str, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    """One request to an app of this process; an exception that it lets out fails the test."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, content=body, headers=headers)


def operations_of(document: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Method, path and the names of the body's fields of everything that the document names."""
    schemas = document.get("components", {}).get("schemas", {})
    fields = sorted({name for schema in schemas.values() for name in schema.get("properties", {})})
    found = []
    for path, methods in document["paths"].items():
        found += [(method.upper(), path, fields) for method in methods if path not in STREAMS]
    return found


def bodies(fields: list[str]) -> st.SearchStrategy[bytes]:
    names = st.sampled_from(fields) if fields else st.text(max_size=6)
    return st.dictionaries(names, VALUES, max_size=5).map(lambda body: json.dumps(body).encode()) | RAW


def check(answer: httpx.Response, what: str) -> None:
    """Refusals have the errors' shape; nothing is an internal error."""
    assert answer.status_code != 500, f"{what}: {answer.text}"
    assert answer.status_code < 600
    if answer.status_code >= 400 and answer.headers.get("content-type", "").startswith("application/json"):
        body = answer.json()
        assert body.keys() & {"error", "status", "phase"}, f"{what}: {answer.text}"
    if answer.status_code in (429, 503) and what.startswith("POST /v1/c"):
        assert answer.headers["retry-after"]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> App:
    """A router without replicas."""
    return make_router(tmp_path_factory.mktemp("r"), Dispatcher)


def make_router(base: Path, make_dispatcher: type[Dispatcher], api_key: bytes | None = None) -> App:
    """A router's app with files in `base`."""
    model = ServedModel(write_model(base / "model"), "m")
    config = RouterConfig(run_dir=str(base), model=str(base / "model"), served_name="m", body_bytes_max=64 << 10)
    metrics = Metrics("m")
    dispatcher = make_dispatcher(config.socket, metrics, History(None, "r"), router_identity())
    return build_router(make_front(config, model, InProcess(model.codec), dispatcher, metrics, api_key))


@pytest.fixture(scope="module")
def admin() -> App:
    commands = CommandQueue(lambda: None, SYSTEM_CLOCK)

    def refuse(_: object) -> Any:
        raise Unavailable("nothing runs in this test", code="not_ready")

    real = commands._ask

    async def ask(order: Any) -> Any:
        waiting = asyncio.ensure_future(real(order))
        await asyncio.sleep(0)
        commands.serve(refuse)
        return await waiting

    commands._ask = ask  # type: ignore[method-assign]
    return build_admin(
        StatusCache(StatusSnapshot("starting", "", None, None, None, 0, {})),
        commands,
        EventStream(),
        Series("s"),
        ExpertLoads(),
        Meters(),
        "t",
        60.0,
        "localhost",
        Path("/nonexistent"),
    )


BOUNDS = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@BOUNDS
@given(data=st.data())
def test_the_router_answers_anything(router: App, data: st.DataObject) -> None:
    method, path, fields = data.draw(st.sampled_from(operations_of(document_of(router))))
    send(router, method, path, data, fields, {})


@BOUNDS
@given(data=st.data())
def test_the_admin_listener_answers_anything(admin: App, data: st.DataObject) -> None:
    headers = {"Authorization": "Bearer t"}
    fields = ["replicas", "devices", "remove", "op_id", "dry_run", "deadline_s", "reason"]
    method, path, _ = data.draw(st.sampled_from(operations_of(document_of(admin, headers=headers))))
    send(admin, method, path, data, fields, headers)


def send(app: App, method: str, path: str, data: st.DataObject, fields: list[str], headers: dict[str, str]) -> None:
    while "{" in path:
        begin, end = path.index("{"), path.index("}")
        path = path[:begin] + data.draw(SEGMENTS) + path[end + 1 :]
    body = data.draw(bodies(fields)) if method in ("POST", "PUT", "PATCH") else b""
    kind = data.draw(st.sampled_from(["application/json", "text/plain", "application/json; charset=utf-16"]))
    method = data.draw(st.sampled_from([method, method, method, "DELETE", "PUT"]))
    answer = asyncio.run(call(app, method, path, body, headers | {"Content-Type": kind}))
    check(answer, f"{method} {path} {body[:200]!r}")
