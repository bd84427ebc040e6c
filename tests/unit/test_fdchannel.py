"""Channels and listeners of a process that has no descriptor left: what cannot be taken costs itself alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.fdchannel import DESCRIPTORS_CUT, Channel, Listener, connect
from elasticmoe.common.protocol.errors import ProtocolError, Unavailable
from elasticmoe.common.protocol.standby import TO_TEMPLATE, Fork
from tests.procs.descriptors import left_with, limit_leaving, numbers_of


@pytest.fixture
def pair() -> Iterator[tuple[Channel[Fork], Channel[Fork]]]:
    ours, theirs = (Channel(sock, "test:1", TO_TEMPLATE) for sock in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("free", [0, 1])
def test_a_message_whose_descriptors_find_no_room_is_lost_alone(
    pair: tuple[Channel[Fork], Channel[Fork]], free: int
) -> None:
    ours, theirs = pair
    before = numbers_of(os.getpid())
    theirs.send(Fork(), (0, 1))
    theirs.send(Fork())
    with left_with(os.getpid(), free):
        with pytest.raises(
            ProtocolError, match=f"cut off beside {free}: this process may have .* open files"
        ) as caught:
            ours.receive()
        assert caught.value.code == DESCRIPTORS_CUT
        assert ours.receive()[1] == []
    assert numbers_of(os.getpid()) == before
    theirs.send(Fork(), (0, 1))
    fds = ours.receive()[1]
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)


def test_a_listener_without_a_descriptor_closes_who_connects(tmp_path: Path) -> None:
    """And so does not wake up for the same one for ever, nor end."""
    listener = Listener(tmp_path / "a.sock")
    before = numbers_of(os.getpid())
    waiting: list[Channel[Any]] = [connect(tmp_path / "a.sock", "test:1", TO_TEMPLATE) for _ in range(2)]
    with left_with(os.getpid(), 0):
        for _ in waiting:
            with pytest.raises(Unavailable, match="a connection was closed: Too many open files") as caught:
                listener.accept("test:2", TO_TEMPLATE)
            assert caught.value.code == "no_descriptors"
        assert listener.accept("test:2", TO_TEMPLATE) is None
    for channel in waiting:
        with pytest.raises(Unavailable):
            channel.receive()
        channel.close()
    assert numbers_of(os.getpid()) == before
    last: Channel[Any] = connect(tmp_path / "a.sock", "test:1", TO_TEMPLATE)
    taken = listener.accept("test:2", TO_TEMPLATE)
    assert taken is not None
    taken.close()
    last.close()
    listener.close()
    listener.close()


def test_limits_count_what_is_free_and_not_what_is_there() -> None:
    assert [limit_leaving({0, 1, 2}, free) for free in (0, 1, 2)] == [3, 4, 5]
    assert [limit_leaving({0, 1, 2, 4, 5, 7}, free) for free in (0, 1, 2)] == [3, 6, 8]
