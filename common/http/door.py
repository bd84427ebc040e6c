"""What stands before every application: identity, hosts and origins, HEAD, and the last resort for exceptions.

Pure ASGI. Decisions rest on `scope["path"]`, the path that the endpoints are chosen by, never on a URL that is made of
the Host header.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.responses import Response

from elasticmoe.common.http import ids
from elasticmoe.common.http.body import ClientLeft, Receive
from elasticmoe.common.http.errors import error_response, status_of
from elasticmoe.common.http.hosts import Policy
from elasticmoe.common.protocol.errors import ElasticMoEError, InvalidRequest
from elasticmoe.common.telemetry import get_logger

log = get_logger("http")

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Fields that decide something, and of which there may be one only.
_SINGLE = frozenset({b"authorization", b"x-api-key", b"content-type", b"content-length", b"host", b"origin"})
_ASKED_METHOD, _ASKED_HEADERS = b"access-control-request-method", b"access-control-request-headers"
_READ = _SINGLE | {b"content-encoding", b"traceparent", b"tracestate", _ASKED_METHOD, _ASKED_HEADERS}
_SCOPE_HEADERS = "elasticmoe.headers"
_CORS_METHODS = b"GET, HEAD, POST"
_CORS_EXPOSED = b"x-request-id, retry-after"
_CORS_SECONDS = b"600"


def headers_of(scope: Scope) -> Mapping[bytes, bytes]:
    """The header fields that decide something, by their names in lower case."""
    found: Mapping[bytes, bytes] = scope[_SCOPE_HEADERS]
    return found


def bearer_of(scope: Scope) -> bytes:
    """The token of `Authorization: Bearer <token>`; empty without one. Compare it in constant time."""
    scheme, _, token = headers_of(scope).get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def local_of(scope: Scope) -> str:
    """The address that the connection came to; empty where there is none."""
    return str((scope.get("server") or ("",))[0])


class Door:
    """The outermost ASGI application. `app` may raise ElasticMoEError and ClientLeft. `probes`: paths that any host may
    ask for, because what checks health or collects metrics names a listener in its own way. `refused`: called with the
    status of each answer that is an error."""

    def __init__(self, app: App, policy: Policy, probes: frozenset[str], refused: Callable[[int], None]) -> None:
        self._app = app
        self._policy = policy
        self._probes = probes
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; never raises but for cancellation."""
        if scope["type"] != "http":
            return
        ids.assign(scope)
        sender = _Sender(send, scope, self._refused)
        try:
            headers = scope[_SCOPE_HEADERS] = _collect(scope["headers"])
            origin = headers.get(b"origin")
            if origin is not None and self._policy.allows(origin):
                sender.origin = origin
            if scope["path"] not in self._probes:
                self._policy.check_host(headers.get(b"host"), local_of(scope))
            if origin is not None:
                self._policy.check_origin(origin, headers.get(b"host"), local_of(scope))
            _check_encoding(headers)
            if sender.origin is not None and scope["method"] == "OPTIONS" and _ASKED_METHOD in headers:
                await _preflight(headers)(scope, receive, sender)
            elif scope["method"] == "HEAD":
                await self._app({**scope, "method": "GET"}, sender.wait_for_end, sender)
            else:
                await self._app(scope, receive, sender)
        except ElasticMoEError as error:
            await sender.fail(error, scope, receive)
        except ClientLeft:
            pass
        except Exception:
            log.exception("unexpected error")
            if not sender.has_begun:
                await sender.fail(ElasticMoEError("unexpected error"), scope, receive)


class _Sender:
    """Passes messages on; adds the request id and what a browser wants to read, counts errors, knows whether the answer
    has begun, and ends the answer to a HEAD after its head."""

    def __init__(self, send: Send, scope: Scope, refused: Callable[[int], None]) -> None:
        self._send = send
        self._scope = scope
        self._refused = refused
        self._ended = asyncio.Event() if scope["method"] == "HEAD" else None
        self.origin: bytes | None = None  # an allowed one
        self.has_begun = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """The `send` that the application sees."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = [*message.get("headers", ()), (ids.HEADER, ids.of(self._scope).encode())]
            if self.origin is not None:
                headers += [
                    (b"access-control-allow-origin", self.origin),
                    (b"access-control-expose-headers", _CORS_EXPOSED),
                    (b"vary", b"origin"),
                ]
            message = {**message, "headers": headers}
            if message["status"] >= 400:
                self._refused(message["status"])
        elif self._ended is not None:
            if self._ended.is_set():
                return
            self._ended.set()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def wait_for_end(self) -> MutableMapping[str, Any]:
        """The `receive` of a HEAD: after the head the client wants nothing more, streams included."""
        assert self._ended is not None
        await self._ended.wait()
        return {"type": "http.disconnect"}

    async def fail(self, error: ElasticMoEError, scope: Scope, receive: Receive) -> None:
        """Answer with `error`, unless the answer has begun: then it stays incomplete and the connection is closed."""
        if not self.has_begun:
            await error_response(error)(scope, receive, self)
        else:
            log.warning("answer broken off", status=status_of(error), code=error.code)


def _collect(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Raises InvalidRequest for two fields where one decides."""
    found: dict[bytes, bytes] = {}
    for name, value in fields:
        if name not in _READ:
            continue
        if name in found:
            if name in _SINGLE:
                raise InvalidRequest(f"more than one {name.decode()} header", code="duplicate_header")
            value = found[name] + b", " + value
        found[name] = value
    return found


def _check_encoding(headers: Mapping[bytes, bytes]) -> None:
    for coding in headers.get(b"content-encoding", b"").split(b","):
        if coding.strip().lower() not in (b"", b"identity"):
            raise InvalidRequest(
                f"content-encoding {coding.strip().decode('latin-1')[:40]!r} is not understood: send the body as it is",
                code="unsupported_content_encoding",
            )


def _preflight(headers: Mapping[bytes, bytes]) -> Response:
    """What a browser asks before it lets a page of an allowed origin ask."""
    answer = Response(status_code=204)
    fields = {b"access-control-allow-methods": _CORS_METHODS, b"access-control-max-age": _CORS_SECONDS}
    if asked := headers.get(_ASKED_HEADERS):
        fields[b"access-control-allow-headers"] = asked
    answer.raw_headers += [*fields.items(), (b"vary", _ASKED_HEADERS)]
    return answer
