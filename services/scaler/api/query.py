"""Parameters behind the question mark: known ones, each once, within their bounds."""

from __future__ import annotations

from fastapi import Request

from elasticmoe.common.protocol.errors import InvalidRequest

CHARS_MAX = 200
LIMIT_MAX = 200
LIMIT = {"limit": (f"Only so many, of the newest: 1 to {LIMIT_MAX}; all without it", "20")}


def query_of(request: Request, *known: str) -> dict[str, str]:
    """The parameters. Raises InvalidRequest for others than `known` ones, for one that is there twice, and for one that
    is too long."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise InvalidRequest(f"{name[:40]!r} is no parameter: there are {', '.join(known)}")
        if name in found:
            raise InvalidRequest(f"{name} is there twice", param=name)
        if len(value) > CHARS_MAX:
            text = f"{name} has {len(value)} characters; the limit is {CHARS_MAX}"
            raise InvalidRequest(text, param=name)
        found[name] = value
    return found


def limit_of(request: Request) -> int:
    """How many entries of a list are asked for. Raises InvalidRequest."""
    text = query_of(request, "limit").get("limit", str(LIMIT_MAX))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= LIMIT_MAX:
        raise InvalidRequest(f"limit is {text[:20]!r}; it goes from 1 to {LIMIT_MAX}", param="limit")
    return int(text)
