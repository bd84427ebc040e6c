"""What every request passes before an endpoint sees it: identity, key, permit, and its body within size and time.

Pure ASGI. Decisions rest on `scope["path"]`, the path that the endpoints are chosen by; nothing here reads the Host
header. A permit is first looked for, then the body is read, then the permit is taken: a full house refuses before it
works, and a body that trickles in keeps no one else out.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any, cast

from starlette.requests import Request

from common.protocol.errors import ElasticMoEError, InvalidRequest, PayloadTooLarge, Unauthorized, Unavailable
from common.telemetry import get_logger
from services.router.admission import Permit
from services.router.api.errors import SCOPE_REQUEST_ID, Receive, Scope, Send, error_response, status_of
from services.router.api.schemas import REQUEST_ID_PATTERN
from services.router.front import Front

log = get_logger("router")

PUBLIC_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
WORK_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
HEADER_NAMES = (b"authorization", b"content-length", b"content-type", b"x-request-id")

_SCOPE_PERMIT = "elasticmoe.permit"
_request_id = re.compile(REQUEST_ID_PATTERN.encode())


class ClientLeft(Exception):
    """The client disconnected while its body was awaited; there is nobody to answer."""


class Gate:
    """The outermost ASGI application; also the last resort for exceptions."""

    def __init__(self, app: Any, front: Front) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; never raises but for cancellation."""
        if scope["type"] != "http":
            return
        headers = {name: value for name, value in scope["headers"] if name in HEADER_NAMES}
        given = headers.get(b"x-request-id", b"")
        is_valid = _request_id.fullmatch(given) is not None
        scope[SCOPE_REQUEST_ID] = given.decode() if is_valid else secrets.token_hex(12)
        sender = _Sender(send, scope[SCOPE_REQUEST_ID], self._front)
        try:
            if given and not is_valid:
                raise InvalidRequest("x-request-id must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")
            await self._serve(scope, headers, receive, sender)
        except ElasticMoEError as error:
            await sender.fail(error, scope, receive)
        except ClientLeft:
            pass
        except Exception:
            log.exception("unexpected error", request=scope[SCOPE_REQUEST_ID])
            if not sender.has_begun:
                await sender.fail(ElasticMoEError("unexpected error"), scope, receive)

    async def _serve(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, sender: _Sender) -> None:
        front, path = self._front, scope["path"]
        if front.api_key is not None and path not in PUBLIC_PATHS:
            _authorize(front.api_key, headers)
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, sender)
            return
        does_work = path in WORK_PATHS and scope["method"] == "POST"
        if does_work:
            if front.is_draining:
                raise Unavailable("the router is shutting down", code="shutting_down")
            _check_content_type(headers)
            front.permits.check()
        body = _Body(front, receive)
        try:
            await body.read(headers)
            with front.permits.acquire() if does_work else nullcontext() as permit:
                scope[_SCOPE_PERMIT] = permit
                await self._app(scope, body.replay, sender)
        finally:
            body.release()


class _Sender:
    """Passes messages on; adds the request id, counts errors, and knows whether the answer has begun."""

    def __init__(self, send: Send, request_id: str, front: Front) -> None:
        self._send = send
        self._request_id = request_id
        self._front = front
        self.has_begun = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """The `send` that the app sees."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = [*message.get("headers", ()), (b"x-request-id", self._request_id.encode())]
            message = {**message, "headers": headers}
            if message["status"] >= 400:
                self._front.metrics.refused(message["status"])
        await self._send(message)

    async def fail(self, error: ElasticMoEError, scope: Scope, receive: Receive) -> None:
        """Answer with `error`, unless the answer has begun: then it stays incomplete and the connection is closed."""
        if not self.has_begun:
            await error_response(error)(scope, receive, self)
        else:
            log.warning("answer broken off", request=self._request_id, status=status_of(error), code=error.code)


class _Body:
    """One request's body, read whole within its limits and then replayed to the app."""

    def __init__(self, front: Front, receive: Receive) -> None:
        self._front = front
        self._receive = receive
        self._chunks: list[bytes] = []
        self._held = 0
        self._is_replayed = False

    async def read(self, headers: dict[bytes, bytes]) -> None:
        """Raises PayloadTooLarge, Overloaded, InvalidRequest when it takes too long, ClientLeft."""
        config = self._front.config
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > config.body_bytes_max:
            raise _too_large(config.body_bytes_max)
        try:
            async with asyncio.timeout(config.body_seconds_max):
                await self._read_all(config.body_bytes_max)
        except TimeoutError:
            raise InvalidRequest(
                f"the body did not arrive within {config.body_seconds_max:g} s", code="request_timeout"
            ) from None

    async def _read_all(self, most: int) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            if self._held + len(chunk) > most:
                raise _too_large(most)
            self._front.bodies.take(len(chunk))
            self._held += len(chunk)
            self._chunks.append(chunk)
            if not message.get("more_body", False):
                return

    async def replay(self) -> MutableMapping[str, Any]:
        """The `receive` that the app sees: the body once, then whatever the server says."""
        if self._is_replayed:
            return await self._receive()
        self._is_replayed = True
        body, self._chunks = b"".join(self._chunks), []
        return {"type": "http.request", "body": body, "more_body": False}

    def release(self) -> None:
        """The request has ended."""
        self._front.bodies.give(self._held)
        self._held = 0
        self._chunks = []


def _authorize(key: bytes, headers: dict[bytes, bytes]) -> None:
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key):
        raise Unauthorized("the API key is missing or wrong: send it as Authorization: Bearer <key>")


def _check_content_type(headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise InvalidRequest("content-type must be application/json", code="unsupported_media_type")


def _too_large(most: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body exceeds the limit of {most} bytes")


def front_of(request: Request) -> Front:
    """The running router's parts."""
    return cast(Front, request.app.state.front)


def permit_of(request: Request) -> Permit:
    """The permit that the gate took for this request; the gate gives it back."""
    return cast(Permit, request.scope[_SCOPE_PERMIT])


def request_id_of(request: Request, given: str | None) -> str:
    """The request's id: its header's, or the body's, or one that was drawn for it."""
    has_header = any(name == b"x-request-id" for name, _ in request.scope["headers"])
    return given if given is not None and not has_header else str(request.scope[SCOPE_REQUEST_ID])
