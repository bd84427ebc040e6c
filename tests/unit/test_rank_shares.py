"""Where a rank's time goes, and the way of a follower's shares to who reads them: by its leader and the router."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elasticmoe.cli.bench import serve
from elasticmoe.cli.bench.recipes import sized
from elasticmoe.cli.bench.report import table
from elasticmoe.cli.bench.serve import ANY, TRACINGS, Workload
from elasticmoe.cli.bench.serve import Shares as BenchShares
from elasticmoe.cli.bench.steady import Figures
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import rank, router
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.rank import TellShares, Watch
from elasticmoe.common.protocol.router import RankStatus, StepShares
from elasticmoe.common.transport import Server
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.worker.engine.outcome import StepCost
from elasticmoe.services.worker.model.base import StepTimes
from elasticmoe.services.worker.rank.shares import TELL_S, Shares, SharesToLeader
from tests.unit.replicas import Replicas

LEADERS = RankStatus(RankId(0, 0), "i", 1, 1, 0, 0, 3, 4, 64, 0.1, 0.2)
STATUS = msgspec.structs.replace(LEADERS, followers=(StepShares(1, 0.3, 0.4),))


class Clock:
    """A Clock that a test moves."""

    def __init__(self) -> None:
        self.now_ns = 7

    def monotonic_ns(self) -> int:
        return self.now_ns


class End:
    """A PushEnd. `is_there`: whether it takes anything."""

    def __init__(self) -> None:
        self.is_there = True
        self.told: list[Message] = []

    def push(self, body: Message) -> bool:
        if self.is_there:
            self.told.append(body)
        return self.is_there

    def close(self) -> None:
        self.is_there = False


def step(shares: Shares, clock: Any, times: StepTimes, met_ns: int) -> None:
    """Two nanoseconds of messages before it and three of plans behind the meeting."""
    shares.begin()
    clock.now_ns += 2
    shares.arrive()
    clock.now_ns += met_ns
    shares.meet()
    clock.now_ns += 3 + times.total_ns
    shares.end(StepCost.of(times))


def test_what_is_neither_mathematics_nor_waiting_is_overhead() -> None:
    clock: Any = Clock()
    shares = Shares(clock)
    for _ in range(400):
        step(shares, clock, StepTimes(total_ns=75, exchange_ns=15, wait_ns=10), met_ns=20)
    assert shares.told(1) == StepShares(1, overhead=0.1, waiting=0.3), "the other 0.6 are mathematics"


def test_a_follower_tells_its_leader_now_and_then_while_it_steps() -> None:
    clock: Any = Clock()
    shares, end = Shares(clock), End()
    to_leader = SharesToLeader(shares, 1, end)
    to_leader.turn(10.0, 0)
    assert end.told == [], "it has not stepped"
    for at in (10.0, 10.0 + TELL_S / 2, 10.0 + TELL_S):
        step(shares, clock, StepTimes(75, 15, 10), met_ns=20)
        to_leader.turn(at, 0)
    assert end.told == [TellShares(end.told[0].shares), TellShares(shares.told(1))]  # type: ignore[attr-defined]
    end.is_there = False
    step(shares, clock, StepTimes(75, 15, 10), met_ns=20)
    to_leader.turn(20.0, 0)
    end.is_there = True
    to_leader.turn(20.0 + TELL_S, 0)
    assert end.told[2:] == [TellShares(shares.told(1))], "what was lost is told again"
    to_leader.turn(30.0, 0)
    assert len(end.told) == 3, "nothing has changed"
    to_leader.turn(40.0, 1)
    assert end.told[3:] == [TellShares(shares.told(1))], "another leader may lead, and has heard nothing"
    to_leader.turn(50.0, 1)
    assert len(end.told) == 4


def test_a_leader_tells_routers_of_its_followers_steps(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elasticmoe.services.worker.rank.shares.TELL_S", 0.01)
    heard: list[StepShares] = []
    with Replicas(directory, tmp_path, 1) as replicas:
        client = replicas._sockets.connect("rank-r0t0", "router:9", router.CODEC)
        client.send(Watch())

        def has_heard() -> bool:
            while (received := client.receive()) is not None:
                heard.extend(received.body.followers if isinstance(received.body, RankStatus) else ())
            if len(replicas.finish) == len(replicas.tokens):
                replicas.submit(0, f"r{len(replicas.tokens)}", [1, 2, 3], 90)
            return any(one.waiting and one.overhead for one in heard)

        replicas.wait(has_heard, "the follower's shares")
        client.close()
    assert {one.tp for one in heard} == {1}
    assert all(one.overhead + one.waiting < 1 for one in heard), "some of it is mathematics"


def test_the_router_shows_the_shares_of_every_rank() -> None:
    metrics = Metrics("m")
    link: Any = SimpleNamespace(status=STATUS, left_at=None, silent_s=lambda _: 0.0)
    metrics.watch({STATUS.rank: link}, lambda: None)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    samples = families["elasticmoe:step_share"].samples
    found = {tuple(sample.labels[name] for name in ("engine", "rank", "part")): sample.value for sample in samples}
    assert found == {
        ("0", "r0t0", "overhead"): 0.1,
        ("0", "r0t0", "waiting"): 0.2,
        ("0", "r0t1", "overhead"): 0.3,
        ("0", "r0t1", "waiting"): 0.4,
    }


def answer_watch(server: Server[Any]) -> None:
    """As a leader does."""
    while (received := server.receive()) is None:
        server.poll(100)
    server.send(received[0], STATUS)


def test_a_benchmark_tells_the_shares_of_followers_beside_those_of_leaders(tmp_path: Path) -> None:
    (tmp_path / "sockets").mkdir()
    with closing(Server(tmp_path / "sockets" / "rank-r0t0.sock", "rank-r0t0:1", rank.CODEC)) as server:
        leader = threading.Thread(target=answer_watch, args=(server,))
        leader.start()
        shares = serve._shares(tmp_path, 1)
        leader.join()
    assert shares == BenchShares(0.1, 0.2, 0.3, 0.4)
    one = Figures(1, 1, 0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    kind, rounds = Workload(1, (ANY,), TRACINGS[0]), [(one, shares)]
    rows = [serve._summary("m", sized(1, tp), rounds, kind, ANY, None)[0] for tp in (1, 2)]
    names = ("overhead %", "waiting %", "followers' overhead %", "followers' waiting %")
    assert "followers' waiting %" in table(rows)
    assert [[row[name] for name in names if name in row] for row in rows] == [
        pytest.approx([10, 20]),
        pytest.approx([10, 20, 30, 40]),
    ]
