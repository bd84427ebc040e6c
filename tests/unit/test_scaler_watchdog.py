"""Who is ejected for making no progress, and who is not: a long step, a watcher that slept, a suspended machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.scaler import DeviceStatus, HmmStatus, PoolRank, PoolStatus
from elasticmoe.services.scaler.actions import EjectRank
from elasticmoe.services.scaler.control.watchdog import ALONE_FACTOR, Pulse, Watched, pulses_of, watch
from elasticmoe.services.scaler.service import IDLE_TURN_S, QUIET_TURN_S
from tests.unit.transitions import cluster_of

STALL_S = 2.4
TURN_S = 0.05


TURN_TAKES_S = 0.03  # beside what it waits: calls of HMM and pool


class Watchdog:
    """Shows each observation to `watch`, with what came of the one before."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s, self.watched = stall_s, Watched()

    def look(self, now: float, pulses: Iterable[Pulse]) -> tuple[object, ...]:
        self.watched, ejected, _ = watch(self.watched, self.stall_s, now, pulses)
        return ejected

    @property
    def is_quiet(self) -> bool:
        return self.watched.is_quiet


def run(
    watchdog: Watchdog,
    progress: Callable[[float, int], int],
    *,
    until: float,
    ranks: Iterable[int] = (0, 1, 2),
    is_asleep: Callable[[float, int], bool] = lambda *_: False,
) -> list[tuple[float, EjectRank]]:
    """Observe `ranks` every TURN_S; `progress(now, slot)` is each one's counter. What was ejected, and when."""
    ejected = []
    for turn in range(int(until / TURN_S)):
        now = turn * TURN_S
        pulses = [
            Pulse(slot, RankId(slot, 0), f"rank:{slot}", progress(now, slot), is_asleep(now, slot)) for slot in ranks
        ]
        ejected += [(now, stalled) for stalled in watchdog.look(now, pulses)]
    return ejected


def beats(now: float) -> int:
    """A rank that waits counts up every half second."""
    return int(now / 0.5)


def test_one_that_stands_while_others_move_is_ejected_in_time() -> None:
    ejected = run(Watchdog(STALL_S), lambda now, slot: 7 if slot == 1 else beats(now), until=2.6)
    assert [stalled.incarnation for _, stalled in ejected] == ["rank:1"]
    at, stalled = ejected[0]
    assert STALL_S <= at <= STALL_S + 2 * TURN_S
    assert (stalled.rank, stalled.limit_s) == (RankId(1, 0), STALL_S)


def test_two_that_stand_are_both_ejected() -> None:
    ejected = run(Watchdog(STALL_S), lambda now, slot: beats(now) if slot == 2 else 0, until=2.6)
    assert sorted(stalled.incarnation for _, stalled in ejected) == ["rank:0", "rank:1"]


def test_a_long_step_of_all_is_no_wedge() -> None:
    """Everybody computes for 6 s; nobody waits."""
    assert run(Watchdog(STALL_S), lambda now, _: int(now / 6.0), until=30.0) == []


def test_where_nobody_moves_for_long_one_is_ejected_not_all() -> None:
    ejected = run(Watchdog(STALL_S), lambda *_: 3, until=STALL_S * ALONE_FACTOR + 0.2)
    assert len(ejected) == 1
    assert ejected[0][1].limit_s == STALL_S * ALONE_FACTOR


def test_a_rank_alone_has_the_longer_limit() -> None:
    ejected = run(Watchdog(STALL_S), lambda *_: 3, until=STALL_S * ALONE_FACTOR + 0.2, ranks=[0])
    assert [round(at, 1) for at, _ in ejected] == [round(STALL_S * ALONE_FACTOR, 1)]


def test_a_rank_alone_that_sleeps_is_ejected_in_time() -> None:
    """It is stopped, or in a call that does not return: that is no long step."""
    ejected = run(Watchdog(STALL_S), lambda *_: 3, until=2.6, ranks=[0], is_asleep=lambda *_: True)
    assert [(round(at, 1), stalled.limit_s) for at, stalled in ejected] == [(STALL_S, STALL_S)]


def test_a_rank_alone_that_sleeps_for_a_moment_has_the_longer_limit() -> None:
    """It reads a page from a disk now and then, or was preempted."""
    ejected = run(
        Watchdog(STALL_S),
        lambda *_: 3,
        until=STALL_S * ALONE_FACTOR + 0.2,
        ranks=[0],
        is_asleep=lambda now, _: int(now / TURN_S) % 40 > 0,
    )
    assert [round(at, 1) for at, _ in ejected] == [round(STALL_S * ALONE_FACTOR, 1)]


def test_where_all_sleep_all_are_ejected_and_where_one_does_it_alone() -> None:
    """Whoever waits for a peer counts up: nobody here waits for another."""
    for asleep in ({0, 1, 2}, {1}):
        ejected = run(
            Watchdog(STALL_S), lambda *_: 3, until=2.6, is_asleep=lambda _, slot, asleep=asleep: slot in asleep
        )
        assert {stalled.incarnation for _, stalled in ejected} == {f"rank:{slot}" for slot in asleep}


def test_slow_is_not_wedged() -> None:
    """Stopped two seconds of three, as by SIGSTOP and SIGCONT in turns: it gets on, if slowly."""
    assert run(Watchdog(STALL_S), lambda now, slot: int(now / 2.0) if slot == 0 else beats(now), until=30.0) == []


def test_a_watcher_that_slept_blames_nobody() -> None:
    """The machine was suspended for a minute: no counter moved, and nobody was observed to stand."""
    watchdog = Watchdog(STALL_S)
    pulses = [Pulse(slot, RankId(slot, 0), f"rank:{slot}", 5) for slot in range(3)]
    assert watchdog.look(0.0, pulses) == ()
    assert watchdog.look(60.0, pulses) == ()
    moved = [Pulse(slot, RankId(slot, 0), f"rank:{slot}", 6) for slot in range(3)]
    assert watchdog.look(60.1, moved) == ()


def test_a_successor_starts_with_a_clean_slate() -> None:
    watchdog = Watchdog(STALL_S)

    def look(now: float, incarnation: str) -> tuple[EjectRank, ...]:
        others = Pulse(1, RankId(1, 0), "rank:b", int(now * 10))
        return watchdog.look(now, [Pulse(0, RankId(0, 0), incarnation, 9), others])

    for turn in range(20):
        assert look(turn * 0.1, "rank:a") == ()
    for turn in range(20, 40):
        assert look(turn * 0.1, "rank:a2") == ()


def test_who_is_not_killed_is_named_again() -> None:
    ejected = run(Watchdog(STALL_S), lambda now, slot: 7 if slot == 1 else beats(now), until=3 * STALL_S + 0.3)
    assert [stalled.incarnation for _, stalled in ejected] == ["rank:1"] * 3


def test_only_ranks_that_are_attached_and_ready_are_watched() -> None:
    def device(name: str, attached: str | None, progress: int) -> DeviceStatus:
        return DeviceStatus(name, 100, 10, 10, 10, 70, 4, 8, attached, progress=progress)

    devices = (device("host:0", "rank:a", 4), device("host:1", "rank:b", 5), device("host:2", None, 0))
    hmm = HmmStatus("ready", 0, 0, None, devices, 1, (0, 1), True)
    pool = PoolStatus(
        0,
        tuple(
            PoolRank(RankId(slot, 0), slot, f"host:{slot}", f"rank:{name}", 100 + slot, is_ready)
            for slot, name, is_ready in ((0, "a", True), (1, "b", False), (2, "c", True))
        ),
    )
    assert pulses_of(cluster_of(hmm, pool)) == (Pulse(0, RankId(0, 0), "rank:a", 4),)
    stopped = msgspec.structs.replace(pool.ranks[0], is_asleep=True)
    assert pulses_of(cluster_of(hmm, PoolStatus(0, (stopped,)))) == (Pulse(0, RankId(0, 0), "rank:a", 4, True),)
    assert pulses_of(cluster_of(None, pool)) == pulses_of(cluster_of(hmm)) == ()
    waiting = msgspec.structs.replace(devices[0], is_waiting=True)
    hmm = msgspec.structs.replace(hmm, devices=(waiting, *devices[1:]))
    assert pulses_of(cluster_of(hmm, PoolStatus(0, (stopped,)))) == (Pulse(0, RankId(0, 0), "rank:a", 4, False),)


@pytest.mark.parametrize("stopped_at", [10.0, 10.07, 10.2, 10.33, 10.49, 10.6])
def test_looking_seldom_while_nobody_computes_keeps_the_promise(stopped_at: float) -> None:
    """The scaler looks seldom then; whoever stands is looked at as often as before (promise P9)."""
    watchdog, now, num_looks = Watchdog(STALL_S), 0.0, 0
    while now < 20.0:
        progress = {0: beats(now), 1: beats(min(now, stopped_at))}
        pulses = [Pulse(slot, RankId(slot, 0), f"rank:{slot}", count, True) for slot, count in progress.items()]
        if ejected := watchdog.look(now, pulses):
            assert [stalled.incarnation for stalled in ejected] == ["rank:1"]
            break
        num_looks += now < stopped_at
        now += (QUIET_TURN_S if watchdog.is_quiet else IDLE_TURN_S) + TURN_TAKES_S
    assert STALL_S - 0.5 <= now - stopped_at <= 3.0
    assert num_looks < 40  # 200 would be every one


def test_it_is_not_quiet_while_somebody_computes_or_stands() -> None:
    watchdog = Watchdog(STALL_S)
    run(watchdog, lambda now, _: beats(now), until=3.0)
    assert watchdog.is_quiet
    run(watchdog, lambda now, slot: int(now * 60) if slot == 1 else beats(now), until=3.0)
    assert not watchdog.is_quiet
    watchdog = Watchdog(STALL_S)
    run(watchdog, lambda now, slot: 7 if slot == 1 else beats(now), until=1.5)
    assert not watchdog.is_quiet
