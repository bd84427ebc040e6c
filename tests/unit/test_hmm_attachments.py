"""The handle channel's HMM side: large messages to ranks that are busy, and what ranks may say."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.fdchannel import Channel, Listener, connect
from common.layout import RankId
from common.model_spec import KvGeometry, RecordKey
from common.protocol.handles import (
    TO_RANK,
    Applied,
    Attach,
    AttachReply,
    Extent,
    FromHmm,
    RecordExtent,
    SeatMemory,
    Segment,
)
from common.telemetry import get_logger
from services.hmm import attachments as attachments_module
from services.hmm.attachments import Attachments
from tests.procs.waiting import wait_until
from tests.unit.specs import tiny_mixtral_spec

EXTENT = Extent(0, 0, 4096)
SEGMENT = Segment(0, 4096)
SEAT = SeatMemory(1, (), (EXTENT,), (), (0,), (0,))
LARGE = SeatMemory(
    0,
    tuple(RecordExtent(RecordKey("expert", 0, i), Extent(0, i << 40, 1 << 40)) for i in range(30_000)),
    (),
    (),
    (),
    (),
)


class Pair:
    """Attachments with one rank, whose end is `channel`."""

    def __init__(self, path: Path) -> None:
        self.subject = Attachments(Listener(path), "hmm:1", get_logger("test"))
        self.channel: Channel[FromHmm] = connect(path, "rank:1", TO_RANK)
        self.channel.send(Attach(RankId(0, 0), 0, "host:0", "r0"))
        self.subject.accept(self.subject.fds())
        ((accepted, request),) = wait_until(lambda: self.subject.requests(self.subject.fds()), "the rank asks")
        reply = AttachReply(
            "m", tiny_mixtral_spec(), 4096, KvGeometry(16, 4096, 4096, 1, 4096), 4096, SEGMENT, SEGMENT, SEAT
        )
        self.fd = os.memfd_create("x")
        os.write(self.fd, b"content")
        self.subject.admit(accepted, request, reply, (self.fd,))
        self.rank = self.subject.by_slot[0]

    def take(self) -> list[int]:
        """One turn of the loop: slots of ranks that ended."""
        return [one.slot for one in self.subject.take(self.subject.fds())]

    def close(self) -> None:
        self.channel.close()
        self.subject.close()
        os.close(self.fd)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(attachments_module, "_SEND_BUFFER_BYTES", 1 << 16)
    made = Pair(tmp_path / "s.sock")
    yield made
    made.close()


def test_a_large_message_waits_for_a_busy_rank_and_holds_up_nobody(pair: Pair) -> None:
    started = time.monotonic()
    pair.subject.update(pair.rank, LARGE, (pair.fd,))
    pair.subject.update(pair.rank, SEAT, (pair.fd,))
    assert time.monotonic() - started < 2.0
    assert not pair.rank.outbox.is_empty
    assert pair.subject.turn_ms(500) < 500
    assert isinstance(pair.channel.receive()[0].body, AttachReply)
    found: list[SeatMemory] = []
    with socket.socket(fileno=os.dup(pair.channel.fileno())) as raw:
        head = raw.recv(4, socket.MSG_PEEK)  # nothing is read: the rest is sent as the rank reads
        assert len(head) == 4

    def read() -> bool:
        assert pair.take() == []
        return pair.rank.outbox.is_empty

    def drain() -> None:
        for _ in range(2):
            received, fds = pair.channel.receive(deadline_ms=10_000)
            assert isinstance(received.body, SeatMemory)
            assert [os.pread(fd, 7, 0) for fd in fds] == [b"content"]
            for fd in fds:
                os.close(fd)
            found.append(received.body)

    thread = threading.Thread(target=drain)
    thread.start()
    wait_until(read, "all is sent")
    thread.join(10.0)
    assert [len(seat.records) for seat in found] == [30_000, 0]
    assert SEAT.revision < found[0].revision < found[1].revision
    pair.channel.send(Applied(found[1].revision))
    wait_until(lambda: pair.take() == [] and pair.rank.applied == found[1].revision, "the rank has applied it")
    assert pair.subject.turn_ms(500) == 500


def test_what_was_sent_last_is_not_sent_again(pair: Pair) -> None:
    pair.subject.update(pair.rank, SEAT, (pair.fd,))
    assert pair.rank.sent.revision == SEAT.revision


def test_the_end_of_a_rank_is_seen_also_while_something_is_unsent(pair: Pair) -> None:
    pair.subject.update(pair.rank, LARGE, (pair.fd,))
    pair.channel.close()
    assert wait_until(pair.take, "the end is seen") == [0]
    assert pair.subject.by_slot == {}


@pytest.mark.parametrize("message", [Applied(1 << 62), Attach(RankId(0, 0), 0, "host:0", "r0")])
def test_what_no_rank_may_say_ends_the_connection(pair: Pair, message: Applied) -> None:
    pair.channel.send(message)
    assert wait_until(pair.take, "the breach is seen") == [0]
