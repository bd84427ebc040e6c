"""Bytes of a body to a struct, or an error that names the field, the bound and the value.

Telling what is wrong costs no more than having it right: nothing is decoded again but the value that is told.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, TypeVar

import msgspec

from elasticmoe.common.protocol.errors import InvalidRequest
from elasticmoe.common.wording import not_json, read, shown

T = TypeVar("T")

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
_VALUE_BYTES_MAX = 4_096  # of what is looked at to tell it
_PARAM_CHARS_MAX = 100


def decode(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """Decode a body. Raises InvalidRequest: `invalid_json` for what is none, else with `param`, the field."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        complaint = read(error, decoder.type)
        param = complaint.path[:_PARAM_CHARS_MAX]
        text = complaint._replace(path=param).told(_value(raw, complaint.path) if param else "")
        raise InvalidRequest(text if param else f"the body {text}", param=param or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(not_json(error, raw), code="invalid_json") from None


def _value(raw: bytes, path: str) -> str:
    """The value at `path`, where it is short; empty where it is not looked at, or one of several."""
    if "..." in path:
        return ""
    try:
        for key, index in (match.groups() for match in _STEP.finditer(path)):
            if index and len(raw) > _VALUE_BYTES_MAX:
                return ""
            raw = _items.decode(raw)[int(index)] if index else _named(key).decode(raw).value
        return shown(msgspec.json.decode(raw)) if len(raw) <= _VALUE_BYTES_MAX else ""
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return ""


_items = msgspec.json.Decoder(list[msgspec.Raw])


@cache
def _named(key: str) -> msgspec.json.Decoder[Any]:
    """Decodes the member `key` of an object as it stands there, and passes over all others. A key is a field of ours:
    there are few."""
    fields = [("value", msgspec.Raw, msgspec.field(name=key))]
    return msgspec.json.Decoder(msgspec.defstruct("Member", fields))
