"""A worker pool as a real process: standbys, fencing, and its children's lives."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import msgspec
import pytest

from elasticmoe.common.config import environment_of
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import scaler
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.pool import GetPool, StartRank, StopRank
from elasticmoe.common.protocol.scaler import PoolStatus, RankExited, RankStarted, ToScaler
from elasticmoe.common.transport import Client, new_identity
from elasticmoe.services.worker.pool.seats import RECORD_BYTES, path_of
from tests.procs.descriptors import SHAPES, leave, left_with, numbers_of, with_numbers
from tests.procs.failpoints import Failpoints
from tests.procs.waiting import processes_of, wait_until

pytestmark = pytest.mark.procs

ROOT = Path(__file__).parent.parent.parent
CALL_MS = 20_000


# Nothing but the signal ends its wait within the hour.
SLEEPER = """
from elasticmoe.common.process import leave
from elasticmoe.services.worker import __main__ as worker
from elasticmoe.services.worker.pool import pool
pool.POLL_MS = 3_600_000
leave(worker.main())
"""


class Pool:
    """A pool in a run directory of its own, without a launcher and an HMM: its ranks cannot attach."""

    def __init__(self, standbys: int = 2, inherited: tuple[int, ...] = ()) -> None:
        """`inherited`: numbers of descriptors that it is started with."""
        self.inherited = inherited
        self.run_dir = Path(tempfile.mkdtemp(prefix="em-"))
        self.points = Failpoints(self.run_dir / "points")
        self.standbys = standbys
        self.client: Client[ToScaler] = Client(self.run_dir / "sockets/pool.sock", new_identity("scaler"), scaler.CODEC)
        self.start()

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ELASTICMOE_")}
        with open(self.run_dir / "log", "ab") as log:
            self.process = subprocess.Popen(
                with_numbers(self.inherited, [sys.executable, "-m", "elasticmoe.services.worker"]),
                cwd=ROOT,
                env=environment
                | environment_of(
                    {"run_dir": self.run_dir, "standbys": self.standbys, "failpoint_dir": self.points.folder}
                ),
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        self.wait_standbys()

    def wait_standbys(self) -> None:
        wait_until(lambda: self.is_there() and self.status().standby == self.standbys, "standbys", 60.0)

    def template_and_standbys(self) -> tuple[int | None, list[int]]:
        """Process ids: of who was started, and of whom it forked. Those that were forked are younger."""
        commands = processes_of(self.run_dir)
        pids = sorted(pid for pid, command in commands.items() if "elasticmoe.services.worker.pool.template" in command)
        listening = [pid for pid in pids if self._listens(pid)]
        return (listening[0] if listening else None), [pid for pid in pids if pid not in listening]

    def _listens(self, pid: int) -> bool:
        """Whether the process has the lock of the template's socket."""
        try:
            links = {os.readlink(f"/proc/{pid}/fd/{number}") for number in numbers_of(pid)}
        except OSError:
            return False
        return str(self.run_dir / "sockets/pool-template.sock.lock") in links

    def log(self) -> str:
        return (self.run_dir / "log").read_text()

    def num_failures(self) -> int:
        return self.log().count("no standby could be started")

    def wait_failures(self, count: int) -> None:
        """So many more than there are now."""
        wanted = self.num_failures() + count
        wait_until(lambda: self.num_failures() >= wanted, f"it has failed {count} times", 30.0)

    def is_there(self) -> bool:
        return (self.run_dir / "sockets/pool.sock").exists()

    def status(self) -> PoolStatus:
        try:
            answer, _ = self.client.call(GetPool(), deadline_ms=CALL_MS)
        except ElasticMoEError:
            assert self.process.poll() is None, (self.run_dir / "log").read_text()
            return PoolStatus(0, ())
        assert isinstance(answer, PoolStatus)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not processes_of(self.run_dir), "all children ended")
        self.client.close()
        shutil.rmtree(self.run_dir)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


def seat(slot: int = 0) -> StartRank:
    name = new_identity(f"rank-r{slot}t0")
    return StartRank(RankId(slot, 0), slot, f"host:{slot}", name, 1, 16, 4, 64)


def start_held(pool: Pool, slot: int = 0) -> tuple[StartRank, int]:
    """Start a rank, which stays where it would attach; and its process id."""
    pool.client.epoch = 1
    wanted = seat(slot)
    pool.points.arm(f"rank.attach@r{slot}t0")
    pool.client.call(wanted, deadline_ms=CALL_MS)
    return wanted, pool.points.wait_hit(f"rank.attach@r{slot}t0")


def exit_of(pool: Pool, incarnation: str) -> RankExited:
    while True:
        received = pool.client.receive(CALL_MS)
        assert received is not None, "the rank's exit was not reported"
        if isinstance(received.body, RankExited) and received.body.incarnation == incarnation:
            return received.body


def test_a_superseded_scaler_is_refused_also_after_a_restart(pool: Pool) -> None:
    pool.client.epoch = 5
    wanted = seat()
    started, _ = pool.client.call(wanted, deadline_ms=CALL_MS)
    assert isinstance(started, RankStarted)
    for _ in range(2):
        pool.client.epoch = 4
        for message in (seat(1), StopRank(wanted.rank, wanted.incarnation)):
            with pytest.raises(ElasticMoEError, match="acts under epoch 4; epoch 5 has been seen") as caught:
                pool.client.call(message, deadline_ms=CALL_MS)
            assert caught.value.code == "stale_epoch"
        assert pool.status() is not None  # whoever asks is answered
        pool.process.send_signal(signal.SIGTERM)
        assert pool.process.wait(30) == 0
        pool.start()
    pool.client.epoch = 6
    assert pool.status() is not None
    pool.client.epoch = 5
    with pytest.raises(ElasticMoEError, match="acts under epoch 5; epoch 6 has been seen"):
        pool.client.call(StopRank(wanted.rank, wanted.incarnation), deadline_ms=CALL_MS)


def test_a_seat_refuses_a_superseded_scaler_by_itself(pool: Pool) -> None:
    (pool.run_dir / "state/fence-rank-0").write_text("9")  # what a rank of a later scaler left
    pool.client.epoch = 8
    wanted = seat()
    pool.client.call(wanted, deadline_ms=CALL_MS)
    exited = exit_of(pool, wanted.incarnation)
    assert exited.exit_code == 1
    assert exited.reason.startswith("stale_epoch:")
    assert "epoch 8; epoch 9 has been seen" in exited.reason


def test_a_rank_that_cannot_attach_says_why_and_is_followed_by_a_standby(pool: Pool) -> None:
    pool.client.epoch = 1
    wanted = seat()
    pool.client.call(wanted, deadline_ms=CALL_MS)
    exited = exit_of(pool, wanted.incarnation)
    assert (exited.exit_code, exited.slot) == (1, 0)
    assert exited.reason.startswith("unavailable: handles is not there")
    wait_until(lambda: pool.status().standby == 2, "another standby", 60.0)


def test_an_unknown_rank_and_one_beyond_tp_are_refused(pool: Pool) -> None:
    pool.client.epoch = 1
    with pytest.raises(ElasticMoEError, match="no rank") as caught:
        pool.client.call(StopRank(RankId(0, 0), "rank:unknown"), deadline_ms=CALL_MS)
    assert caught.value.code == "unknown_rank"
    second = msgspec.structs.replace(seat(), rank=RankId(0, 8))  # of a replica with tp 9
    with pytest.raises(ElasticMoEError, match="exceeds the limit of tp 8") as caught:
        pool.client.call(second, deadline_ms=CALL_MS)
    assert caught.value.code == "tp_unsupported"


@pytest.mark.parametrize("inherited", SHAPES.values(), ids=SHAPES)
def test_a_pool_that_can_start_no_process_lives_on_and_tries_again(inherited: tuple[int, ...]) -> None:
    """Also where the start of one gets some of what it needs: neither the template nor the other standby notices."""
    pool = Pool(inherited=inherited)
    try:
        template, (lost, other) = pool.template_and_standbys()
        with left_with(pool.process.pid, 0):
            leave_nothing(pool)
            os.kill(lost, signal.SIGKILL)
            pool.wait_failures(1)
            leave(pool.process.pid, 1)  # it has let go of the one that it lost
            pool.wait_failures(1)
            assert pool.template_and_standbys() == (template, [other])
            wait_until(lambda: pool.status().standby == 1, "it answers, and has the other one", 60.0)
        wait_until(lambda: pool.status().standby == 2, "another standby", 60.0)
        now = pool.template_and_standbys()
        assert (now[0], other in now[1], pool.process.poll()) == (template, True, None)
    finally:
        pool.close()


def leave_nothing(pool: Pool) -> None:
    """Not even the descriptors of a process that it loses: the limit is below them, and above what poll(2) looks at."""
    limit = 9
    assert numbers_of(pool.process.pid) >= set(range(limit)), "there are free ones"
    resource.prlimit(pool.process.pid, resource.RLIMIT_NOFILE, (limit, limit_of(pool)[1]))


def limit_of(pool: Pool) -> tuple[int, int]:
    return resource.prlimit(pool.process.pid, resource.RLIMIT_NOFILE)


def test_a_template_without_descriptors_lives_on(pool: Pool) -> None:
    """What an order comes with finds no room there: that order fails, and nothing else."""
    template, (lost, other) = pool.template_and_standbys()
    assert template is not None
    with left_with(template, 0):
        os.kill(lost, signal.SIGKILL)
        pool.wait_failures(2)
        assert pool.template_and_standbys() == (template, [other])
        assert "the template died" not in pool.log()
    wait_until(lambda: pool.status().standby == 2, "another standby", 60.0)
    assert pool.template_and_standbys()[0] == template


@pytest.mark.parametrize("free", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_dead_template_is_replaced_however_far_its_start_comes(pool: Pool, free: int) -> None:
    """With too few descriptors to start one, for the first attempts; those that are there stay."""
    template, standbys = pool.template_and_standbys()
    assert template is not None
    with left_with(pool.process.pid, 0):
        leave_nothing(pool)
        os.kill(template, signal.SIGKILL)
        wait_until(lambda: "the template died" in pool.log(), "its death is noticed")
        leave(pool.process.pid, free)
        os.kill(standbys[0], signal.SIGKILL)
        # Four are enough to start one here, which has as few itself; it may live, or end while it imports.
        wait_until(lambda: pool.num_failures() or pool.template_and_standbys()[0], "an attempt", 30.0)
        assert pool.process.poll() is None
        assert standbys[1] in pool.template_and_standbys()[1]
        if (again := pool.template_and_standbys()[0]) is not None:
            with suppress(ProcessLookupError):
                os.kill(again, signal.SIGKILL)  # of the few descriptors; the next one has as many as there are
    wait_until(lambda: pool.status().standby == 2, "another standby", 60.0)
    now = pool.template_and_standbys()
    assert now[0] not in (None, template)
    assert standbys[1] in now[1]


def test_a_dead_standby_is_replaced(pool: Pool) -> None:
    children = [
        pid
        for pid, command in processes_of(pool.run_dir).items()
        if "elasticmoe.services.worker.pool.template" in command
    ]
    assert len(children) == 3  # the template and two standbys
    os.kill(max(children), signal.SIGKILL)
    wait_until(lambda: pool.status().standby == 2 and not Path(f"/proc/{max(children)}").exists(), "replaced", 30.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_without_a_launcher_ranks_end_with_their_pool(pool: Pool, number: signal.Signals) -> None:
    """Nobody else would end them: a container's processes end with its first one anyway."""
    start_held(pool)
    _, stopped = start_held(pool, 1)
    if number == signal.SIGKILL:
        os.kill(stopped, signal.SIGSTOP)
    pool.process.send_signal(number)
    assert pool.process.wait(30) == (0 if number == signal.SIGTERM else -number)
    wait_until(lambda: not processes_of(pool.run_dir), "no process left")


def test_how_a_rank_ended_is_told(pool: Pool) -> None:
    wanted, pid = start_held(pool)
    os.kill(pid, signal.SIGSEGV)
    exited = exit_of(pool, wanted.incarnation)
    assert (exited.exit_code, exited.reason) == (-signal.SIGSEGV, f"killed by signal {int(signal.SIGSEGV)}")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the pool, its parent, has reaped it")


def test_a_seat_that_another_process_holds_is_not_taken(pool: Pool) -> None:
    """Whatever the pool believes."""
    pool.client.epoch = 1
    wanted = seat(7)
    path, start = path_of(pool.run_dir / "state", "pool"), wanted.slot * RECORD_BYTES
    lock = f"import fcntl, sys; f = open({str(path)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, {RECORD_BYTES}, {start})"
    holder = subprocess.Popen([sys.executable, "-c", f"{lock}; print(); sys.stdin.read()"], stdin=PIPE, stdout=PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        pool.client.call(wanted, deadline_ms=CALL_MS)
        exited = exit_of(pool, wanted.incarnation)
        assert (exited.exit_code, exited.reason) == (1, "exited with status 1")
        assert "slot 7 is held by another living process code=seat_taken" in (pool.run_dir / "log").read_text()
    finally:
        holder.communicate()


def test_without_standbys_a_rank_is_started_from_nothing() -> None:
    pool = Pool(standbys=0)
    try:
        wanted, pid = start_held(pool)
        [rank] = pool.status().ranks
        assert (rank.pid, rank.incarnation, pool.status().is_cold) == (pid, wanted.incarnation, True)
        pool.client.call(StopRank(wanted.rank, wanted.incarnation), deadline_ms=CALL_MS)
        assert exit_of(pool, wanted.incarnation).exit_code == 0
        # One that is asked to end before it is there.
        early = seat(1)
        pool.client.call(early, deadline_ms=CALL_MS)
        pool.client.call(StopRank(early.rank, early.incarnation), deadline_ms=CALL_MS)
        assert exit_of(pool, early.incarnation).exit_code in (-signal.SIGKILL, -signal.SIGTERM, 0)
        assert pool.status().ranks == ()
    finally:
        pool.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait(tmp_path: Path, number: signal.Signals) -> None:
    """It was seen when the wait was over, up to a second later."""
    settings = environment_of({"run_dir": tmp_path / "run", "standbys": 0})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ELASTICMOE_")} | settings
    heeding = ["env", "--default-signal=INT", sys.executable, "-c", SLEEPER]  # it may be ignored here
    with subprocess.Popen(heeding, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL) as process:
        client: Client[ToScaler] = Client(tmp_path / "run/sockets/pool.sock", new_identity("scaler"), scaler.CODEC)
        try:
            wait_until((tmp_path / "run/sockets/pool.sock").exists, "it serves", 60.0)
            client.call(GetPool(), deadline_ms=CALL_MS)
            process.send_signal(number)
            assert process.wait(60) == 0
        finally:
            client.close()
            process.kill()
