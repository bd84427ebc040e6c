"""The one place where the command line makes HTTP clients, and reads streams of lines from them.

No client heeds the environment: a proxy, a certificate bundle or a .netrc that is meant for the internet would stand
between a command and the deployment beside it, and differently for each command.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from elasticmoe.common.private import UNSAFE
from elasticmoe.common.protocol.errors import ConfigError, Unavailable

_CONNECT_S = 5.0
_CREDENTIALS = struct.Struct("3i")  # ucred: process, user, group


def client(url: str = "", *, ca_file: str | None = None, **options: Any) -> httpx.Client:
    """A blocking client; `options` as httpx.Client has them. Raises ConfigError for a URL or certificates that are
    none."""
    check_url(url)
    return httpx.Client(base_url=url, trust_env=False, verify=verification(url, ca_file), **options)


def local_client(path: Path, **options: Any) -> httpx.Client:
    """A blocking client of a Unix socket, whose listener has proved to be of this user. Raises Unavailable when nobody
    listens, ConfigError when somebody else does."""
    check_peer(path)
    transport = httpx.HTTPTransport(uds=str(path), verify=False, trust_env=False)
    return httpx.Client(base_url="http://localhost", trust_env=False, transport=transport, **options)


def check_peer(path: Path) -> None:
    """Whether this user listens on the Unix socket at `path`: as the kernel knows it, not as the path says. Raises
    Unavailable, ConfigError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CONNECT_S)
        try:
            connection.connect(os.fspath(path))
        except OSError as error:
            text = f"nobody listens on {path}: {error.strerror or error}"
            raise Unavailable(text, code="unreachable") from None
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise ConfigError(f"uid {uid} listens on {path}, not {os.geteuid()}", code=UNSAFE)


def why(error: httpx.HTTPError) -> str:
    """Why there was no answer, without the client library's words."""
    if isinstance(error, httpx.ConnectError):
        return "nobody listens there"
    return "no answer in time" if isinstance(error, httpx.TimeoutException) else "the connection broke"


def tls_trouble(url: str, error: httpx.HTTPError) -> str:
    """Why no connection to the server at `url` can be had that both sides understand; empty where TLS is not why.

    Blocks for a handshake where a server of a URL without TLS broke off.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{url} cannot prove who it is ({cause.verify_message}): name the certificates to trust with --ca-file"
    if cause is not None:
        return f"{url} does not speak TLS as we do: for a server without it write http://"
    is_broken_off = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
    return speaks_tls_text(url) if is_broken_off and speaks_tls(url) else ""


def speaks_tls_text(url: str) -> str:
    """What is said of a server that is spoken to without TLS and has it."""
    return f"{url} speaks TLS: write https://"


def speaks_tls(url: str) -> bool:
    """Whether the server of a URL without TLS makes a handshake, whoever it is. Blocks."""
    parts = urlsplit(url)
    if parts.scheme != "http":
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), _CONNECT_S) as connection:
            context.wrap_socket(connection, server_hostname=parts.hostname).close()
    except (OSError, ValueError):
        return False
    return True


def check_url(url: str) -> None:
    """Raises ConfigError for what is not an http or https URL with a host. Empty is none, and right."""
    try:
        parsed, parts = httpx.URL(url), urlsplit(url)
        is_right = not url or (parsed.scheme in ("http", "https") and bool(parsed.host) and parts.port != 0)
    except (httpx.InvalidURL, ValueError):
        is_right = False
    if not is_right:
        raise ConfigError(
            f"URL {url[:200]!r}: has to be http:// or https:// with a host, and with a port up to 65535 if any",
            code="bad_url",
        )


def verification(url: str, ca_file: str | None) -> ssl.SSLContext | bool:
    """How the server of a URL proves who it is; False for plain HTTP, where nobody does. Raises ConfigError."""
    if not url.startswith("https:"):
        return False
    try:
        context = httpx.create_ssl_context(trust_env=False)
        if ca_file is not None:
            context.load_verify_locations(cafile=ca_file)
    except (OSError, ValueError) as error:
        is_file = isinstance(error, OSError) and not isinstance(error, ssl.SSLError)
        reason = error.strerror if isinstance(error, OSError) and is_file else "it holds none in PEM form"
        raise ConfigError(f"certificates in {ca_file} cannot be loaded: {reason}", code="bad_certificates") from None
    return context
