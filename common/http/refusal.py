"""What is answered without an application: requests that are not valid HTTP, exceed a bound, or find no place."""

from __future__ import annotations

import re
from collections.abc import Iterable

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from elasticmoe.common.http import ids
from elasticmoe.common.http.errors import RETRY_AFTER_S, ErrorBody, ErrorDetail, type_of
from elasticmoe.common.telemetry import get_logger

log = get_logger("http")

_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32} [!-~]+ HTTP/1\.[01]\r\n")
_PREFACE = b"PRI * HTTP/2.0\r\n"


class Refusal(Exception):
    """The last answer of a connection."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        self.text = text

    def encode(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The whole answer, with further header `fields`."""
        body = msgspec.json.encode(ErrorBody(ErrorDetail(self.text, type_of(self.status), None, self.code)))
        own = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (ids.HEADER, ids.drawn().encode()),
        ]
        if self.status == 503:
            own.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        lines = [b"%b: %b\r\n" % field for field in (*fields, *own)]
        return b"".join([STATUS_LINE[self.status], *lines, b"\r\n", body])


def bad_request(text: str) -> Refusal:
    """What is not valid HTTP."""
    return Refusal(400, "bad_http", f"the request is not valid HTTP: {text}")


def bad_version() -> Refusal:
    """Another version than 1.0 and 1.1, such as HTTP/2 without an agreement on it."""
    return Refusal(505, "http_version_not_supported", "the HTTP version is not supported: use HTTP/1.1")


def too_many(text: str) -> Refusal:
    """There is no place for it now."""
    return Refusal(503, "too_many_connections", text)


def explain(error: httptools.HttpParserError, data: bytes) -> Refusal:
    """Why something could not be parsed; `data` came last."""
    if isinstance(error, httptools.HttpParserCallbackError):
        cause = error.__context__
        if isinstance(cause, Refusal):
            return cause
        log.error("a request could not be taken", error=repr(cause))
        return Refusal(500, "internal_error", "internal error")
    if str(error) == "Invalid HTTP version" or data.startswith(_PREFACE):
        return bad_version()
    if isinstance(error, httptools.HttpParserInvalidMethodError) and _REQUEST_LINE.match(data):
        return Refusal(501, "method_not_implemented", "the method is not implemented")
    return bad_request(str(error)[:200])
