"""What the autoscaler sees: windows of routers and ranks, added up, and who is silent."""

from __future__ import annotations

import msgspec
import pytest

from elasticmoe.common.layout import RankId, Seat
from elasticmoe.common.protocol.signals import StepSample
from elasticmoe.common.sketch import value
from elasticmoe.services.scaler.control.autoscaler import (
    FORGET_S,
    HURRY_S,
    ROUTERS_MAX,
    TICK_S,
)
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand, demand_of
from elasticmoe.services.scaler.policy.figures import MISSING, UNKNOWN
from elasticmoe.services.scaler.policy.signals import RATE_S
from elasticmoe.services.scaler.policy.state import Reason
from tests.unit.autoscaler_bench import FAST, SLOW, Bench
from tests.unit.transitions import cluster_of


def test_a_load_is_shown_once_a_second() -> None:
    bench = Bench()
    assert bench.load() is not None
    assert bench.load() is None
    bench.now += TICK_S - 0.1
    bench.rank(0)
    assert bench.load() is None, "ranks tell at times of their own, and hundreds of them all the time"
    bench.now += 0.1
    assert bench.load() is not None


def test_what_a_router_tells_is_shown_at_once_and_not_more_often_than_it_costs_nothing() -> None:
    bench = Bench()
    bench.tick("router:1")
    bench.now += HURRY_S
    assert bench.load() is None, "nothing is new"
    bench.router("router:1", span_s=HURRY_S, admitted=9)
    load = bench.load()
    assert load is not None
    assert load.signals.burst_per_s == pytest.approx((2 + 9) / (1.0 + HURRY_S))
    bench.now += HURRY_S / 2
    bench.router("router:1", span_s=HURRY_S / 2)
    assert bench.load() is None
    bench.now += HURRY_S / 2
    assert bench.load() is not None


def test_the_pool_says_what_ranks_share() -> None:
    bench = Bench()
    pool = msgspec.structs.replace(bench.pool, cores=6, threads_max=3)
    load = bench.scaler.observe(cluster_of(bench.hmm, pool), frozenset(), is_changing=False)
    assert load is not None
    assert (load.cores, load.threads_max) == (6, 3)


def test_nothing_is_decided_while_it_is_not_known_what_serves() -> None:
    bench = Bench()
    no_memory = msgspec.structs.replace(bench.hmm, memory=None)
    for hmm, pool in ((None, bench.pool), (bench.hmm, None), (no_memory, bench.pool)):
        assert bench.scaler.observe(cluster_of(hmm, pool), frozenset(), is_changing=False) is None


def test_figures_go_on_while_nothing_can_be_decided() -> None:
    """They stood as they were when HMM or pool went away, and so did the decision."""
    bench = Bench()
    bench.tick("router:1")
    bench.scaler.note(bench.decision(Reason.STEADY), 2)
    hmm, bench.hmm = bench.hmm, msgspec.structs.replace(bench.hmm, memory=None)
    for turn in range(5):
        bench.now += TICK_S
        bench.router("router:1", admitted=9)
        assert bench.load() is None
        assert bench.scaler.decision is not None
        assert (bench.scaler.decision.reason is Reason.STEADY) == (turn < 3), "a missed answer is no reason yet"
    assert bench.scaler.signals is not None
    assert bench.scaler.signals.at_s == bench.now
    assert isinstance(bench.scaler.signals.admitted_per_s, float)
    assert bench.scaler.signals.admitted_per_s > 2.0
    assert bench.scaler.decision is not None
    assert bench.scaler.decision.reason is Reason.RECOVERING
    assert [reason for _, reason, _ in bench.told] == ["steady", "recovering"]
    bench.hmm = hmm
    assert bench.tick("router:1") is not None
    off = Bench(mode="off")
    off.scaler.note(off.decision(Reason.OFF), 2)
    off.hmm = msgspec.structs.replace(off.hmm, memory=None)
    off.now += 10 * TICK_S
    assert off.load() is None
    assert off.scaler.decision is not None
    assert off.scaler.decision.reason is Reason.OFF, "it decides nothing anyway"


def test_nothing_is_said_to_be_recovering_before_anything_was_decided() -> None:
    bench = Bench()
    bench.hmm = msgspec.structs.replace(bench.hmm, memory=None)
    for _ in range(3):
        bench.now += TICK_S
        assert bench.load() is None
    assert bench.told == []


def test_steps_beside_an_operation_teach_nothing() -> None:
    """Copies and moves make them longer, for a while: a width would be taken to be slower than it is."""

    def steps(seconds: float) -> tuple[StepSample, ...]:
        return tuple(StepSample(seconds, 10 * at, 100 * at, 1 + at, 100) for at in range(6))

    bench = Bench()
    bench.tick("router:1")
    bench.is_changing = True
    for _ in range(6):
        bench.rank(0, num_steps=6, steps=steps(0.5))
        bench.tick("router:1")
    bench.is_changing = False
    bench.rank(0, num_steps=6, steps=steps(0.5))  # of the second before
    load = bench.tick("router:1")
    assert load.steps == {}
    for _ in range(4):
        bench.rank(0, num_steps=6, steps=steps(0.01))
        load = bench.tick("router:1")
    assert load.steps[2].a == pytest.approx(0.01)


def test_who_can_be_found_no_more_serves_anew_and_hears_on() -> None:
    """A scaler that was stopped as it began did not know that it was superseded, took the windows, and ended."""
    bench = Bench()
    bench.tick("router:1")
    bench.tick("router:1")
    assert bench.num_served == 1
    bench.inbox.is_found = False
    load = bench.tick()
    assert bench.num_served == 2
    load = bench.tick("router:1")
    assert (bench.num_served, load.signals.silent) == (2, ())


def test_what_all_have_told_is_added_up() -> None:
    bench = Bench()
    load = bench.tick("router:1", "router:2")
    assert load.signals.admitted_per_s == 4.0
    assert load.signals.kv_used == 200.0
    assert load.signals.silent == ()
    assert load.devices == tuple(device.device for device in bench.hmm.devices)
    assert load.kv_handle_tokens == 4 * 16


def test_a_rank_that_tells_nothing_leaves_its_share_unknown() -> None:
    bench = Bench()
    for _ in range(8):
        load = bench.tick("router:1", ranks=(0,))
    assert load.signals.kv_used == UNKNOWN
    assert load.signals.silent == ("r1t0",)
    assert load.signals.admitted_per_s == 2.0


def test_of_a_replica_of_several_ranks_the_leader_alone_tells() -> None:
    bench = Bench()
    layout = bench.world.layout
    seats = tuple(Seat(RankId(0, tp), seat.slot, seat.device) for tp, seat in enumerate(layout.seats))
    bench.hmm = msgspec.structs.replace(bench.hmm, layout=msgspec.structs.replace(layout, tp=2, seats=seats))
    for _ in range(8):
        load = bench.tick("router:1", ranks=(0,))
    assert (load.signals.kv_used, load.signals.silent) == (100.0, ())
    for _ in range(8):
        bench.rank(1, 1, kv_total=0, kv_used=0, expert_steps=3, expert_rows=((0, 4),))
        load = bench.tick("router:1", ranks=())
    assert (load.signals.kv_used, load.signals.silent) == (UNKNOWN, ("r0t0",))
    assert [window.expert_rows for window in bench.heard[-8:]] == [((0, 4),)] * 8, "of experts all ranks tell"
    assert not bench.scaler._early


def test_latencies_of_another_size_do_not_speak_for_this_one() -> None:
    """Else whoever has just grown grows again for what was slow before."""
    bench = Bench(settle_s=3.0)
    bench.tick("router:1")
    bench.router("router:1", ttft=((SLOW, 10),), gaps=((SLOW, 10),))
    slow = bench.tick().signals
    assert slow.ttft_s == slow.itl_s == value(SLOW)
    bench.resize(1)
    assert bench.tick("router:1", ranks=(0,)).signals.ttft_s == MISSING
    for _ in range(3):  # a request's first token comes late that has waited since before
        bench.router("router:1", ttft=((SLOW, 1),))
        assert bench.tick(ranks=(0,)).signals.ttft_s == MISSING
    bench.now += TICK_S
    bench.router("router:1", ttft=((FAST, 10),))
    load = bench.load()
    assert load is not None
    assert load.signals.ttft_s == value(FAST)


def test_who_is_refused_is_demand_with_a_prompt_like_those_of_the_others() -> None:
    bench = Bench()
    bench.tick("router:1")  # two, with 30 tokens each
    bench.now += RATE_S
    bench.router("router:1", admitted=2, prompt_tokens=60, refused=6)
    signals = bench.tick().signals
    assert (signals.admitted_per_s, signals.prompt_tokens) == (8.0, pytest.approx(30.0))
    assert signals.refused_per_s == 6.0
    bench.now += RATE_S
    bench.router("router:1", admitted=0, prompt_tokens=0, refused=6)
    signals = bench.tick().signals
    assert (signals.admitted_per_s, signals.prompt_tokens) == (6.0, pytest.approx(30.0)), "though none came in"
    demand = demand_of(signals)
    assert isinstance(demand, Demand)
    assert (demand.requests_per_s, demand.prompt_tokens) == (6.0, pytest.approx(30.0))


def test_who_is_refused_or_fails_has_not_been_served_in_time() -> None:
    bench = Bench()
    bench.tick("router:1")
    bench.router("router:1", finished=2, joint=((FAST, FAST, 1), (SLOW, SLOW, 1)), failed=3, refused=5)
    assert bench.tick().signals.attainment == 0.1
    bench.router("router:1", refused=10)
    assert bench.tick().signals.attainment == 0.05, "though none ends"


def test_ranks_that_have_not_told_of_a_new_layout_are_silent_since_it_is_in_force() -> None:
    """Else a deployment that has served for long would be blind right after each growth."""
    bench = Bench()
    for _ in range(40):
        bench.tick("router:1")
    bench.resize(1)
    seen = bench.tick("router:1", ranks=()).signals
    assert (seen.silent, seen.silent_since_s) == (("r0t0",), seen.at_s)
    bench.tick("router:1", ranks=())
    assert bench.tick("router:1", ranks=()).signals.silent_since_s == seen.at_s


def test_without_any_router_demand_is_unknown() -> None:
    bench = Bench()
    assert bench.tick().signals.admitted_per_s == UNKNOWN


def test_the_only_router_that_falls_silent_stays_expected() -> None:
    bench = Bench()
    bench.tick("router:1")
    for _ in range(int(3 * FORGET_S)):
        load = bench.tick()
    assert load.signals.admitted_per_s == UNKNOWN
    assert load.signals.silent == ("router:1",)


def test_a_router_that_another_one_has_replaced_is_forgotten() -> None:
    bench = Bench()
    bench.tick("router:1")
    told = [bench.tick("router:2").signals for _ in range(int(FORGET_S) + 2)]
    assert UNKNOWN in [one.admitted_per_s for one in told], "it may have been busy and come back"
    assert told[-1].silent == ()
    assert told[-1].admitted_per_s == 2.0


def test_a_router_that_hangs_stays_unknown_whoever_else_is_heard() -> None:
    """It was forgotten after FORGET_S, and its requests counted as none."""
    bench = Bench()
    bench.tick("router:1", "router:2")
    bench.inbox.connected.add(b"router:1")
    for _ in range(int(3 * FORGET_S)):
        signals = bench.tick("router:2").signals
    assert signals.silent == ("router:1",)
    assert signals.admitted_per_s == UNKNOWN
    bench.inbox.connected.clear()  # its process has ended
    signals = bench.tick("router:2").signals
    assert signals.silent == ()
    assert signals.admitted_per_s == 2.0


def test_lost_devices_are_not_counted_on() -> None:
    bench = Bench()
    load = bench.scaler.observe(cluster_of(bench.hmm, bench.pool), frozenset({"host:3"}), is_changing=False)
    assert load is not None
    assert "host:3" not in load.devices


def test_another_policy_is_followed_from_now_on() -> None:
    bench = Bench()
    bench.scaler.use(PolicyConfig(mode="advise", ttft_s=7.0))
    load = bench.tick("router:1")
    assert (load.config.mode, load.config.ttft_s) == ("advise", 7.0)
    assert load.signals.ttft_s == MISSING


def test_made_up_routers_take_no_more_memory() -> None:
    bench = Bench()
    for number in range(ROUTERS_MAX + 50):
        bench.router(f"router:{number}")
    bench.load()
    assert len(bench.scaler._routers) == ROUTERS_MAX


def test_more_windows_than_anybody_sends_take_no_more_memory() -> None:
    bench = Bench()
    bench.load()
    for _ in range(5):
        for _ in range(1_000):
            bench.router()
        bench.load()
    assert len(bench.scaler._early) == 1_000
