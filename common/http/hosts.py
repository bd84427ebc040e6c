"""Who may ask a listener that has no key: programs of this machine, not pages that a browser has loaded elsewhere.

A page can let its own name resolve to this machine (DNS rebinding): its requests then carry that name as Host. Or it
asks us by our address: then its Origin is another one. So both are checked, unless a key proves who asks. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from elasticmoe.common.http.framing import is_authority
from elasticmoe.common.protocol.errors import ConfigError, Forbidden

ANY = "*"
HOSTS_KEPT = 64
_SHOWN_CHARS_MAX = 80


def split(setting: str) -> tuple[str, ...]:
    """The entries of a list that is written with commas."""
    return tuple(entry.strip().lower() for entry in setting.split(",") if entry.strip())


class Policy(Protocol):
    """Which hosts and origins a listener accepts."""

    def check_host(self, host: bytes | None, local: str) -> None:
        """Raises Forbidden for a host that is not known. `local`: the address that the connection came to."""

    def check_origin(self, origin: bytes, host: bytes | None, local: str) -> None:
        """Raises Forbidden for a page that may not ask. `local`: as in `check_host`."""

    def allows(self, origin: bytes) -> bool:
        """Whether pages of `origin` may read the answers."""


class OwnPages:
    """Of a listener that asks for a credential by whatever name it is reached, and has pages of its own: no other page
    may ask. A page that a browser has by a name that is not ours is none of ours, though it would name itself so.
    `bound`: the host that it was told to listen on. A Policy."""

    def __init__(self, bound: str) -> None:
        self._known = HostPolicy(bound, (), (), is_open=True)

    def check_host(self, host: bytes | None, local: str) -> None:
        """Any host."""

    def check_origin(self, origin: bytes, host: bytes | None, local: str) -> None:
        """That of the listener's own pages."""
        if not self._known.is_own(origin, host) or not self._known.knows(host or b"", local):
            text = origin.decode("latin-1")[:_SHOWN_CHARS_MAX]
            raise Forbidden(f"pages of {text!r} may not ask, only those of this listener", code="origin_refused")

    def check_page(self, host: bytes | None, local: str) -> None:
        """Raises Forbidden where a page would be given out by a name that its own requests are refused under."""
        if host is None or not self._known.knows(host, local):
            name = _without_port((host or b"").decode("latin-1"))
            text = f"no pages by the name {name[:_SHOWN_CHARS_MAX]!r}: use localhost, or an address of this listener"
            raise Forbidden(text, code="host_refused")

    def allows(self, origin: bytes) -> bool:  # noqa: ARG002
        """Answers are for no other origin."""
        return False


class HostPolicy:
    """What a listener accepts. `bound`: the host that it was told to listen on. `allowed`: further names, `*.name` for
    those below one, `*` for all. `origins`: of pages that may ask, as `https://name:port`, `*` for all. `is_open`: no
    key is asked for, so hosts and origins are checked. A Policy. Raises ConfigError for an entry that no request can
    match."""

    def __init__(self, bound: str, allowed: Iterable[str], origins: Iterable[str], *, is_open: bool) -> None:
        self._names = frozenset({_plain(bound), *(_name_of(entry) for entry in allowed)})
        self._suffixes = tuple(name[1:] for name in self._names if name.startswith("*."))
        self._origins = frozenset(origins)
        self._is_open = is_open
        self.knows = lru_cache(HOSTS_KEPT)(self._knows)  # addresses are dear to parse, and clients repeat theirs
        for origin in self._origins - {ANY, "null"}:
            scheme, separator, rest = origin.partition("://")
            if not scheme or not separator or not rest or "/" in rest:
                raise ConfigError(f"cors_origins: {origin[:_SHOWN_CHARS_MAX]!r} is no origin: write https://name:port")

    def check_host(self, host: bytes | None, local: str) -> None:
        """A request without a Host field is no browser's, and there is nothing to check."""
        if not self._is_open or host is None or self.knows(host, local):
            return
        name = _without_port(host.decode("latin-1"))
        raise Forbidden(
            f"host {name[:_SHOWN_CHARS_MAX]!r} is not known here: add it to allowed_hosts, or set an API key",
            code="host_refused",
        )

    def _knows(self, host: bytes, local: str) -> bool:
        name = _plain(_without_port(host.decode("latin-1")))
        is_named = name in self._names or name.endswith(self._suffixes) or ANY in self._names
        return is_named or _is_loopback(name) or name == _plain(local)

    def check_origin(self, origin: bytes, host: bytes | None, local: str) -> None:  # noqa: ARG002
        """Pages of the listener's own origin may ask, and those of allowed ones."""
        if not self._is_open or self.allows(origin) or self.is_own(origin, host):
            return
        text = origin.decode("latin-1")[:_SHOWN_CHARS_MAX]
        raise Forbidden(f"pages of {text!r} may not ask: add it to cors_origins", code="origin_refused")

    @staticmethod
    def is_own(origin: bytes, host: bytes | None) -> bool:
        """Whether it is a page's that came from the listener by this name."""
        own = (host or b"").lower()
        return bool(own) and origin.lower() in (b"http://" + own, b"https://" + own)

    def allows(self, origin: bytes) -> bool:
        """By the setting."""
        return ANY in self._origins or origin.decode("latin-1").lower() in self._origins


def _name_of(entry: str) -> str:
    """An entry of `allowed_hosts`. Raises ConfigError for what stands in no Host field."""
    try:
        return _plain(str(ipaddress.ip_address(entry)))
    except ValueError:
        if not entry.isascii() or not is_authority(entry.encode()):
            text = f"allowed_hosts: {entry[:_SHOWN_CHARS_MAX]!r} is no host: write a name, *.name, an address or *"
            raise ConfigError(text) from None
        return _plain(_without_port(entry))


def _without_port(authority: str) -> str:
    if authority.startswith("["):
        return authority.partition("]")[0] + "]"
    return authority.partition(":")[0]


def _plain(host: str) -> str:
    """A host without what may differ: case, a final dot, brackets, and IPv4 written as IPv6."""
    name = host.strip().lower().rstrip(".").removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
