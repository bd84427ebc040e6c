"""What a request's head must fulfil beyond what the parser checks (RFC 9112, RFC 9110). Pure.

llhttp, strict, refuses malformed lines, folded headers, bare line feeds, twofold or conflicting lengths and broken
chunks. It leaves to its user: the Host field, the form of the target, versions, and codings that it does not decode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from elasticmoe.common.http.refusal import Refusal, bad_request, bad_version

Headers = list[tuple[bytes, bytes]]

# RFC 3986 section 3.2.2 and 3.2.3, without user information: RFC 9110 section 4.2.4 forbids it.
_NAME = rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"
_AUTHORITY = re.compile(rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|" + _NAME + rb")(?::([0-9]{0,5}))?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]+)([^?#]*)(?:\?([^#]*))?", re.IGNORECASE)
_UPGRADE_FIELDS = (b"upgrade", b"http2-settings")
_PORT_MAX = 65_535


class RequestTarget(NamedTuple):
    """`path` decoded and `raw_path` as sent, without the query. `authority`: of an absolute target, else None."""

    path: str
    raw_path: bytes
    query: bytes
    authority: bytes | None


def is_authority(value: bytes) -> bool:
    """Whether `value` may stand in a Host field: a name or an address, with or without a port."""
    match = _AUTHORITY.fullmatch(value)
    return match is not None and int(match[1] or 0) <= _PORT_MAX


def target_of(method: bytes, url: bytes) -> RequestTarget:
    """The target in any of the forms of RFC 9112 section 3.2 that an origin server serves. Raises Refusal."""
    if b"#" in url:
        raise bad_request("a fragment in the target")
    if url.startswith(b"/"):
        raw_path, _, query = url.partition(b"?")
        authority = None
    elif url == b"*" and method == b"OPTIONS":
        return RequestTarget("*", b"*", b"", None)
    else:
        match = _ABSOLUTE.fullmatch(url)
        if match is None or not is_authority(match[1]):
            raise bad_request("the target")
        authority, raw_path, query = match[1], match[2] or b"/", match[3] or b""
    path = raw_path.decode("ascii")
    return RequestTarget(unquote(path) if "%" in path else path, raw_path, query, authority)


def check_version(version: str) -> None:
    """Raises Refusal for another one than HTTP/1.1 and 1.0, such as the preface of HTTP/2."""
    if version not in ("1.1", "1.0"):
        raise bad_version()


def check_host(version: str, hosts: Sequence[bytes]) -> None:
    """One Host field with a valid value, which only HTTP/1.0 may leave out (RFC 9112 section 3.2). Raises Refusal."""
    if len(hosts) > 1:
        raise bad_request("more than one Host")
    if not hosts and version != "1.0":
        raise bad_request("there is no Host")
    if hosts and not is_authority(hosts[0]):
        raise bad_request("the value of Host")


def check_coding(version: str, codings: Sequence[bytes]) -> None:
    """No transfer coding but `chunked`, and none in HTTP/1.0 (RFC 9112 section 6.1). Raises Refusal."""
    if not codings:
        return
    if version == "1.0":
        raise bad_request("Transfer-Encoding in HTTP/1.0")
    if b"" in codings:
        raise bad_request("an empty Transfer-Encoding")
    if len(codings) > 1 or codings[0].lower() != b"chunked":
        raise Refusal(
            501, "transfer_coding_not_implemented", "the only Transfer-Encoding that is understood is chunked"
        )


def replace_host(headers: Headers, authority: bytes) -> None:
    """In place: the host of an absolute target stands for the field (RFC 9112 section 3.2.2)."""
    headers[:] = [(b"host", authority), *(field for field in headers if field[0] != b"host")]


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """The head once more, without its offer to change to another protocol, which a server may ignore (RFC 9110
    section 7.8): what follows is then framed as the rest of the head says."""
    lines = [b"%b %b HTTP/%b\r\n" % (method, url, version.encode())]
    for name, value in headers:
        if name in _UPGRADE_FIELDS:
            continue
        if name == b"connection":
            options = [option.strip() for option in value.split(b",")]
            value = b", ".join(option for option in options if option.lower() not in _UPGRADE_FIELDS)
        lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(b"\r\n")
    return b"".join(lines)
