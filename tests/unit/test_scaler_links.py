"""The scaler's connections, where what answers on them says nonsense: it counts as no answer, and the next one is heard
(promises P14 and P21)."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zmq

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.devices.names import LOCAL_HOST
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import hmm, pool
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.replies import Ack
from elasticmoe.common.protocol.scaler import HmmStatus, PoolRank, PoolStatus, RankExited, ToScaler
from elasticmoe.common.transport import Server, new_identity
from elasticmoe.services.scaler.assembly import system_parts
from elasticmoe.services.scaler.cluster import HostStatus
from elasticmoe.services.scaler.control.links import Links
from tests.procs.fuzz import Thrower, thrower
from tests.procs.waiting import wait_until
from tests.unit.specs import tiny_mixtral_spec

SEED = 7
NO_STORE: Any = None
ROUNDS, PER_ROUND = 40, 50


class Hostile:
    """Answers each question with `answer`, after much nonsense while `is_hostile`."""

    def __init__(self, path: Path, codec: Codec[Any], answer: Message) -> None:
        self.is_hostile = True
        self.thrown: Thrower = thrower(random.Random(SEED), "scaler")
        self.answer = answer
        self._server: Server[Any] = Server(path, new_identity("hostile"), codec)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._server.poll(10)
            while (received := self._server.receive()) is not None:
                peer, message = received
                for _ in range(PER_ROUND if self.is_hostile else 0):
                    with contextlib.suppress(zmq.ZMQError):  # the other side has closed, or takes no more now
                        self._server._socket.send_multipart([peer, self.thrown.draw()])
                self._server.send(peer, self.answer, seq=message.seq)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._server.close()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    (made / "sockets").mkdir()
    yield made
    shutil.rmtree(made)


def test_nonsense_on_a_connection_is_no_answer_and_the_next_one_is_heard(run_dir: Path) -> None:
    config = ScalerConfig(run_dir=str(run_dir), model="/nowhere")
    parts = system_parts(config, NO_STORE)
    events: list[ToScaler] = []
    status = HmmStatus("empty", 0, 0, None, (), 0, (), False)
    servers = (
        Hostile(config.socket("hmm"), hmm.CODEC, status),
        Hostile(config.socket(config.pool_name), pool.CODEC, PoolStatus(2, ())),
    )
    links = Links(config, tiny_mixtral_spec(), parts, events.append)

    def ask() -> HostStatus:
        return links.ask(is_starting=False, is_quiet=False)[LOCAL_HOST]

    try:

        def is_pelted() -> bool:
            told = ask()
            assert (told.hmm in (None, status), told.pool in (None, PoolStatus(2, ()))) == (True, True)
            links.wait(0.001)
            return all(server.thrown.num_invalid > ROUNDS * PER_ROUND // 2 for server in servers)

        wait_until(is_pelted, "enough was thrown", 60.0)
        for server in servers:
            server.is_hostile = False

        def hears() -> bool:
            links.wait(0.001)  # drains what was still to come
            return ask() == HostStatus(status, PoolStatus(2, ()))

        wait_until(hears, "both are heard")
    finally:
        links.close()
        for server in servers:
            server.close()


def test_what_the_pool_said_is_asked_for_again_when_it_tells_something_or_is_commanded(run_dir: Path) -> None:
    config = ScalerConfig(run_dir=str(run_dir), model="/nowhere")
    parts = system_parts(config, NO_STORE)
    events: list[ToScaler] = []
    told = RankExited(RankId(0, 0), 0, "rank:a", 1, "ended")
    with closing(Server(config.socket(config.pool_name), new_identity("pool"), pool.CODEC)) as server:
        links = Links(config, tiny_mixtral_spec(), parts, events.append)
        host = links.hosts[LOCAL_HOST]
        num_asked = 0
        stop = threading.Event()

        def answer() -> None:
            nonlocal num_asked
            while not stop.is_set():
                server.poll(5)
                while (received := server.receive()) is not None:
                    peer, message = received
                    num_asked += 1
                    is_command = isinstance(message.body, pool.StopRank)
                    server.send(peer, Ack() if is_command else PoolStatus(num_asked, ()), seq=message.seq)
                    if is_command:
                        server.send(peer, told)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert host.ask_pool(is_starting=False) == PoolStatus(1, ())
            assert host.ask_pool(is_starting=False, age_s_max=60.0) == PoolStatus(1, ())
            assert host.ask_pool(is_starting=False) == PoolStatus(2, ())
            links.tell_pool(pool.StopRank(RankId(0, 0), "rank:a", 0))
            wait_until(lambda: links.wait(10.0, is_quiet=True) or events, "it is told, and waits no longer")
            assert events == [told]
            assert host.ask_pool(is_starting=False, age_s_max=60.0) == PoolStatus(4, ())
            parts.poller.wake()
            links.wait(3_600.0, is_quiet=True)  # returns
        finally:
            links.close()
            stop.set()
            thread.join()


def test_what_the_pool_said_of_a_rank_that_ran_is_never_used_again(run_dir: Path) -> None:
    """It may have been stopped right after: the watchdog would take it for one that runs, and wait four times as
    long for it."""
    config = ScalerConfig(run_dir=str(run_dir), model="/nowhere")
    runs, sleeps, stands = (
        PoolStatus(1, (PoolRank(RankId(0, 0), 0, "host:0", "rank:a", pid, True, 1.0, is_asleep),))
        for pid, is_asleep in ((1, False), (2, True), (3, True))
    )
    server = Hostile(config.socket(config.pool_name), pool.CODEC, runs)
    server.is_hostile = False
    links = Links(config, tiny_mixtral_spec(), system_parts(config, NO_STORE), [].append)
    try:
        host = links.hosts[LOCAL_HOST]
        assert host.ask_pool(is_starting=False) == runs
        server.answer = sleeps
        assert host.ask_pool(is_starting=False, age_s_max=60.0) == sleeps
        server.answer = stands
        assert host.ask_pool(is_starting=False, age_s_max=60.0) == sleeps
        assert host.ask_pool(is_starting=False) == stands
    finally:
        links.close()
        server.close()
