"""The keeper as a real process, with no HMM or one without a loop: what it holds, refuses and hands back."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import KeeperConfig
from elasticmoe.common.protocol.keeper import Fetch, Forget, Keep, Kept
from elasticmoe.common.protocol.limits import FDS_MAX
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm import keeper as keeper_module
from elasticmoe.services.hmm.keeper import FDS_SPARE
from elasticmoe.services.hmm.sessions.parking import Parking
from tests.procs.hmm_harness import Deployment, keeper_channel, peak_bytes
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs


@pytest.fixture
def keeper() -> Iterator[Deployment]:
    deployment = Deployment()
    deployment.start_keeper()
    yield deployment
    deployment.close()


def test_the_keeper_hands_back_more_than_one_message_can_carry(keeper: Deployment) -> None:
    channel = keeper_channel(keeper)
    names = sorted(f"n{i}" for i in range(FDS_MAX + 10))
    for name in names:
        fd = os.memfd_create(name)
        os.write(fd, name.encode())
        channel.send(Keep((name,)), (fd,))
        os.close(fd)
        assert isinstance(channel.receive()[0].body, Ack)
    channel.close()
    channel, after = keeper_channel(keeper), ""
    found: dict[str, str] = {}
    for size in (FDS_MAX, 10, 0):
        channel.send(Fetch(after))
        received, fds = channel.receive()
        assert isinstance(received.body, Kept)
        assert len(received.body.names) == len(fds) == size
        found |= {name: os.pread(fd, 9, 0).decode() for name, fd in zip(received.body.names, fds, strict=True)}
        after = max(found)
        for fd in fds:
            os.close(fd)
    assert found == {name: name for name in names}
    channel.close()


def test_the_keeper_refuses_what_breaks_its_protocol(keeper: Deployment) -> None:
    channel = keeper_channel(keeper)
    fd = os.memfd_create("x")
    one = ("a",)
    for message, fds in ((Keep(one), ()), (Keep(one), (fd, fd)), (Forget(one), (fd,)), (Fetch(), (fd,))):
        channel.send(message, fds)
        body = channel.receive()[0].body
        assert isinstance(body, Refused)
        assert body.code == "protocol_error"
    channel.send(Keep(("a", "a", "b")), (fd, fd, fd))
    channel.send(Keep(("a",)), (fd,))
    assert [type(channel.receive()[0].body) for _ in range(2)] == [Ack, Ack]
    channel.send(Forget(("a", "never")))
    channel.send(Forget(("b",)))
    assert [type(channel.receive()[0].body) for _ in range(2)] == [Ack, Ack]
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(keeper.config.socket("keeper")))
        peer.sendall(b"\x04\0\0\0junk")
        assert peer.recv(1) == b""
    channel.send(Fetch())
    received, fds = channel.receive()
    assert isinstance(received.body, Kept)
    for one in (*fds, fd):
        os.close(one)
    channel.close()
    assert keeper.keeper is not None
    assert keeper.keeper.poll() is None


def test_the_keeper_holds_thousands_and_says_where_its_limit_is(keeper: Deployment) -> None:
    assert keeper.keeper is not None
    limit = FDS_SPARE + 3_000
    assert resource.prlimit(keeper.keeper.pid, resource.RLIMIT_NOFILE)[0] > limit  # it has asked for more than is usual
    parking = Parking(keeper.config.socket("keeper"), "hmm:1", get_logger("test"), SYSTEM_CLOCK)
    parking.connect()
    fd = os.memfd_create("x")
    names = [f"n{number:04}" for number in range(3_000)]
    with limited(os.getpid(), limit):
        parking.keep(dict.fromkeys(names, fd))
        wait_until(lambda: parking.hear() or parking._num_unanswered == 0, "all is kept")
        kept = parking.fetch(deadline_ms=60_000)
        assert sorted(kept) == names
        for one in kept.values():
            os.close(one)
        parking.forget(names[1:])
        wait_until(lambda: parking.hear() or parking._num_unanswered == 0, "the others are forgotten")
        assert [os.close(one) or name for name, one in parking.fetch(deadline_ms=60_000).items()] == ["n0000"]
    parking.close()
    os.close(fd)


def test_what_a_keeper_was_sent_it_has_however_late_it_comes_to_it(keeper: Deployment) -> None:
    """It stands still while an HMM parks in several messages and dies, which waits for it once. The successor hears of
    all, and of nothing that was forgotten."""
    assert keeper.keeper is not None
    fd = os.memfd_create("x")
    first, second = (
        Parking(keeper.config.socket("keeper"), f"hmm:{n}", get_logger("test"), SYSTEM_CLOCK) for n in "12"
    )
    first.connect()
    first.keep({"a": fd, "b": fd})
    keeper.keeper.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        for name in "cdefg":
            first.keep({name: fd})
        first.forget("a")
        assert first.is_connected
        assert time.monotonic() - started < 10.0, "it has waited for one answer, not for each"
        first.close()
    finally:
        keeper.keeper.send_signal(signal.SIGCONT)
    second.connect()
    kept = second.fetch(deadline_ms=60_000)
    assert sorted(kept) == ["b", "c", "d", "e", "f", "g"]
    for one in (*kept.values(), fd):
        os.close(one)
    second.close()


def test_late_answers_of_a_keeper_are_taken_when_they_come(keeper: Deployment) -> None:
    assert keeper.keeper is not None
    fd = os.memfd_create("x")
    parking = Parking(keeper.config.socket("keeper"), "hmm:1", get_logger("test"), SYSTEM_CLOCK)
    parking.connect()
    keeper.keeper.send_signal(signal.SIGSTOP)
    parking.keep({"a": fd})
    parking.keep({"b": fd})
    keeper.keeper.send_signal(signal.SIGCONT)

    def heard() -> bool:
        parking.hear()
        return parking._num_unanswered == 0

    wait_until(heard, "both answers")
    assert parking.is_connected
    keeper.keeper.kill()
    keeper.keeper.wait(60)

    def is_lost() -> bool:
        parking.hear()
        return not parking.is_connected

    wait_until(is_lost, "its end is heard")
    parking.close()
    os.close(fd)


def test_the_keeper_refuses_more_than_it_can_have_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "open_files_max", lambda: FDS_SPARE + 2)
    (tmp_path / "sockets").mkdir()
    keeper = keeper_module.Keeper(KeeperConfig(run_dir=str(tmp_path)))
    fds = [os.memfd_create("x") for _ in range(3)]
    assert isinstance(keeper._handle(Keep(("a", "b")), [os.dup(fd) for fd in fds[:2]])[0], Ack)
    before = len(os.listdir("/proc/self/fd"))
    refused, _ = keeper._handle(Keep(("c", "a")), [os.dup(fd) for fd in fds[:2]])
    assert isinstance(refused, Refused)
    assert (refused.code, "2 can be" in refused.message) == ("too_many", True)
    assert isinstance(keeper._handle(Keep(("a",)), [os.dup(fds[2])])[0], Ack)  # replacing needs no room
    assert len(os.listdir("/proc/self/fd")) == before
    keeper.close()
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def limited(pid: int, soft: int) -> Iterator[None]:
    """With another limit of open files until the end of the block."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_the_keeper_is_small(keeper: Deployment) -> None:
    assert keeper.keeper is not None
    maps = Path(f"/proc/{keeper.keeper.pid}/maps").read_text()
    assert "numpy" not in maps
    assert "torch" not in maps
    assert peak_bytes(keeper.keeper.pid) < 64 << 20
