"""What became of an exception: whose fault it is, and what the client is told. Pure."""

from __future__ import annotations

from typing import Final

from elasticmoe.common.protocol.errors import ElasticMoEError, RequestFailed
from elasticmoe.common.telemetry import get_logger

log = get_logger("engine")

OUT_OF_MEMORY: Final = "out_of_memory"
_TEXTS: Final = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")


def is_shortage(error: Exception) -> bool:
    """Whether it says that memory could not be had. PyTorch's CPU allocator raises a RuntimeError of many words."""
    if isinstance(error, ElasticMoEError):
        return error.code == OUT_OF_MEMORY
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _TEXTS)


def failure_of(error: Exception, doing: str, **names: str) -> ElasticMoEError:
    """The end of the one request whose own part of a step raised `error`. Re-raises want of memory: that is the whole
    step's, and the step is repeated. An error that was not written for clients is logged with the
    request's `names`, and told as RequestFailed."""
    if is_shortage(error):
        raise error
    if isinstance(error, ElasticMoEError):
        return error
    log.exception("request failed", doing=doing, **names)
    return RequestFailed(f"the engine failed while {doing}; other requests are not affected")


def plan_error() -> RequestFailed:
    """The end of the request whose part of a plan raised."""
    return RequestFailed("the engine failed while planning the request's next step; other requests are not affected")
