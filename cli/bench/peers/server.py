"""A server that is measured: started, waited for, weighed and ended, whatever engine it is."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from elasticmoe.cli.bench.peers.engine import Launch
from elasticmoe.cli.bench.peers.environment import last_line
from elasticmoe.cli.bench.peers.shared_memory import Segments
from elasticmoe.cli.chat import first_model
from elasticmoe.cli.children import tied_to_us
from elasticmoe.cli.http import client as http_client
from elasticmoe.cli.load.client import run_clients
from elasticmoe.cli.load.endpoint import Shape
from elasticmoe.cli.load.sample import Sample
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.wording import counted

START_S_MAX, LOAD_S_MAX = 600.0, 1_800.0
_LOOK_S = 0.05
_SEGMENTS_S = 1.0  # between looks at what it has mapped, which take some milliseconds each
_ANSWER_S = 5.0
_TERMINATE_S = 30.0


class PeerServer:
    """Owns the process, all that it starts, and what these have in /dev/shm, from its making until `close`. The process
    itself dies with the thread that made it. `title`: how errors call it. `log`: where its output goes."""

    def __init__(self, title: str, launch: Launch, variables: Mapping[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.title = title
        self._ready_path = launch.ready_path
        self._log = log
        self._known: set[psutil.Process] = set()
        self._is_closed = False
        self._segments = Segments()
        self._look_at = self._started = time.monotonic()
        with open(log, "wb") as file:
            self._popen = subprocess.Popen(
                tied_to_us(launch.argv),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(variables) | dict(launch.environment),
                start_new_session=True,
            )
        self._root = psutil.Process(self._popen.pid)  # which is not reaped before `close`: its number stays ours

    def first_token(self, prompt_tokens: int) -> tuple[str, float]:
        """Wait for it. Returns its model's name, and the seconds from its start to the first token of a first request.
        Raises ValueError when it ends or takes over START_S_MAX seconds."""
        with http_client(self.url, timeout=_ANSWER_S) as client:
            while not self._is_ready(client):
                self._check("it was not ready")
                time.sleep(_LOOK_S)
            try:
                model = first_model(client)
            except ElasticMoEError as error:
                raise ValueError(f"{self.title}: {error.message}") from None
        shape = Shape(model, prompt_tokens, 1)
        while True:
            left_s = self._started + START_S_MAX - time.monotonic()
            (sample,) = self.load(shape, 1, 1, random.randrange(1 << 30), seconds_max=left_s)
            if sample.arrivals and not sample.error:
                return model, sample.arrivals[0] - self._started
            self._check(f"its first request failed ({sample.error})")
            time.sleep(_LOOK_S)

    def load(
        self, shape: Shape, clients: int, num_requests: int, seed: int, *, seconds_max: float = LOAD_S_MAX
    ) -> list[Sample]:
        """See run_clients. Raises ValueError when it takes no connection, or over `seconds_max`."""

        async def work() -> list[Sample]:
            try:
                async with asyncio.timeout(seconds_max) as limit:
                    return await run_clients(self.url, shape, clients, num_requests, seed)
            except TimeoutError:
                if limit.expired():
                    raise self._error(f"{counted(num_requests, 'request')} took over {seconds_max:g} s") from None
                raise

        try:
            return asyncio.run(work())
        except OSError as error:
            raise self._error(f"it takes no connection ({error.strerror or 'no answer in time'})") from None

    def processes(self) -> set[psutil.Process]:
        """The server's processes that live now."""
        try:
            found = {self._root, *self._root.children(recursive=True)}
        except psutil.Error:
            found = set()
        self._known |= found
        return found

    def memory_bytes(self) -> int:
        """Its memory, what processes share counted once (PSS)."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it has ended
        return total

    def close(self) -> None:
        """End it and all that it started, and remove what they leave. Idempotent."""
        if self._is_closed:
            return
        try:
            self._segments.look(self.processes() | self._session())
            if not self._has_ended():
                self._root.send_signal(signal.SIGTERM)  # SIGINT may be ignored: background jobs of a shell inherit that
                self._wait_ended(_TERMINATE_S)
        finally:
            self._is_closed = True
            self._kill()
            self._segments.remove()

    def _kill(self) -> None:
        left = self._known | self.processes() | self._session()
        for process in left:  # psutil tells a process from a later one with its number
            try:
                process.kill()
            except psutil.Error:
                pass  # it has ended
        self._popen.wait()
        psutil.wait_procs(left - {self._root}, timeout=_TERMINATE_S)

    def _session(self) -> set[psutil.Process]:
        """Who is left of its session, though its parents may have ended."""
        found = set()
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self._root.pid:
                    found.add(process)
            except OSError:
                continue  # it has ended
        return found

    def _has_ended(self) -> bool:
        return self._root.status() == psutil.STATUS_ZOMBIE

    def _wait_ended(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._has_ended() and time.monotonic() < deadline:
            self.processes()
            time.sleep(_LOOK_S)

    def _is_ready(self, client: httpx.Client) -> bool:
        try:
            return client.get(self._ready_path).status_code == 200
        except httpx.HTTPError:
            return False

    def _check(self, problem: str) -> None:
        processes = self.processes()
        if self._has_ended():
            raise self._error("it ended")
        if time.monotonic() > self._look_at:  # it may end by itself
            self._look_at = time.monotonic() + _SEGMENTS_S
            self._segments.look(processes)
        if time.monotonic() - self._started > START_S_MAX:
            raise self._error(f"{problem} within {START_S_MAX:g} s")

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self.title}: {problem}: {last_line(self._log)} (see {self._log})")


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
