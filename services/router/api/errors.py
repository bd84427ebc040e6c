"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, with the right status.

What a client is told comes from errors that were written for it. Anything else is logged and told as "internal error".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from common.protocol import errors
from common.protocol.errors import ElasticMoEError, InvalidRequest, NotFound
from common.telemetry import get_logger
from services.router.api.schemas import ErrorBody, ErrorDetail

log = get_logger("router")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

RETRY_AFTER_S = 1
SCOPE_REQUEST_ID = "elasticmoe.request_id"

# Errors of ranks cross a process boundary as codes; these are the families and the codes that stand for another status.
_STATUS_BY_CODE = {
    kind.code: kind.http_status
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ElasticMoEError) and kind is not ElasticMoEError
} | {
    "queue_full": 429,
    "parameters_too_large": 400,
    "request_timeout": 408,
    "method_not_allowed": 405,
    "unsupported_media_type": 415,
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def status_of(error: ElasticMoEError) -> int:
    """The HTTP status of an error."""
    if type(error) is not ElasticMoEError:
        return _STATUS_BY_CODE.get(error.code, error.http_status)
    return _STATUS_BY_CODE.get(error.code, 503 if error.retryable else 500)


def detail_of(error: ElasticMoEError) -> ErrorDetail:
    """What a client is told. An error that is not its business keeps its text to itself."""
    status = status_of(error)
    is_internal = status == 500
    if is_internal:
        log.error("request failed", code=error.code, error=error.message)
    return ErrorDetail(
        message="internal error" if is_internal else error.message,
        type=_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        param=error.param if isinstance(error, InvalidRequest) else None,
        code="internal_error" if is_internal else error.code,
    )


def error_response(error: ElasticMoEError) -> Response:
    """The answer to a request that ends with `error`."""
    status = status_of(error)
    headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return Response(msgspec.json.encode(ErrorBody(detail_of(error))), status, headers, "application/json")


def error_event(error: ElasticMoEError) -> bytes:
    """The same for a stream that has begun: an event."""
    return b"data: " + msgspec.json.encode(ErrorBody(detail_of(error))) + b"\n\n"


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """An answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def on_error(_: Request, error: Exception) -> Response:
    """Exception handler of the app. What is unexpected goes on to the gate, which logs it."""
    return error_response(error if isinstance(error, ElasticMoEError) else ElasticMoEError("unexpected error"))


async def on_status(request: Request, error: Exception) -> Response:
    """Exception handler for what the framework refuses: unknown paths and methods."""
    status = int(getattr(error, "status_code", 500))
    if status == 404:
        return error_response(NotFound("no such path"))
    if status == 405:
        response = error_response(InvalidRequest("method not allowed for this path", code="method_not_allowed"))
        response.headers.update(getattr(error, "headers", None) or {})
        return response
    return await on_error(request, error)
