"""What a rank says to routers that are still to connect to it."""

from __future__ import annotations

from common.protocol.codec import Message
from common.protocol.router import Delta, Tokens
from services.worker.reports import GRACE_S, MESSAGES_MAX, TRY_S, Reports

A, B = b"router:a", b"router:b"


class Wire:
    """The transport: routers that are connected, and what they got."""

    def __init__(self) -> None:
        self.connected: set[bytes] = set()
        self.got: list[tuple[bytes, Message]] = []

    def send(self, router: bytes, message: Message) -> bool:
        if router in self.connected:
            self.got.append((router, message))
        return router in self.connected


def said(number: int) -> Tokens:
    return Tokens((Delta("r", number, (number,)),))


def test_kept_until_it_comes_and_in_order() -> None:
    wire = Wire()
    reports = Reports(wire.send)
    reports.expect([A], 100.0)
    for number in range(3):
        assert reports.tell(A, said(number))
        assert reports.turn(100.0 + number) == []
    assert reports.is_waiting
    wire.connected.add(A)
    assert reports.tell(A, said(3))  # not before what was kept
    assert reports.turn(104.0) == []
    assert reports.tell(A, said(4))
    assert wire.got == [(A, said(number)) for number in range(5)]
    assert not reports.is_waiting


def test_a_router_that_never_comes_is_gone() -> None:
    wire = Wire()
    reports = Reports(wire.send)
    reports.expect([A, B], 100.0)
    reports.tell(A, said(0))
    reports.tell(B, said(0))
    wire.connected.add(B)
    assert reports.turn(100.0) == []
    assert reports.turn(100.0 + GRACE_S) == []
    assert reports.turn(100.1 + GRACE_S) == [A]
    assert not reports.is_waiting
    assert not reports.tell(A, said(1))  # like any router that is not connected


def test_one_that_was_not_expected_is_gone_at_once() -> None:
    assert not Reports(Wire().send).tell(A, said(0))


def test_what_is_kept_is_bounded() -> None:
    reports = Reports(Wire().send)
    reports.expect([A], 0.0)
    assert all(reports.tell(A, said(0)) for _ in range(MESSAGES_MAX))
    assert not reports.tell(A, said(0))
    assert not reports.is_waiting


def test_one_that_fails_half_way_is_gone() -> None:
    wire = Wire()
    reports = Reports(lambda router, message: wire.send(router, message) and len(wire.got) < 2)
    reports.expect([A], 0.0)
    for number in range(3):
        assert reports.tell(A, said(number))
    wire.connected.add(A)
    assert reports.turn(TRY_S) == [A]


def test_one_that_is_connected_already_need_not_wait() -> None:
    wire = Wire()
    wire.connected.add(A)
    reports = Reports(wire.send)
    reports.expect([A], 0.0)
    assert reports.tell(A, said(0))
    assert wire.got == [(A, said(0))]
    assert not reports.is_waiting
