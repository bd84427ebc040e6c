"""A listener: its socket, its limits, and the server behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate

import uvicorn
from uvicorn.server import ServerState

from elasticmoe.common.http.connection import Rules, guarded
from elasticmoe.common.http.door import Door
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.common.telemetry import get_logger

log = get_logger("http")

BACKLOG = 4_096  # connections that wait to be accepted; the kernel may allow fewer (net.core.somaxconn)
DESCRIPTORS_KEPT = 256  # for everything but connections
AFTER_SHORTAGE_S = 0.01


class _State(ServerState):
    """uvicorn's, with a date of this second whenever somebody asks, so that no timer has to make it."""

    _second = 0
    _headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of every answer."""
        second = int(time.time())
        if second != self._second:
            self._second, self._headers = second, ((b"date", formatdate(second, usegmt=True).encode()),)
        return list(self._headers)

    @default_headers.setter
    def default_headers(self, _: list[tuple[bytes, bytes]]) -> None:
        """uvicorn begins with none."""


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling, which would end requests that may still run, and whose loop waits for its
    end instead of looking ten times a second, and goes on where it finds no memory."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.server_state = _State()
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """Let it end. Any thread; idempotent."""
        self.should_exit = True
        with contextlib.suppress(RuntimeError):  # its loop has ended meanwhile
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._ending.set)

    async def main_loop(self) -> None:
        """Until it shall end."""
        self._loop = asyncio.get_running_loop()
        while not self.should_exit:
            try:
                await self._ending.wait()
            except MemoryError:
                with contextlib.suppress(MemoryError):
                    log.error("the listener's loop found no memory")
                with contextlib.suppress(MemoryError):
                    await asyncio.sleep(AFTER_SHORTAGE_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The service handles signals."""
        yield


def make_server(app: Door, rules: Rules, *, keep_alive_s: float, stop_s: int) -> HttpServer:
    """A server for a bound socket. `keep_alive_s`: an idle connection is closed then. `stop_s`: seconds that answers
    have to end when it stops."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are what strangers send
    config = uvicorn.Config(
        app,
        http=guarded(_within_descriptors(rules)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=keep_alive_s,  # type: ignore[arg-type]  # handed to call_later, which takes any number
        timeout_graceful_shutdown=stop_s,
        backlog=BACKLOG,
    )
    return HttpServer(config)


def _within_descriptors(rules: Rules) -> Rules:
    """As many connections as this process may open files, after it has asked for as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return rules
    # Connections with a place, guests, and those that hear their last answer; see places.py.
    left = max(3, soft - DESCRIPTORS_KEPT)
    most = min(rules.connections_max, left // 3)
    if most < rules.connections_max:
        log.warning("fewer connections than wanted", limit=most, wanted=rules.connections_max, open_files_max=soft)
    return replace(rules, connections_max=most, guests_max=min(rules.guests_max, (left - most) // 2))


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket, not yet listening. Raises ConfigError when the port is taken or the address is not ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host[:100]}: {getattr(error, 'strerror', None) or 'not a name'}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use", code="port_in_use") from None
        raise ConfigError(f"port {port} on {host} cannot be used: {error.strerror}") from None
    return listener
