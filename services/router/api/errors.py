"""How a stream of chunks ends, also where it fails after it has begun."""

from __future__ import annotations

import msgspec

from elasticmoe.common.http.errors import ErrorBody, detail_of
from elasticmoe.common.protocol.errors import ElasticMoEError

DONE = b"data: [DONE]\n\n"


def failing(error: ElasticMoEError) -> bytes:
    """What `error_response` says as an event, and the end."""
    return b"data: %b\n\n%b" % (msgspec.json.encode(ErrorBody(detail_of(error))), DONE)
