"""Errors as events of a stream that has begun."""

from __future__ import annotations

import msgspec

from elasticmoe.common.http.errors import ErrorBody, detail_of
from elasticmoe.common.protocol.errors import ElasticMoEError


def error_event(error: ElasticMoEError) -> bytes:
    """What `error_response` says, for a stream that has begun: an event."""
    return b"data: " + msgspec.json.encode(ErrorBody(detail_of(error))) + b"\n\n"
