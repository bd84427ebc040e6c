"""Bytes of a body to a request struct, or an error that names the field, the bound and the value."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from common.protocol.errors import InvalidRequest
from services.router.api.whole import to_integers, told

T = TypeVar("T")

_PATH = re.compile(r"^(.*) - at (?:`key` in )?`\$([^`]*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_VALUE_CHARS_MAX = 40


def parse(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """Decode a body strictly. Raises InvalidRequest for anything else than a valid request of that kind."""
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
        value: Any = msgspec.json.decode(raw)
        for key, index in _STEP.findall(path):
            value = value[key] if key else value[int(index)]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, LookupError, TypeError):
        return ""
    if isinstance(value, str | list | dict):
        return f", got length {len(value)}" if len(value) > 0 else ", got an empty value"
    return f", got {str(value)[:_VALUE_CHARS_MAX]}"
