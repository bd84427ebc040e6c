"""A router that stood still, or is always late: what that says of its ranks."""

from __future__ import annotations

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.services.router.dispatch.absence import ABSENT_S, Absence
from elasticmoe.services.router.dispatch.balancer import LOST_S
from elasticmoe.services.router.dispatch.dispatcher import GAP_S, GONE_S
from tests.unit.test_router_dispatcher import Bench, bench, reason

__all__ = ["bench"]  # a fixture


async def test_a_router_that_stood_still_takes_no_rank_for_silent(bench: Bench) -> None:
    """What ranks have said meanwhile waits to be read. A stream that was moved waits for its new rank as it would."""
    bench.layout(0, 1, 2)
    for replica in range(3):
        bench.status(replica)
    streams = [bench.open(name) for name in "abc"]
    ranks = [stream.rank.replica for stream in streams if stream.rank]
    assert sorted(ranks) == [0, 1, 2]
    for replica, stream in zip(ranks, streams, strict=True):
        bench.tokens(replica, stream, 0, b"x")
    bench.tokens(ranks[1], streams[1], 2, b"z")  # after one that is missing
    bench.pass_time(0.1)
    bench.layout(*ranks[:2], epoch=2)  # the third one leaves, and has its stream to hand over
    bench.pass_time(GONE_S - 1.0)
    bench.stand_still(3 * LOST_S)
    assert [reason(stream) for stream in streams] == ["running"] * 3
    assert bench.dispatcher.readiness(bench.now)[0]
    assert [stream.num_submits for stream in streams] == [1] * 3
    for replica in ranks[:2]:  # two have spoken
        bench.status(replica, running=1)
    bench.pass_time(GAP_S)
    assert [stream.num_submits for stream in streams] == [1, 2, 2]
    bench.pass_time(LOST_S - GAP_S - 0.1)
    assert streams[0].num_submits == 1
    bench.pass_time(0.2)
    assert reason(streams[0]) == "rank_lost"  # the others are silent too


async def test_a_router_that_stood_still_goes_to_ranks_it_knows(bench: Bench) -> None:
    """A request may come before the first turn afterwards."""
    bench.layout(0)
    bench.status(0)
    bench.pass_time(0.1)
    bench.now += 2 * LOST_S
    assert bench.open().rank == RankId(0, 0)


@pytest.mark.parametrize("late_s", [1.05, 1.15, 3.0])
async def test_a_router_that_is_always_late_finds_a_dead_rank(bench: Bench, late_s: float) -> None:
    """A late turn counts for a second."""
    bench.layout(0, 1)
    bench.status(0)
    bench.status(1, running=9)
    stream = bench.open()
    assert stream.rank == RankId(0, 0)
    bench.pass_time(0.1)
    turns = 0
    while stream.num_submits == 1 and turns < 20:
        bench.stand_still(late_s)
        bench.status(1, running=9)
        turns += 1
    assert LOST_S <= turns <= LOST_S + 3


@pytest.mark.parametrize("seconds", [1.2, 30.0, 86_400.0])
def test_an_absence_keeps_the_order_of_moments(seconds: float) -> None:
    now = 100_000.0
    turned = now - seconds
    absence = Absence(turned, now)
    moments = [turned - 500.0, turned - 2.0, turned, turned + 0.1, turned + seconds / 2, now - 0.001, now]
    moved = [absence.moved(at) for at in moments]
    assert moved == sorted(set(moved))
    assert now - moved[1] == pytest.approx(2.0 + ABSENT_S)
    assert now - moved[2] == pytest.approx(ABSENT_S)
    assert moved[-1] == now
