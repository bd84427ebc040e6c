"""Answers of the endpoints: as JSON, and errors as events of a stream that has begun."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from elasticmoe.common.http.errors import ErrorBody, detail_of
from elasticmoe.common.protocol.errors import ElasticMoEError


def error_event(error: ElasticMoEError) -> bytes:
    """What `error_response` says, for a stream that has begun: an event."""
    return b"data: " + msgspec.json.encode(ErrorBody(detail_of(error))) + b"\n\n"


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """An answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
