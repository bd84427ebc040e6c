"""Questions about listeners: whether a port is free, and whether a deployment serves (what its `/ready`s say)."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

import httpx
import msgspec

from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.resume import Resumed
from elasticmoe.common.protocol.errors import ElasticMoEError, InvalidRequest
from elasticmoe.common.protocol.replies import Refused

_TIMEOUT_S = 1.0  # the launcher holds the ports, so a process that is not up yet is silence, not a refusal
_PHASE_CHARS_MAX = 60
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """What the deployment does now; bytes of the checkpoint, 0 when they are not known."""

    phase: str
    bytes_done: int = 0
    bytes_total: int = 0


class _Body(msgspec.Struct, frozen=True):
    phase: str = "starting"
    reason: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    error: Refused | None = None
    resumed: Resumed | None = None


class Probe:
    """Asks the two listeners. Owns its connections until `close`. `resumed`: what the scaler goes on with, as it said
    when it was ready."""

    def __init__(self, url: str, admin_url: str) -> None:
        self._ready_urls = (f"{admin_url}/ready", f"{url}/ready")
        self._client = http_client(timeout=_TIMEOUT_S)
        self.resumed: Resumed | None = None

    def progress(self) -> Progress | None:
        """What is still going on, or None when both are ready. Blocks for at most a few seconds.

        Raises ElasticMoEError when the scaler says that it cannot get ready.
        """
        scaler, router = self._ready_urls
        answer = self._get(scaler)
        if answer is None:
            return Progress("starting")
        if answer.status_code != 200:
            return _progress(_parse(answer))
        self.resumed = _parse(answer).resumed
        answer = self._get(router)
        return None if answer is not None and answer.status_code == 200 else Progress("waiting for the router")

    def _get(self, url: str) -> httpx.Response | None:
        try:
            return self._client.get(url)
        except httpx.HTTPError:
            return None

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._client.close()


def _parse(answer: httpx.Response) -> _Body:
    try:
        return msgspec.json.decode(answer.content, type=_Body)
    except msgspec.DecodeError:
        return _Body()


def _progress(body: _Body) -> Progress:
    if body.phase == "failed":
        if body.error is not None:
            body.error.raise_()
        raise ElasticMoEError(body.reason or "the scaler gave up", code="start_failed")
    if body.phase != "loading":  # the scaler goes on to report the bytes that it has loaded
        return Progress(body.phase[:_PHASE_CHARS_MAX] or "starting")
    return Progress(body.phase, max(0, body.bytes_done), max(0, body.bytes_total))


def bind_once(host: str, port: int, flag: str) -> None:
    """Bind a TCP port for a moment, as a deployment will. Raises InvalidRequest as `listen` does."""
    listen(host, port, flag).close()


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A listening TCP socket, owned by the caller; `port` 0 is a free one. `flag`: what chooses another port.

    Raises InvalidRequest saying why it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise InvalidRequest(f"host {host!r} cannot be resolved", code="bad_host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # two sockets that do not listen yet may have the same port
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} on {host} is in use; choose another with {flag}"
            raise InvalidRequest(text, code="port_in_use") from None
        raise InvalidRequest(f"port {port} on {host}: {error.strerror}", code=_bind_code(error)) from None
    return listener


def _bind_code(error: OSError) -> str:
    codes = {errno.EADDRNOTAVAIL: "bad_host", errno.EACCES: "port_not_allowed"}
    return codes.get(error.errno or 0, "port_unusable")
