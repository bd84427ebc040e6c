"""A rank's connection to the HMM: what one look takes in, and what it leaves for the next."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError, Unavailable
from elasticmoe.common.protocol.handles import Applied, AttachReply, SeatMemory, Segment, ShareHandles
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.replies import Ack, Refused
from elasticmoe.services.worker.hmm.link import MESSAGES_PER_LOOK, RESUME_S, HmmLink
from tests.unit.specs import tiny_mixtral_spec

SEAT = StartRank(RankId(0, 0), 0, "host:0", "r0", 1, 16, 4, 160)
SHARE, GOAL = ShareHandles(()), SeatMemory(1, (), (), (), (), ())
FD = 7


class Channel:
    """In place of elasticmoe.common.fdchannel's. `came`: what the HMM has sent; its end, once `is_cut`."""

    def __init__(self) -> None:
        self.came: deque[Message] = deque()
        self.sent: list[Message] = []
        self.is_cut = False
        self.is_closed = False

    @property
    def is_readable(self) -> bool:
        return bool(self.came) or self.is_cut

    @property
    def has_ended(self) -> bool:
        return self.is_cut

    def fileno(self) -> int:
        return FD

    def send(self, body: Message, *, deadline_ms: int = 0) -> None:
        self.sent.append(body)

    def receive(self, *, deadline_ms: int) -> tuple[Received[Any], list[int]]:
        assert self.is_readable, "a rank that steps must not wait"
        if not self.came:
            raise Unavailable("peer closed the connection")
        return Received(0, "hmm:1", 0, self.came.popleft()), []

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def link(channel: Channel) -> HmmLink:
    made = HmmLink(lambda _: channel, SEAT, watch=lambda _: None, unwatch=lambda _: None)
    made._channel = channel
    return made


def reply(memory_id: str) -> AttachReply:
    segment = Segment(0, 4096)
    kv = KvGeometry(16, 4096, 4096, 1, 4096)
    return AttachReply(memory_id, tiny_mixtral_spec(), "f", 4096, kv, 4096, segment, segment)


def look(link: HmmLink) -> list[Message]:
    return [message for message, _ in link.look({FD}, 0.0)]


def test_a_look_takes_all_that_came_up_to_a_goal(link: HmmLink, channel: Channel) -> None:
    channel.came.extend((SHARE, SHARE, GOAL, SHARE))
    assert look(link) == [SHARE, SHARE, GOAL]
    assert look(link) == [SHARE]
    assert list(link.look(set(), 0.0)) == []
    channel.came.extend([SHARE] * (MESSAGES_PER_LOOK + 1))
    assert look(link) == [SHARE] * MESSAGES_PER_LOOK  # a step comes in between
    assert look(link) == [SHARE]
    link.applied(3)
    assert channel.sent == [Applied(3)]


def test_what_came_before_the_end_is_taken_and_then_the_link_is_cut(link: HmmLink, channel: Channel) -> None:
    channel.came.append(SHARE)
    channel.is_cut = True
    assert look(link) == [SHARE]
    assert channel.is_closed
    assert not link.is_connected


def test_within_a_step_only_the_end_is_heard_and_another_memory_ends_the_rank(
    link: HmmLink, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elasticmoe.services.worker.hmm.link.importer_number", lambda _: 0)
    link._memory_id = "before"
    channel.came.append(GOAL)
    link.hear(0.0)
    assert (list(channel.came), link.is_connected) == ([GOAL], True), "its memory does not change within a step"
    channel.is_cut = True
    connects: list[int] = []

    def connect(deadline_ms: int) -> Channel:
        connects.append(deadline_ms)
        if len(connects) == 1:
            raise Unavailable("hmm is not there")
        return channel

    link._connect = connect
    link.hear(1.0)
    assert (channel.is_closed, link.is_connected, len(connects)) == (True, False, 1)
    link.hear(1.0 + RESUME_S / 2)
    assert len(connects) == 1, "not at every look"
    channel.came.clear()
    channel.came.append(reply("other"))
    with pytest.raises(ElasticMoEError, match="has lost the memory") as ended:
        link.hear(1.0 + RESUME_S)
    assert ended.value.code == "memory_replaced"
    channel.came.append(reply("before"))
    link.close()
    link.hear(9.0)
    assert link.is_connected


def test_a_refusal_is_told_once_and_the_want_of_an_hmm_is_not(
    link: HmmLink, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    log = SimpleNamespace(
        debug=lambda _, **facts: told.append(("debug", facts["because"])),
        warning=lambda _, **facts: told.append(("warning", facts["because"])),
        info=lambda *_, **__: None,
    )
    monkeypatch.setattr("elasticmoe.services.worker.hmm.link.importer_number", lambda _: 0)
    monkeypatch.setattr("elasticmoe.services.worker.hmm.link.log", log)
    link._channel = None
    failed, busy = (
        Refused("driver_failed", "host:0 cannot be used"),
        Refused("copying", "copies are under way", retryable=True),
    )
    for now, refusal in enumerate((failed, failed, busy, Refused("not_found", "no such seat"), failed)):
        channel.came.append(refusal)
        link.hear(float(now))
    assert told == [
        ("warning", "host:0 cannot be used"),
        ("debug", "host:0 cannot be used"),
        ("debug", "copies are under way"),
        ("warning", "no such seat"),
        ("warning", "host:0 cannot be used"),
    ]
    assert not link.is_connected


def test_the_first_goal_ends_what_is_handed_over(link: HmmLink, channel: Channel) -> None:
    channel.came.extend((SHARE, GOAL, SHARE))
    assert [message for message, _ in link.handed()] == [SHARE, GOAL]
    channel.came.clear()
    channel.came.append(Ack())
    with pytest.raises(ProtocolError, match="Ack was not asked for"):
        next(link.handed())
