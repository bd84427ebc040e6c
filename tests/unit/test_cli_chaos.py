"""What `elasticmoe chaos` draws from a seed, and what it makes of what it saw."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from elasticmoe.cli.chaos import Verdict, add_arguments, judge, judge_abuse, run
from elasticmoe.cli.chaos_abuse import Abuse
from elasticmoe.cli.chaos_act import Acted, draw_bursts
from elasticmoe.cli.chaos_attacks import ATTACKS, CLOSED, Target
from elasticmoe.cli.chaos_faults import DEVICE, KILL, LOSE, STOP, TARGETS, Fault, Resize, draw_faults, draw_resizes
from elasticmoe.cli.chaos_load import BROKEN, HUNG, Tally
from elasticmoe.cli.chaos_run import Seen
from elasticmoe.cli.chaos_state import FDS_MORE_MAX, Holdings
from elasticmoe.common.protocol.errors import ConfigError


def test_a_seed_gives_the_same_run() -> None:
    assert draw_faults(7, 1_800, 30) == draw_faults(7, 1_800, 30) != draw_faults(8, 1_800, 30)
    assert draw_resizes(7, 1_800, 5) == draw_resizes(7, 1_800, 5) != draw_resizes(8, 1_800, 5)


def test_devices_are_for_whole_replicas() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--replicas", "2", "--tp", "2", "--devices", "host:3"])
    with pytest.raises(ConfigError, match="N at least 4, --replicas of --tp devices each"):
        run(args)


def test_half_an_hour_has_every_kind_of_fault_about_every_30_seconds() -> None:
    faults = [fault for seed in range(10) for fault in draw_faults(seed, 1_800, 30)]
    assert 55 <= len(faults) / 10 <= 65
    assert {fault.target for fault in faults} == {*TARGETS, DEVICE}
    assert {fault.kind for fault in faults} == {KILL, STOP, LOSE}
    assert all((fault.target == DEVICE) == (fault.kind == LOSE) for fault in faults)
    assert all((fault.seconds > 0) == (fault.kind == STOP) for fault in faults)


def test_the_load_of_a_run_in_which_the_policy_acts_rises_and_falls_and_processes_are_only_killed() -> None:
    bursts = draw_bursts(3, 300.0, 32)
    assert bursts == draw_bursts(3, 300.0, 32) != draw_bursts(4, 300.0, 32)
    assert [burst.clients for burst in bursts[:4]] == [32, 3, 32, 3]
    assert sum(burst.seconds for burst in bursts) >= 300.0
    faults = draw_faults(3, 1_800, 20, only_kills=True)
    assert {fault.kind for fault in faults} == {KILL}
    assert {fault.target for fault in faults} == {*TARGETS}


def test_resizes_stay_within_the_devices_and_name_replicas_that_are_there() -> None:
    for resize in draw_resizes(1, 10_000, 5):
        body = resize.body([0, 2, 7])
        if body is None:
            assert resize.choice == 3
        elif "remove" in body:
            assert body["remove"][0] in (0, 2, 7)
        else:
            assert 1 <= body["replicas"] <= 5
    assert Resize(1.0, 4, 0.1).body([3]) == {"replicas": 4}  # the last one is not removed


def broken(verdicts: list[Verdict]) -> set[str]:
    return {verdict.promise for verdict in verdicts if verdict.has_held is False}


def seen_with(**changes: Any) -> Seen:
    seen = Seen(0.0, epochs=[1, 2, 3])
    for name, value in changes.items():
        setattr(seen, name, value)
    return seen


@pytest.mark.parametrize(
    ("changes", "tally", "expected"),
    [
        ({}, {}, set()),
        ({}, {"wrong": 1}, {"oracle"}),
        ({}, {"errors": [(5.0, "rank_lost")]}, {"P2 P5 P6 P9"}),
        ({}, {"errors": [(5.0, HUNG)]}, {"P1", "P2 P5 P6 P9"}),
        ({"epochs": [1, 3, 2]}, {}, {"P7"}),
        ({"faults": [(1.0, 9.0, Fault(1, KILL, "pool", 0, 0))]}, {"gaps": [(8.0, 5.5)]}, {"P5 P6"}),
        ({"faults": [(1.0, 9.0, Fault(1, KILL, "pool", 0, 0))]}, {"gaps": [(8.0, 4.5), (9.5, 0.4)]}, set()),
        # It ended after all had recovered, or began before the fault: it was there meanwhile.
        ({"faults": [(1.0, 2.0, Fault(1, KILL, "pool", 0, 0))]}, {"gaps": [(7.5, 5.6)]}, {"P5 P6"}),
        ({"faults": [(4.0, 9.0, Fault(1, KILL, "pool", 0, 0))]}, {"gaps": [(4.1, 5.6)]}, {"P5 P6"}),
        # It began within two seconds of that, or later.
        ({"faults": [(1.0, 2.0, Fault(1, KILL, "pool", 0, 0))]}, {"gaps": [(9.5, 5.6)]}, {"P5 P6"}),
        ({"faults": [(1.0, 2.0, Fault(1, KILL, "pool", 0, 0))]}, {"gaps": [(9.7, 5.6)]}, set()),
        ({"faults": [(1.0, 9.0, Fault(1, STOP, "rank", 9, 0))]}, {"gaps": [(8.0, 5.5)]}, set()),
        ({"stuck": ["x"]}, {}, {"P3"}),
        ({"findings": ["hmm: a block has two owners"]}, {}, {"integrity"}),
        ({"leaks": ["/dev/shm has x"]}, {}, {"P17"}),
        (
            {"faults": [(1.0, 9.0, Fault(1, KILL, "hmm", 0, 0))], "not_recovered": ["kill hmm"]},
            {},
            {"P5 P6 P7 P9"},
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], tally: dict[str, Any], expected: set[str]) -> None:
    assert broken(judge(seen_with(**changes), Tally(good=10, **tally))) == expected


def operation_of(kind: str, outcome: str | None) -> dict[str, Any]:
    return {"op_id": "policy-1-2.000", "by": "policy", "kind": kind, "outcome": outcome}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"sizes": [1, 3, 5]}, {"size and target within 1 to 4"}),
        ({"targets": [1, 0]}, {"size and target within 1 to 4"}),
        ({"operations": [operation_of("scale_up", None)]}, {"every operation of the policy ended"}),
        ({"settled_s": None, "reason": "recovering"}, {"the size was what the policy wants"}),
    ],
)
def test_what_the_policy_did_wrong_is_named(changes: dict[str, Any], expected: set[str]) -> None:
    ended = [operation_of("scale_up", "done"), operation_of("scale_down", "aborted")]
    known = {"sizes": [1, 3, 1], "targets": [3, 1], "operations": ended, "settled_s": 9.0, "reason": "at_min"}
    verdicts = judge(seen_with(acted=Acted(1, 4, **{**known, **changes})), Tally(good=10))
    assert {verdict.what for verdict in verdicts if verdict.has_held is False} == expected


def test_a_pause_counts_whole_wherever_in_it_the_window_ends() -> None:
    """A pool's kill: 31 ms until it had recovered, 2,076 ms until the streams went on."""
    tally = Tally()
    stream, other, failing = tally.begin(), tally.begin(), tally.begin()
    for at in (9.0, 9.9):
        tally.note(stream, at)
    tally.note(other, 9.95)
    tally.note(failing, 9.5)
    killed, recovered = 10.0, 10.031
    assert tally.lasts(recovered)
    assert tally.longest_gap(killed, recovered, 10.1) == pytest.approx(0.6)  # of those that go on
    tally.note(stream, 11.976)
    tally.note(other, 10.02)
    tally.note(other, 12.5)
    assert tally.lasts(recovered)
    tally.end(failing, 12.0, is_whole=False)
    assert not tally.lasts(recovered)
    assert tally.longest_gap(killed, recovered, 99.0) == pytest.approx(2.5)  # up to its error
    assert [round(gap, 3) for at, gap in tally.gaps if at != 12.0] == [0.9, 2.076, 0.07, 2.48]
    tally.end(stream, 13.0, is_whole=True)  # what comes after the last piece is no pause
    assert len(tally.gaps) == 5
    assert tally.longest_gap(12.6, 12.7, 12.8) == pytest.approx(0.3)  # the other one's, that is under way
    tally.end(other, 13.0, is_whole=True)
    assert tally.longest_gap(12.6, 12.7, 12.8) == 0.0


def test_only_a_killed_router_excuses_anything_and_only_broken_connections() -> None:
    router, pool, hmm = (Fault(1, KILL, name, 0, 0) for name in ("router", "pool", "hmm"))

    def fails(fault: Fault, at: float, code: str) -> bool:
        seen = seen_with(faults=[(10.0, 20.0, fault)])
        return bool(broken(judge(seen, Tally(good=1, errors=[(at, code)]))))

    assert not fails(router, 10.1, BROKEN)
    assert fails(router, 10.1, "rank_lost")
    assert fails(router, 9.0, BROKEN)
    assert fails(router, 40.0, BROKEN)
    assert fails(pool, 12.0, "rank_lost")
    assert fails(pool, 12.0, "not_ready")
    assert fails(hmm, 12.0, "rank_lost")


def test_leaks_are_what_is_more_than_before() -> None:
    before = Holdings({"hmm": 100, "pool": 20}, 12, frozenset({"a"}), 1_000_000)
    same = Holdings({"hmm": 100 + FDS_MORE_MAX, "pool": 10}, 12, frozenset(), 1_010_000)
    assert same.leaks_since(before) == []
    more = Holdings({"hmm": 101 + FDS_MORE_MAX}, 13, frozenset({"b"}), 1_100_000)
    assert len(more.leaks_since(before)) == 4


# ---- beside a hostile client -----------------------------------------------------------------------------------------


def abuse_with(**changes: Any) -> Abuse:
    abuse = Abuse(
        Counter({("deep", "400"): 3}),
        before={"router": 90.0, "scaler": 60.0},
        after={"router": 100.0, "scaler": 60.0},
        peaks={"router": 300.0, "scaler": 80.0},
        health=[((), 5.0, 0.01)] * 99,
    )
    for name, value in changes.items():
        setattr(abuse, name, value)
    return abuse


@pytest.mark.parametrize(
    ("changes", "gap", "expected"),
    [
        ({}, 3.0, set()),
        ({"answers": Counter({("deep", "500"): 1})}, 3.0, {"no attack was an internal error"}),
        ({}, 3.1, {"pauses within 3 x of the run alone"}),
        ({"peaks": {"router": 513.0}}, 1.0, {"memory within its limits"}),
        ({"peaks": {"scaler": 257.0}}, 1.0, {"memory within its limits"}),
        ({"after": {"router": 155.0, "scaler": 60.0}}, 1.0, {"memory given back to within 64 MiB"}),
        (
            {"health": [((), 5.0, 0.3)] * 2 + [((), 6.0, 0.01)] * 98},
            1.0,
            {"/health within 200 ms, but for one probe in a hundred"},
        ),
    ],
)
def test_what_a_hostile_client_may_cost(changes: dict[str, Any], gap: float, expected: set[str]) -> None:
    alone, beside = Tally(gaps=[(1.0, 1.0)]), Tally(gaps=[(1.0, gap)])
    verdicts = judge_abuse(abuse_with(**changes), beside, alone)
    assert {verdict.what for verdict in verdicts if verdict.has_held is False} == expected


def test_probes_while_the_router_is_away_do_not_count() -> None:
    abuse = abuse_with(health=[(("deep",), 5.0, 0.3), (("deep", "heavy"), 6.0, 0.1), ((), 9.0, 0.01)])
    assert abuse.slowest_health() == (0.3, ("deep",))
    assert abuse.health_beside(99) == {"deep": 0.3, "heavy": 0.1}
    for windows in ([(5.2, 5.4)], [(4.0, 5.0)], [(5.3, 5.5)], [(1.0, 2.0), (5.1, 5.2)]):
        assert abuse.without(windows).slowest_health() == (0.1, ("deep", "heavy"))
    assert abuse.without([(5.31, 5.9), (0.0, 4.9)]) == abuse


async def test_every_attack_ends_whatever_the_peer_does() -> None:
    """Also where nobody listens, and where whoever listens closes at once."""

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        urls = (f"http://127.0.0.1:{port}", "http://127.0.0.1:1")
        target = Target(*urls, "m", random.Random(1))
        words = await asyncio.gather(*(attack(target) for attack in ATTACKS for _ in range(3)))
    assert set(words) == {CLOSED}
