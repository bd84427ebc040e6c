"""The id of a request: its client's, where that can be used, else one that is drawn for it."""

from __future__ import annotations

import re
import secrets
from collections.abc import MutableMapping
from typing import Any

from elasticmoe.common.protocol.limits import REQUEST_ID_CHARS_MAX
from elasticmoe.common.telemetry import log_about, log_also

REQUEST_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
assert REQUEST_ID_CHARS_MAX == 128, "REQUEST_ID_PATTERN states the limit"

HEADER = b"x-request-id"
_SCOPE_ID = "elasticmoe.request_id"
_SCOPE_IS_GIVEN = "elasticmoe.request_id_is_given"
_usable = re.compile(REQUEST_ID_PATTERN.encode())


def assign(scope: MutableMapping[str, Any]) -> None:
    """Give the request its id. One that cannot be used, or two, are no reason to refuse a request: proxies write what
    they like; the answer says which id is in force."""
    given = [value for name, value in scope["headers"] if name == HEADER]
    is_given = len(given) == 1 and _usable.fullmatch(given[0]) is not None
    scope[_SCOPE_IS_GIVEN] = is_given
    scope[_SCOPE_ID] = given[0].decode() if is_given else drawn()
    log_about(request_id=of(scope))


def drawn() -> str:
    """A new id."""
    return secrets.token_hex(12)


def of(scope: MutableMapping[str, Any]) -> str:
    """The id in force."""
    return str(scope[_SCOPE_ID])


def take_from_body(scope: MutableMapping[str, Any], given: str | None) -> str:
    """The id in force once the body is known, which may name one where the header does not: `given`, by the pattern."""
    if given is not None and not scope[_SCOPE_IS_GIVEN]:
        scope[_SCOPE_ID] = given
        log_also(request_id=given)
    return of(scope)
