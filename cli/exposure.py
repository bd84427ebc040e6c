"""Who can reach a listener, and whether it may be without a key then."""

from __future__ import annotations

import ipaddress
import socket

from elasticmoe.cli.settings import Settings
from elasticmoe.common.http.keys import read_key
from elasticmoe.common.protocol.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener on `host`. A name that is none is not."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def check_api_key(settings: Settings, *, may_lack: bool) -> None:
    """A listener that other machines reach has a key, unless the operator has said that it `may_lack` one; a key's file
    can be read. Raises ConfigError."""
    router = settings.router
    if router.api_key_file:
        read_key(router.api_key_file)
        if may_lack:
            raise ConfigError(f"--no-api-key, and there is one in {router.api_key_file}: leave one of them out")
    elif not may_lack and not is_loopback(router.host):
        raise ConfigError(
            f"other machines reach {router.host}, and everybody there could use it: name a file with a key "
            f"(--api-key-file FILE), or say that none is wanted (--no-api-key)",
            code="no_api_key",
        )
