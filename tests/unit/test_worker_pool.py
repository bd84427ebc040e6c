"""The pool's loop with a template that is none: what it makes of one that dies, or never forks, or of missing memory.
With real processes: procs/test_pool.py, procs/test_pool_death.py."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.config import PoolConfig, make_run_dirs
from elasticmoe.common.fdchannel import Channel
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.protocol.standby import TO_POOL, Forked, FromStandby
from elasticmoe.services.worker.pool import children
from elasticmoe.services.worker.pool import pool as pool_module
from elasticmoe.services.worker.pool.pool import FORK_S_MAX, STANDBY_FAILURES_MAX, STANDBY_SETTLED_S, Pool


class Template:
    """In the place of elasticmoe.services.worker.pool.forks.Forks. `sockets`: of those that were asked for."""

    def __init__(self, *_: Any) -> None:
        self.connected_at = 0.0
        self.sockets: list[socket.socket] = []
        self.error: OSError | None = None
        self.num_killed = 0
        self.ours, self.theirs = socket.socketpair()

    def fileno(self) -> int:
        return self.ours.fileno()

    def connect(self) -> bool:
        return True

    def fork(self) -> Channel[FromStandby]:
        if self.error is not None:
            raise self.error
        ours, theirs = socket.socketpair()
        self.sockets.append(theirs)
        return Channel(ours, "pool:1", TO_POOL)

    def come(self, number: int) -> None:
        """A process is there: this one, which lives."""
        Channel(self.sockets[number], "standby:1", TO_POOL).send(Forked(os.getpid()))

    def die(self) -> None:
        self.theirs.close()

    def lose(self) -> None:
        self.ours.close()
        self.ours, self.theirs = socket.socketpair()

    def kill(self) -> None:
        self.num_killed += 1
        for sock in self.sockets:
            sock.close()

    def reap(self) -> None:
        pass

    def close(self) -> None:
        for sock in (*self.sockets, self.ours, self.theirs):
            sock.close()


class Site:
    """A pool whose clock is the test's. Its launcher would be our parent: so nothing is ended at its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
        self.now = 1_000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda _: None)
        monkeypatch.setattr(pool_module, "time", clock)
        monkeypatch.setattr(children, "time", clock)
        monkeypatch.setattr(pool_module, "Forks", Template)
        monkeypatch.setattr(pool_module, "POLL_MS", 0)
        monkeypatch.setattr(pool_module, "usable_cores", lambda: 5.5)  # as a group's quota may be
        config = PoolConfig(run_dir=str(run_dir), standbys=2, threads_max=3)
        make_run_dirs(config)
        self.pool = Pool(config, os.getppid())
        forks: Any = self.pool._forks
        self.template: Template = forks

    def turn(self, after_s: float = 0.0) -> int:
        """One turn, later; the number of standbys."""
        self.now += after_s
        self.pool._turn()
        return self.pool._status().standby

    def close(self) -> None:
        self.pool._stop_all()
        self.pool._server.close()
        self.pool._seats.close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="em-") as folder:  # short: socket paths have a limit
        site = Site(monkeypatch, Path(folder))
        yield site
        site.close()


def test_a_standby_counts_once_it_is_there(site: Site) -> None:
    assert site.turn() == 0
    assert len(site.template.sockets) == 2
    site.template.come(0)
    assert site.turn() == 1
    site.template.come(1)
    assert site.turn() == 2
    assert len(site.template.sockets) == 2


def test_a_pool_says_what_its_ranks_share(site: Site) -> None:
    status = site.pool._status()
    assert (status.cores, status.threads_max) == (5, 3)


def test_a_template_that_dies_again_and_again_ends_the_pool(site: Site) -> None:
    site.turn()
    for _ in range(STANDBY_FAILURES_MAX):
        site.template.connected_at = site.now
        site.template.die()
        site.turn()
    site.template.die()
    with pytest.raises(Unavailable, match=f"{STANDBY_FAILURES_MAX + 1} processes died in a row"):
        site.turn()


def test_a_template_that_had_settled_may_die(site: Site) -> None:
    site.turn()
    for _ in range(2 * STANDBY_FAILURES_MAX):
        site.template.connected_at = site.now
        site.template.die()
        site.turn(STANDBY_SETTLED_S + 1)


def test_a_template_that_forks_nobody_is_killed(site: Site) -> None:
    site.turn()
    site.template.come(0)
    site.turn(FORK_S_MAX - 1)
    assert site.template.num_killed == 0
    site.turn(2.0)
    assert site.template.num_killed == 1
    site.turn()
    site.turn(60.0)
    assert len(site.template.sockets) > 2  # asked again


def test_what_the_system_refuses_is_tried_again_with_growing_pauses(site: Site) -> None:
    site.template.error = OSError(errno.EMFILE, "too many")
    pauses = []
    for _ in range(6):
        site.turn()
        pauses.append(site.pool._fork_at - site.now)
        site.now = site.pool._fork_at
    assert pauses == pytest.approx([0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    site.template.error = None
    site.turn()
    site.template.come(0)
    assert site.turn() == 1


def test_a_standby_whose_word_is_lost_for_want_of_memory_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.turn()
    site.template.come(0)

    def starve(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as starved:
        starved.setattr(Channel, "receive", starve)
        with pytest.raises(MemoryError):
            site.turn()
    site.template.come(1)
    site.turn()
    site.turn(60.0)
    assert len(site.template.sockets) == 3  # another one in its place
    site.template.come(2)
    assert site.turn() == 2
