"""The text workers' fork server where the system refuses it something in the midst of a start: the router is told, and
nothing stays behind. With real limits: procs/test_text_workers.py."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from elasticmoe.services.router.text import forkserver
from elasticmoe.services.router.text.forkserver import ENDING, FORK, NOT_STARTED, ORDER, ForkServer
from tests.procs.descriptors import numbers_of

NUMBER = 7


class Scene:
    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        codec: Any = None
        self.server = ForkServer(theirs, codec)
        self.theirs = theirs

    def order(self) -> socket.socket:
        """Ask for a worker; our end of its socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.ours, [ORDER.pack(FORK, NUMBER, 1 << 20)], [theirs.fileno()])
        assert self.server._take_order()
        return ours

    def close(self) -> None:
        self.server._selector.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    # A worker that does nothing until it is killed.
    monkeypatch.setattr(ForkServer, "_become_worker", lambda *_: forkserver.signal.pause())
    scene = Scene()
    yield scene
    scene.close()


def refuse(*_: object) -> Any:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


def starve(*_: object) -> Any:
    raise MemoryError


@pytest.mark.parametrize("failure", [refuse, starve])
@pytest.mark.parametrize("place", ["fork", "pidfd_open", "register"])
def test_a_start_that_fails_costs_that_worker_only(
    scene: Scene, place: str, failure: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where: Any = selectors.EpollSelector if place == "register" else os
    before, children = numbers_of(os.getpid()), psutil.Process().children()
    with monkeypatch.context() as patch:
        patch.setattr(where, place, failure)
        lost = scene.order()
    assert ENDING.unpack(scene.ours.recv(ENDING.size)) == (NUMBER, NOT_STARTED)
    assert lost.recv(1) == b"", "its socket is closed"
    lost.close()
    assert numbers_of(os.getpid()) == before
    assert "a text worker could not be started: " in capsys.readouterr().err
    assert psutil.Process().children() == children
    # The next one is started.
    alive = scene.order()
    [(pid, _)] = scene.server._workers.values()
    os.kill(pid, 9)
    scene.server._reap(NUMBER)
    assert ENDING.unpack(scene.ours.recv(ENDING.size)) == (NUMBER, -9)
    alive.close()
    assert numbers_of(os.getpid()) == before
