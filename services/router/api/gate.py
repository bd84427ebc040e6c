"""What every request passes before an endpoint sees it: key, permit, and its body within size and time.

Pure ASGI. A permit is first looked for, then the body is read, then the permit is taken: a full house refuses before it
works, and a body that trickles in keeps no one else out.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

from starlette.requests import Request

from elasticmoe.common.http import ids
from elasticmoe.common.http.body import Body, Receive
from elasticmoe.common.http.door import Scope, Send, bearer_of, headers_of
from elasticmoe.common.protocol.errors import InvalidRequest, Overloaded, Unauthorized, Unavailable
from elasticmoe.services.router.api.front import Front
from elasticmoe.services.router.api.request_trace import Caller, begin_trace
from elasticmoe.services.router.dispatch.admission import Permit

PUBLIC_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
WORK_PATHS = GENERATION_PATHS | {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}

_SCOPE_PERMIT = "elasticmoe.permit"
_SCOPE_TRACE = "elasticmoe.trace"


class Gate:
    """The ASGI application behind the door."""

    def __init__(self, app: Any, front: Front) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. Raises its refusal, or ClientLeft. A generation that is refused here for want of room is
        demand too; of how much work, nobody has read."""
        try:
            await self._pass(scope, receive, send)
        except Overloaded:
            if scope["path"] in GENERATION_PATHS:
                self._front.dispatcher.windows.refused()
            raise

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        front, path = self._front, scope["path"]
        if front.api_key is not None and path not in PUBLIC_PATHS:
            _authorize(front.api_key, scope)
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            await self._app(scope, receive, send)
            return
        trace = None
        if front.spans is not None and path in GENERATION_PATHS and scope["method"] == "POST":
            trace = begin_trace(front.spans, scope, front.model.name)
        if trace is None:
            await self._work(scope, receive, send)
            return
        scope[_SCOPE_TRACE] = trace
        with trace:
            await self._work(scope, receive, trace.watching(send))

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        front, path, headers = self._front, scope["path"], headers_of(scope)
        does_work = path in WORK_PATHS and scope["method"] == "POST"
        if does_work:
            if front.is_draining:
                raise Unavailable("the router is shutting down", code="shutting_down")
            _check_content_type(headers)
            front.permits.check()
        config = front.config
        body = Body(receive, config.body_bytes_max, config.body_seconds_max, front.bodies)
        try:
            await body.read(headers)
            with front.permits.acquire() if does_work else nullcontext() as permit:
                scope[_SCOPE_PERMIT] = permit
                await self._app(scope, body.replay, send)
        finally:
            body.release()


def _authorize(key: bytes, scope: Scope) -> None:
    given = bearer_of(scope) or headers_of(scope).get(b"x-api-key", b"")  # by which Anthropic's clients send it
    if not hmac.compare_digest(given, key):
        raise Unauthorized("the API key is missing or wrong: send it as Authorization: Bearer <key>")


def _check_content_type(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise InvalidRequest("content-type must be application/json", code="unsupported_media_type")


def front_of(request: Request) -> Front:
    """The running router's parts."""
    return cast(Front, request.app.state.front)


def permit_of(request: Request) -> Permit:
    """The permit that the gate took for this request; the gate gives it back."""
    return cast(Permit, request.scope[_SCOPE_PERMIT])


def client_of(request: Request) -> str:
    """Whom a request is counted to where clients take turns: the peer's address."""
    return request.client.host if request.client is not None else ""


def caller_of(request: Request, given: str | None) -> Caller:
    """Whose request it is. `given`: the id that its body names."""
    return Caller(request_id_of(request, given), request.scope.get(_SCOPE_TRACE))


def request_id_of(request: Request, given: str | None) -> str:
    """The request's id: its header's, or the body's, or one that was drawn for it. The answer's header has it too."""
    return ids.take_from_body(request.scope, given)
