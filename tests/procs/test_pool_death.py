"""A real pool under a real launcher, without an HMM: its ranks are held where they would attach. They outlive the pool,
the next one has them, and nothing outlives the launcher (promises P5, P17, P18). Under load: test_restarts.py."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import scaler
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.pool import GetPool, StartRank, StopRank
from elasticmoe.common.protocol.scaler import PoolRank, PoolStatus, RankExited, RankStarted, ToScaler
from elasticmoe.common.record import start_ticks
from elasticmoe.common.transport import Client, new_identity
from elasticmoe.services.worker.pool.seats import RECORD_BYTES
from tests.procs.failpoints import Failpoints
from tests.procs.launcher_run import Run
from tests.procs.waiting import processes_of, wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

CALL_MS = 20_000
STANDBYS = 3
GONE_S = 60.0


class Site:
    """A launcher with a real pool. `wanted`: seats of the ranks that were started, by slot."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.points = Failpoints(folder / "points")
        stand_ins = {"pool": "real", "scaler": "scaler", "router": "router"}
        settings = {"standbys": STANDBYS, "failpoint_dir": self.points.folder}
        self.run = Run(folder, self.run_dir, stand_ins, "--keep-logs", **settings)
        self.run.read("is served at", 60.0)
        self.wanted: dict[int, StartRank] = {}
        self.connect()

    def connect(self) -> None:
        """Be the pool's scaler."""
        self.client: Client[ToScaler] = Client(self.run_dir / "sockets/pool.sock", new_identity("scaler"), scaler.CODEC)
        self.client.epoch = 1
        self.wait_standbys()

    def status(self) -> PoolStatus:
        answer, _ = self.client.call(GetPool(), deadline_ms=CALL_MS)
        assert isinstance(answer, PoolStatus)
        return answer

    def wait_standbys(self) -> None:
        wait_until(lambda: self.status().standby == STANDBYS, "standbys", 60.0)

    def ranks(self) -> dict[int, PoolRank]:
        """By slot; whether they are asleep varies."""
        return {rank.slot: msgspec.structs.replace(rank, is_asleep=False) for rank in self.status().ranks}

    def start(self, slot: int, action: str = "wait") -> int:
        """Start a rank; it does `action` where it would attach. Its process id."""
        point, name = f"rank.attach@r{slot}t0", new_identity(f"rank-r{slot}t0")
        self.points.arm(point, action)
        self.wanted[slot] = StartRank(RankId(slot, 0), slot, f"host:{slot}", name, 1, 16, 4, 64)
        self.client.call(self.wanted[slot], deadline_ms=CALL_MS)
        return self.points.wait_hit(point)

    def refusal(self, message: StartRank | StopRank) -> str:
        with pytest.raises(ElasticMoEError) as caught:
            self.client.call(message, deadline_ms=CALL_MS)
        return caught.value.code

    def exit_of(self, slot: int) -> RankExited:
        while True:
            received = self.client.receive(CALL_MS)
            assert received is not None, "the rank's exit was not reported"
            if isinstance(received.body, RankExited):
                assert received.body.incarnation == self.wanted[slot].incarnation
                return received.body

    def end_pool(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End the pool; the process id of the next one, which answers."""
        old = self.run.pid("pool")
        os.kill(old, number)
        return self.wait_pool(old)

    def wait_pool(self, old: int) -> int:
        wait_until(lambda: self.pool_pid() not in (0, old), "the next pool", 30.0)
        self.status()
        return self.pool_pid()

    def pool_pid(self) -> int:
        return next((process.pid for process in self.run.record().processes if process.name == "pool"), 0)

    def processes(self) -> int:
        return len(processes_of(self.run_dir))

    def log(self) -> str:
        return (self.run_dir / "logs/pool.log").read_text()

    def wait_gone(self) -> None:
        wait_until(lambda: not processes_of(self.run_dir), "no process left", GONE_S)

    def close(self) -> None:
        self.points.forget()
        self.client.close()
        self.run.close()


@contextmanager
def launched() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="em-"))  # short: socket paths have a limit
    site = Site(folder)
    try:
        yield site
    finally:
        site.close()
        shutil.rmtree(folder)


@pytest.fixture
def site() -> Iterator[Site]:
    with launched() as site:
        yield site


@pytest.fixture(scope="module")
def launched_once() -> Iterator[Site]:
    with launched() as site:
        site.client.close()
        yield site
        assert site.run.stop() == 0
        site.wait_gone()
        stopping = site.run.lines[site.run.lines.index("stopping router…\n") :]
        assert not [line for line in stopping if "killed" in line or "ended with" in line]


@pytest.fixture
def shared(launched_once: Site) -> Iterator[Site]:
    """For tests after which the pool has no ranks. Two of them end it, which is less than too often."""
    launched_once.connect()
    yield launched_once
    launched_once.client.close()


def test_the_next_pool_has_the_ranks_of_the_last_one_however_often_it_ends(site: Site) -> None:
    pids = {slot: site.start(slot) for slot in (0, 5)}
    site.wait_standbys()
    before, num_processes = site.ranks(), site.processes()
    assert {slot: rank.pid for slot, rank in before.items()} == pids
    site.end_pool()
    assert site.ranks() == before
    # They are its ranks in all: in a seat that is taken, in what is asked for again, and in their end.
    other = StartRank(RankId(5, 0), 5, "host:5", new_identity("rank-r5t0"), 1, 16, 4, 64)
    assert site.refusal(other) == "seat_taken"
    assert site.client.call(site.wanted[5], deadline_ms=CALL_MS)[0] == RankStarted(
        RankId(5, 0), site.wanted[5].incarnation
    )
    site.end_pool(signal.SIGTERM)
    assert site.ranks() == before
    # The next one dies while it takes them over, and the one after it when it has them.
    site.points.arm("pool.adopt", "die")
    site.points.arm("pool.adopted", "die")
    old = site.run.pid("pool")
    os.kill(old, signal.SIGKILL)
    dead = {old, site.points.wait_hit("pool.adopt"), site.points.wait_hit("pool.adopted")}
    wait_until(lambda: site.pool_pid() not in (0, *dead), "the next pool", 30.0)
    assert site.ranks() == before
    site.wait_standbys()
    wait_until(lambda: site.processes() == num_processes, f"{num_processes} processes, as before")
    os.kill(pids[0], signal.SIGKILL)
    assert (site.exit_of(0).exit_code, set(site.ranks())) == (-9, {5})
    wait_until(lambda: not Path(f"/proc/{pids[0]}").exists(), "its parent, the launcher, has reaped it")
    site.client.call(StopRank(RankId(5, 0), site.wanted[5].incarnation, 5_000), deadline_ms=CALL_MS)
    exited = site.exit_of(5)
    assert (exited.exit_code, exited.reason) == (0, "exited with status 0")
    # A pool that ends again and again is tried again after longer pauses. Its ranks go on until the end of all.
    last = site.start(5)
    assert last != pids[5]

    def is_given_a_pause() -> bool:
        if pid := site.pool_pid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return any(entry.name == "pool" and entry.is_failing for entry in site.run.record().down)

    wait_until(is_given_a_pause, "it does not stay up", 60.0)
    assert Path(f"/proc/{last}").exists()
    site.run.stop()
    site.wait_gone()


def test_a_rank_tells_the_next_pool_what_it_would_have_told_the_last_one(shared: Site) -> None:
    shared.start(0)
    shared.end_pool()
    assert set(shared.ranks()) == {0}
    shared.points.release("rank.attach@r0t0")
    exited = shared.exit_of(0)
    assert exited.exit_code == 1
    assert exited.reason.startswith("unavailable: handles is not there")


def test_a_rank_whose_record_cannot_be_read_is_killed(shared: Site) -> None:
    pid = shared.start(3)
    with open(shared.run_dir / "state/seats-pool", "r+b") as file:
        file.seek(3 * RECORD_BYTES + 16)
        file.write(b"?")
    shared.end_pool()
    assert shared.ranks() == {}
    assert f"a rank is killed: its seat's record cannot be read slot=3 pid={pid}" in shared.log()
    shared.wait_standbys()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the killed rank is gone")
    new = shared.start(3)
    assert new != pid
    os.kill(new, signal.SIGKILL)
    shared.exit_of(3)


def test_a_dead_template_takes_nobody_along(shared: Site) -> None:
    pid = shared.start(0)
    shared.wait_standbys()
    commands = {
        child: command
        for child, command in processes_of(shared.run_dir).items()
        if "elasticmoe.services.worker.pool.template" in command
    }
    first, *_, last = sorted(set(commands) - {pid}, key=lambda child: start_ticks(child) or 0)
    num_processes = shared.processes()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "the template died" in shared.log(), "it is noticed")
    assert (shared.status().standby, shared.ranks()[0].pid) == (STANDBYS, pid)
    before = shared.log().count("standby died")
    os.kill(last, signal.SIGKILL)
    wait_until(lambda: shared.log().count("standby died") > before, "a standby is missing")
    shared.wait_standbys()
    wait_until(lambda: shared.processes() == num_processes, f"{num_processes} processes, as before")
    assert shared.ranks()[0].pid == pid
    os.kill(pid, signal.SIGKILL)
    shared.exit_of(0)


def test_the_launcher_ends_the_ranks_of_a_dead_pool(site: Site) -> None:
    site.start(0)
    stopped = site.start(1)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(site.run.pid("pool"), signal.SIGKILL)
    site.run.process.send_signal(signal.SIGTERM)
    site.run.read("ending what pool has left behind")
    site.run.process.send_signal(signal.SIGINT)  # who has no patience does not wait for the one that is stopped
    assert site.run.end() == 0
    site.wait_gone()


@pytest.mark.parametrize("order", ["launcher", "pool, launcher", "next pool, launcher"])
def test_no_rank_outlives_a_killed_launcher(site: Site, order: str) -> None:
    """Be it in an ordinary wait, stopped, or in a call that never gives the interpreter back. (None is stopped beside
    one in such a call: when a process group is left with a stopped process, the kernel hangs up on all of it.)"""
    site.start(0)
    if order == "pool, launcher":
        os.kill(site.start(1), signal.SIGSTOP)
    else:
        site.start(1, "hold_gil 60")
    pids: dict[str, Callable[[], int]] = {
        "launcher": lambda: site.run.process.pid,
        "pool": lambda: site.run.pid("pool"),
    }
    for victim in order.split(", "):
        if victim == "next pool":
            site.end_pool()
            assert set(site.ranks()) == {0, 1}
        else:
            os.kill(pids[victim](), signal.SIGKILL)
    site.run.process.wait(60)
    site.wait_gone()
