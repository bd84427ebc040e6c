"""What a rank says to routers, also to those that are still to connect to it."""

from __future__ import annotations

import msgspec
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.protocol.codec import Message, encode
from elasticmoe.common.protocol.errors import PayloadTooLarge
from elasticmoe.common.protocol.limits import MESSAGE_BYTES_MAX
from elasticmoe.common.protocol.router import Delta, Logprob, Tokens, logprob_bytes
from elasticmoe.services.worker.rank import reports
from elasticmoe.services.worker.rank.reports import GRACE_S, MESSAGES_MAX, TRY_S, Reports, tokens_of
from elasticmoe.services.worker.rank.request_times import RequestTimes

A, B = b"router:a", b"router:b"


class Wire:
    """The transport: routers that are connected, what they got, and who was dropped."""

    def __init__(self) -> None:
        self.dropped: list[bytes] = []
        self.connected: set[bytes] = set()
        self.got: list[tuple[bytes, Message]] = []

    def send(self, router: bytes, message: Message) -> bool:
        if router in self.connected:
            self.got.append((router, message))
        return router in self.connected


def reports_to(wire: Wire) -> Reports:
    return Reports(wire.send, wire.dropped.append, RequestTimes(SYSTEM_CLOCK))


def said(number: int) -> Tokens:
    return Tokens((Delta("r", number, (number,)),))


def test_kept_until_it_comes_and_in_order() -> None:
    wire = Wire()
    reports = reports_to(wire)
    reports.expect([A], 100.0)
    for number in range(3):
        reports.tell(A, said(number))
        reports.turn(100.0 + number)
    assert reports.is_waiting
    wire.connected.add(A)
    reports.tell(A, said(3))  # not before what was kept
    reports.turn(104.0)
    reports.tell(A, said(4))
    assert wire.got == [(A, said(number)) for number in range(5)]
    assert not reports.is_waiting
    assert not wire.dropped


def test_a_router_that_never_comes_is_gone() -> None:
    wire = Wire()
    reports = reports_to(wire)
    reports.expect([A, B], 100.0)
    reports.tell(A, said(0))
    reports.tell(B, said(0))
    wire.connected.add(B)
    reports.turn(100.0)
    reports.turn(100.0 + GRACE_S)
    assert not wire.dropped
    reports.turn(100.1 + GRACE_S)
    assert wire.dropped == [A]
    assert not reports.is_waiting
    reports.tell(A, said(1))  # like any router that is not connected
    assert wire.dropped == [A, A]


def test_one_that_was_not_expected_is_gone_at_once() -> None:
    wire = Wire()
    reports_to(wire).tell(A, said(0))
    assert wire.dropped == [A]


def test_what_is_kept_is_bounded() -> None:
    wire = Wire()
    reports = reports_to(wire)
    reports.expect([A], 0.0)
    for _ in range(MESSAGES_MAX):
        reports.tell(A, said(0))
    assert reports.is_waiting
    assert not wire.dropped
    reports.tell(A, said(0))
    assert wire.dropped == [A]
    assert not reports.is_waiting


def test_one_that_fails_half_way_is_gone() -> None:
    wire = Wire()
    reports = Reports(
        lambda router, message: wire.send(router, message) and len(wire.got) < 2,
        wire.dropped.append,
        RequestTimes(SYSTEM_CLOCK),
    )
    reports.expect([A], 0.0)
    for number in range(3):
        reports.tell(A, said(number))
    assert not wire.dropped
    wire.connected.add(A)
    reports.turn(TRY_S)
    assert wire.dropped == [A]


def test_one_that_is_connected_already_need_not_wait() -> None:
    wire = Wire()
    wire.connected.add(A)
    reports = reports_to(wire)
    reports.expect([A], 0.0)
    reports.tell(A, said(0))
    assert wire.got == [(A, said(0))]
    assert not reports.is_waiting


# ---- messages with tokens --------------------------------------------------------------------------------------------

LOGPROBS = tuple(Logprob(-1.0, tuple((2**20 - 1, -0.5) for _ in range(20))) for _ in range(100))


def sizes_of(messages: list[Tokens]) -> list[int]:
    return [len(encode(message, sender="rank-r0t0:" + "f" * 16)) for message in messages]


def test_a_steps_tokens_are_one_message() -> None:
    deltas = [Delta(f"r{n}", n, (n,), None, None, LOGPROBS[:1]) for n in range(256)]
    (message,) = tokens_of(deltas)
    assert message.deltas == tuple(deltas)


@pytest.mark.parametrize(
    "delta",
    [
        Delta("r" * 128, 0, tuple(range(2**20 - 150_000, 2**20))),
        Delta("r", 0, (5,), "stop", 5, LOGPROBS[:1], LOGPROBS * 300),
        Delta("\U0001f600" * 128, 0, (1, 2), "length"),
    ],
)
def test_no_message_is_too_large_and_nothing_is_lost(delta: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "PORTION_BYTES", 2_000_000)
    num_each = max(1, 2_000_000 // len(encode(Tokens((delta,)), sender="r")))
    num = min(3_000, 5 * num_each)
    messages = list(tokens_of([delta] * num))
    assert [one for message in messages for one in message.deltas] == [delta] * num
    largest_alone = max(sizes_of([Tokens((delta,))]))
    assert max(sizes_of(messages)) <= max(2_000_000, largest_alone) + 200
    assert len(messages) <= num


def test_what_is_adopted_may_be_more_than_a_message_holds() -> None:
    """256 sequences with all that they have: a rank that could not tell it could never take its seat."""
    deltas = [Delta(f"r{n}", 0, tuple([2**20 - 1] * 60_000)) for n in range(256)]
    with pytest.raises(PayloadTooLarge):
        encode(Tokens(tuple(deltas)), sender="rank")
    messages = list(tokens_of(deltas))
    assert sum(len(message.deltas) for message in messages) == 256
    assert max(sizes_of(messages)) < MESSAGE_BYTES_MAX


def test_a_logprobs_bytes_are_bounded() -> None:
    for num_top in (0, 1, 20):
        logprob = Logprob(-0.1, tuple((2**20 - 1, -0.5) for _ in range(num_top)))
        assert len(msgspec.msgpack.encode(logprob)) <= logprob_bytes(num_top)
