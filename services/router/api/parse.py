"""Bytes of a body to a request struct, or an error that names the field, the bound and the value.

A body is decoded once, in one go, so what it may consist of is bounded before. Telling what is wrong costs no more
than having it right: nothing is decoded again but the value that is told.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from common.protocol.errors import InvalidRequest, Unavailable
from common.protocol.limits import PROMPT_TOKENS_MAX
from services.router.api.gate import front_of
from services.router.api.parts import PIECE_BYTES, Parts
from services.router.api.schemas import BATCH_MAX
from services.router.api.whole import to_integers, told
from services.router.front import Front

T = TypeVar("T")

LARGE_BYTES = 64 * 1024  # below, whatever it consists of takes a few milliseconds

_PATH = re.compile(r"^(.*) - at (?:`key` in )?`\$([^`]*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_VALUE_CHARS_MAX = 40
_VALUE_BYTES_MAX = 4_096  # of what is looked at to tell it


async def body_of(request: Request, decoder: msgspec.json.Decoder[T]) -> T:
    """The request's body. Large ones are looked at in pieces, so that others get their turns. Raises InvalidRequest."""
    raw = await request.body()
    if len(raw) > LARGE_BYTES:
        front = front_of(request)
        parts = Parts(_tokens_max(front))
        for start in range(0, len(raw), PIECE_BYTES):
            await front.turns.wait()
            parts.count(raw[start : start + PIECE_BYTES])
        await front.turns.wait()
    return parse(decoder, raw)


def _tokens_max(front: Front) -> int:
    """Of all prompts of a request together."""
    try:
        return min(BATCH_MAX * front.dispatcher.max_model_len(), PROMPT_TOKENS_MAX)
    except Unavailable:
        return PROMPT_TOKENS_MAX


def parse(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """Decode a body strictly, whose parts have been counted. Raises InvalidRequest for anything else than a valid
    request of that kind."""
    try:
        return to_integers(decoder.decode(raw))
    except msgspec.ValidationError as error:
        raise _explain(str(error), raw) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error!s:.200}", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None


def _explain(text: str, raw: bytes) -> InvalidRequest:
    match = _PATH.match(text)
    if match is None:
        return InvalidRequest(f"the body is not a valid request: {text[:200]}")
    what, path = match.groups()
    param = path.lstrip(".")[:100]
    return InvalidRequest(f"{param}: {told(what)[:200].lower()}{_given(raw, path)}", param=param)


def _given(raw: bytes, path: str) -> str:
    """`, got <value>` for a short plain value at `path`, else nothing: the text of a wrong type tells enough."""
    try:
        for key, index in _STEP.findall(path):
            if not key and len(raw) > _VALUE_BYTES_MAX:
                return ""
            raw = _named(key).decode(raw).value if key else _items.decode(raw)[int(index)]
        if len(raw) > _VALUE_BYTES_MAX:
            return ""
        value: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, LookupError, TypeError):
        return ""
    if isinstance(value, str | list | dict):
        return f", got length {len(value)}" if len(value) > 0 else ", got an empty value"
    return f", got {str(value)[:_VALUE_CHARS_MAX]}"


_items = msgspec.json.Decoder(list[msgspec.Raw])


@cache
def _named(key: str) -> msgspec.json.Decoder[Any]:
    """Decodes the member `key` of an object as it stands there, and passes over all others. A key is a field of ours:
    there are few."""
    fields = [("value", msgspec.Raw, msgspec.field(name=key))]
    return msgspec.json.Decoder(msgspec.defstruct("Member", fields))
