"""The router process: wires the parts together, follows the layout, and stops cleanly.

SIGTERM: not ready and no new requests, then what runs may end within `drain_seconds`, then exit 0. A second one ends at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from elasticmoe.common.config import RouterConfig
from elasticmoe.common.http.connection import Rules
from elasticmoe.common.http.listener import HttpServer, make_server
from elasticmoe.common.layout import Layout, RankId
from elasticmoe.common.protocol.errors import ConfigError, ElasticMoEError
from elasticmoe.common.protocol.limits import RANKS_MAX
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.tracing.opening import open_spans
from elasticmoe.common.transport import Sockets
from elasticmoe.services.router.api.app import build_app
from elasticmoe.services.router.api.front import Front, make_front
from elasticmoe.services.router.api.gate import PUBLIC_PATHS
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher, router_identity
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.router.text.pool import TextWorkers
from elasticmoe.services.router.text.tokenizer import ServedModel

log = get_logger("router")

LAYOUT_RETRY_S = 0.5
FIRST_REPLICA_S = 2.0
FIRST_REPLICA_POLL_S = 0.02
SPARE_CONNECTIONS = 256  # beyond those of running requests: idle ones, health checks, bodies on their way


class LayoutSource(Protocol):
    """Where layouts come from: the store, or a stand-in for it."""

    def watch(self) -> AsyncIterator[Layout]:
        """The present layout and every later one. May raise or end; it is then called again."""

    async def close(self) -> None:
        """Let go of connections."""


class RouterService:
    """One router. `run` returns when it has stopped; `stop` may be called from the same loop."""

    def __init__(
        self, config: RouterConfig, model: ServedModel, source: LayoutSource, listener: socket.socket, key: bytes | None
    ) -> None:
        self._config = config
        self._source = source
        self._listener = listener
        config.socket(f"rank-{RankId(RANKS_MAX, 0)}")  # a path that is too long is a bad setting, not a late surprise
        identity = router_identity()
        path = config.run_path / "logs" / "history-router.jsonl" if config.history else None
        self._history = _open_history(path, identity, config.history_bytes_max)
        metrics = Metrics(model.name)
        self.dispatcher = Dispatcher(Sockets(config.socket), metrics, self._history, identity)
        self._workers = TextWorkers(model.directory, model.codec.digest)
        self._spans = open_spans(
            config.otlp_endpoint, "router", config.deployment, metrics.spans_lost.inc, ratio=config.trace_ratio
        )
        self.front: Front = make_front(config, model, self._workers, self.dispatcher, metrics, key, self._spans)
        self._server = _make_server(self.front)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain; the second time, stop at once."""
        if self._stopping.is_set():
            self.dispatcher.close()
        self._stopping.set()

    async def run(self) -> None:
        """Serve until a signal or `stop`. Raises whatever ends one of the loops that must not end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        warning = asyncio.create_task(self._warn_of_template(), name="template")
        essential = [
            asyncio.create_task(self.dispatcher.run(), name="dispatcher"),
            asyncio.create_task(self._follow_layout(), name="layout"),
            asyncio.create_task(self._workers.keep(), name="text workers"),
            asyncio.create_task(self._listen(), name="http"),
        ]
        stopping = asyncio.create_task(self._stopping.wait(), name="stop")
        gc.freeze()  # what was imported and loaded is never garbage; collections need not look at it
        try:
            await asyncio.wait([*essential, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in essential:
                if task.done():
                    task.result()
                    raise ElasticMoEError(f"the router's {task.get_name()} loop has ended")
            await self._drain()
        finally:
            warning.cancel()
            await self._shut_down(essential)

    async def _listen(self) -> None:
        """Serve HTTP. Where connections wait in the listener's queue already, because it has outlived an earlier
        router, they wait a little longer, rather than being told that no replica is known yet."""
        is_waited_for = self._listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        deadline = time.monotonic() + (FIRST_REPLICA_S if is_waited_for else 0.0)
        while (now := time.monotonic()) < deadline and not self.dispatcher.readiness(now)[0]:
            await asyncio.sleep(FIRST_REPLICA_POLL_S)
        await self._server.serve(sockets=[self._listener])

    async def _drain(self) -> None:
        self.front.is_draining = True
        running = self.front.permits.num_held
        log.info("draining", running=running, deadline_s=self._config.drain_seconds)
        deadline = time.monotonic() + self._config.drain_seconds
        while self.front.permits.num_held and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        log.info("drained", ended=running - self.front.permits.num_held, cut_off=self.front.permits.num_held)

    async def _shut_down(self, essential: list[asyncio.Task[None]]) -> None:
        """Give what is left an error, send it, and let go of everything."""
        self.dispatcher.close()
        self._server.stop()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(essential[-1]), 5.0)
        for task in essential:
            task.cancel()
        await asyncio.gather(*essential, return_exceptions=True)
        await self._source.close()
        self._history.close()
        if self._spans is not None:
            self._spans.close()

    async def _warn_of_template(self) -> None:
        """Say once why chats are refused, where they are. It also makes the workers ready before the first chat."""
        try:
            problem = await self.front.texts.inspect()
        except ElasticMoEError as error:
            log.warning("the model's chat template cannot be used", error=error.message)
        else:
            if problem.code == "bad_chat_template":
                log.warning(problem.text)

    async def _follow_layout(self) -> None:
        """Apply every layout. Without the store the last one stays in force."""
        while True:
            try:
                async for layout in self._source.watch():
                    self.dispatcher.apply_layout(layout, time.monotonic())
            except Exception:  # whatever it is, requests are served by the layout that is known
                log.exception("layout source failed")
            await asyncio.sleep(LAYOUT_RETRY_S)


def _make_server(front: Front) -> HttpServer:
    config, most = front.config, front.config.requests_max
    rules = Rules(2 * most + SPARE_CONNECTIONS, config.body_bytes_max, PUBLIC_PATHS, front.metrics.refused)
    return make_server(build_app(front), rules, keep_alive_s=config.keep_alive_seconds, stop_s=3)


def _open_history(path: Path | None, identity: str, bytes_max: int) -> History:
    try:
        return History(path, identity, bytes_max)
    except OSError as error:
        raise ConfigError(f"history file cannot be opened: {error.strerror}") from None
