"""elasticmoe.native.bus between the ranks of one replica: sums, columns, plans. What they compute under load:
native/tests/collectives_test.cpp."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import numpy as np
import pytest

from elasticmoe.native.bus import Bus, BusAborted, BusDesync, BusTimeout, bus_bytes, format_bus
from tests.unit.threads import at_once

SHAPE = (4, 6, 32, 3, 60, 40)  # ranks, tokens, hidden, top_k, elements of a half, bytes of a plan
REPLICA = (3, 1)  # slots, by tp index
LONG_MS = 30_000


class Segment:
    """A bus with two members, which are one replica."""

    def __init__(self) -> None:
        self._nbytes = bus_bytes(*SHAPE)
        self._memory = mmap.mmap(-1, self._nbytes)
        self._view = (ctypes.c_char * self._nbytes).from_buffer(self._memory)
        self._addr = ctypes.addressof(self._view)
        format_bus(self._addr, self._nbytes, *SHAPE)
        self.hmm = Bus(self._addr, self._nbytes)
        self.hmm.set_membership(1, 0b1010, True)
        self.ranks = [self.join(slot) for slot in REPLICA]

    def join(self, slot: int) -> Bus:
        bus = Bus(self._addr, self._nbytes, slot)
        bus.join(slot + 1)
        bus.set_replica(REPLICA)
        return bus

    def close(self) -> None:
        del self._view
        self._memory.close()


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment()
    yield segment
    segment.close()


def test_rows_and_sums_come_to_all(segment: Segment) -> None:
    x = [np.full((3, 4), 10.0**rank, np.float32) for rank in range(2)]
    rows = [np.full((3, 4), np.nan, np.float32) for _ in range(2)]
    rows[0][:1], rows[1][1:] = 100, 200  # of three rows the first rank has one, the other two
    for has_x, has_rows in ((True, False), (False, True), (True, True)):
        out = [np.zeros((3, 4), np.float32) for _ in range(2)]

        def reduce(rank: int, has_x: bool = has_x, has_rows: bool = has_rows, out: list[np.ndarray] = out) -> None:
            brought, own = x[rank].ctypes.data * has_x, rows[rank].ctypes.data * has_rows
            segment.ranks[rank].reduce(1, brought, own, out[rank].ctypes.data, 3, 4, LONG_MS)

        assert at_once(lambda: reduce(0), lambda: reduce(1)) == [None, None]
        want = np.array([[100.0], [200], [200]]) * has_rows + 11 * has_x + np.zeros(4)
        for each in out:
            assert np.array_equal(each, want)


def test_columns_come_to_whoever_wants_them(segment: Segment) -> None:
    whole = np.arange(15, dtype=np.float32).reshape(3, 5)
    parts = [np.ascontiguousarray(part) for part in (whole[:, :2], whole[:, 2:])]
    out = np.zeros((3, 5), np.float32)
    ended = at_once(
        lambda: segment.ranks[0].gather(1, parts[0].ctypes.data, out.ctypes.data, 3, 5, LONG_MS),
        lambda: segment.ranks[1].gather(1, parts[1].ctypes.data, 0, 3, 5, LONG_MS),
    )
    assert ended == [None, None]
    assert np.array_equal(out, whole)


def test_a_plan_is_read_after_the_step(segment: Segment) -> None:
    leader, follower = segment.ranks
    for plan in (b"", b"x" * 40, b"two\0parts"):
        leader.write_plan(plan)
        ended = at_once(lambda: leader.step(1, 3, 0, LONG_MS), lambda: follower.step(1, 0, 0, LONG_MS))
        assert ended == [[(1, 0, 0), (3, 3, 0)]] * 2
        assert follower.read_plan(1) == plan
    with pytest.raises(ValueError, match="41 bytes"):
        leader.write_plan(b"y" * 41)
    segment.hmm.set_membership(2, 0b1010, True)
    with pytest.raises(BusAborted):
        follower.read_plan(1)


def test_their_ends_are_those_of_every_meeting(segment: Segment) -> None:
    x = np.ones((1, 2), np.float32)
    first, second = segment.ranks
    with pytest.raises(BusTimeout):
        first.reduce(1, x.ctypes.data, 0, x.ctypes.data, 1, 2, 1)
    with pytest.raises(BusDesync):
        second.reduce(1, x.ctypes.data, 0, x.ctypes.data, 2, 1, LONG_MS)
    segment.hmm.set_membership(2, 0b1010, True)
    with pytest.raises(BusAborted):
        first.reduce(1, x.ctypes.data, 0, x.ctypes.data, 1, 2, LONG_MS)
    assert first.take_wait_ns() > 0
    assert first.take_exchange_ns() > 0


def test_what_makes_no_sense_is_refused(segment: Segment) -> None:
    bus, x = segment.ranks[0], np.ones(64, np.float32)
    assert (bus.half_elements, bus.plan_bytes) == SHAPE[4:]
    for call, text in (
        (lambda: bus.reduce(1, x.ctypes.data, 0, x.ctypes.data, 1, 61, 0), "61 elements; the bus has room for 60"),
        (lambda: bus.reduce(1, x.ctypes.data, x.ctypes.data, x.ctypes.data, 1, 31, 0), "62 elements"),
        (lambda: bus.gather(1, x.ctypes.data, 0, 1, 122, 0), "61 elements"),
        (lambda: bus.set_replica([3, 3]), "twice"),
        (lambda: bus.set_replica([3, 4]), "below"),
        (lambda: bus.set_replica([1]), "own slot"),
        (lambda: bus.set_cores(0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    bus.set_replica([3, 2])
    with pytest.raises(ValueError, match="not all ranks"):
        bus.reduce(1, x.ctypes.data, 0, x.ctypes.data, 1, 1, 0)
