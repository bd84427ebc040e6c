"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, with the right status.

What a client is told comes from errors that were written for it. Anything else is logged and told as "internal error".
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from elasticmoe.common.described import says
from elasticmoe.common.error_codes import CODES
from elasticmoe.common.protocol import errors
from elasticmoe.common.protocol.errors import ElasticMoEError, InvalidRequest, NotFound
from elasticmoe.common.telemetry import get_logger

log = get_logger("http")

RETRY_AFTER_S = 1

# Of status 500, those whose text was written for the client: its own request cannot be computed.
_FOR_CLIENTS = frozenset({errors.RequestFailed.code, "bad_logits"})
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is wrong."""

    message: Annotated[str, says("For people, with the limit and the value")]
    type: Annotated[str, says("The family, by OpenAI's names", "invalid_request_error", "rate_limit_error")]
    param: Annotated[str | None, says("The field that it is about, where it is about one")]
    code: Annotated[str, says("Stable, for programs: docs/reference/errors.md lists all", "invalid_request")]


class ErrorBody(msgspec.Struct, frozen=True):
    """Every error, whatever its status."""

    error: Annotated[ErrorDetail, says("What is wrong")]


def status_of(error: ElasticMoEError) -> int:
    """The HTTP status of an error: its family's, unless its code stands for another one. An error of another process
    comes as a code; one that is not for answers is an internal error, or a want of something that may come back."""
    code = CODES.get(error.code)
    statuses = code.statuses if code is not None else ()
    if type(error) is ElasticMoEError:
        return statuses[0] if statuses else 503 if error.retryable else 500
    return error.http_status if error.http_status in statuses or not statuses else statuses[0]


def type_of(status: int) -> str:
    """The family that a status belongs to, by OpenAI's names."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def detail_of(error: ElasticMoEError) -> ErrorDetail:
    """What a client is told. An error that is not its business keeps its text to itself."""
    status = status_of(error)
    is_internal = status == 500 and error.code not in _FOR_CLIENTS
    if is_internal:
        log.error("request failed", code=error.code, error=error.message)
    return ErrorDetail(
        message="internal error" if is_internal else error.message,
        type=type_of(status),
        param=error.param if isinstance(error, InvalidRequest) else None,
        code="internal_error" if is_internal else error.code,
    )


def error_response(error: ElasticMoEError) -> Response:
    """The answer to a request that ends with `error`."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if status in (429, 503) or error.retryable:
        headers["retry-after"] = str(RETRY_AFTER_S)
    if status == 401:
        headers["www-authenticate"] = "Bearer"  # RFC 9110 section 15.5.2
    if error.code == "unsupported_content_encoding":
        headers["accept-encoding"] = "identity"  # RFC 9110 section 12.5.3
    return Response(msgspec.json.encode(ErrorBody(detail_of(error))), status, headers, "application/json")


async def on_error(_: Request, error: Exception) -> Response:
    """Exception handler of an app. What is unexpected goes on to the door, which logs it."""
    return error_response(error if isinstance(error, ElasticMoEError) else ElasticMoEError("unexpected error"))


async def on_status(request: Request, error: Exception) -> Response:
    """Exception handler for what the framework refuses: unknown paths and methods."""
    status = int(getattr(error, "status_code", 500))
    if status == 404:
        return error_response(NotFound("no such path"))
    if status == 405:
        response = error_response(InvalidRequest("method not allowed for this path", code="method_not_allowed"))
        allowed = (getattr(error, "headers", None) or {}).get("Allow", "")
        methods = {method.strip() for method in allowed.split(",") if method.strip()}
        response.headers["allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        return response
    return await on_error(request, error)
