"""The policy in the scaler's loop: windows in, loads shown, decisions told, orders given and gone on with."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest

from elasticmoe.common.config import ScalerConfig
from elasticmoe.common.layout import RankId, Seat
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.codec import Received
from elasticmoe.common.protocol.errors import DoesNotFit, ElasticMoEError, NotFound, Unavailable
from elasticmoe.common.protocol.scaler import MemoryFacts
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow, Signal, StepSample
from elasticmoe.common.sketch import index, value
from elasticmoe.services.scaler.actions import CancelStuck, ScaleTo
from elasticmoe.services.scaler.control.admission import CancelOperation, Later, Order, Running
from elasticmoe.services.scaler.control.autoscaler import (
    DECISIONS_MAX,
    FORGET_S,
    HURRY_S,
    ROUTERS_MAX,
    TELL_AGAIN_S,
    TICK_S,
    Autoscaler,
)
from elasticmoe.services.scaler.observation import Load
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.demand import Demand, demand_of
from elasticmoe.services.scaler.policy.facts import RefusedOrder
from elasticmoe.services.scaler.policy.figures import MISSING, UNKNOWN
from elasticmoe.services.scaler.policy.saturation import Saturation
from elasticmoe.services.scaler.policy.signals import RATE_S
from elasticmoe.services.scaler.policy.state import Decision, Evidence, PolicyState, Reason
from tests.clocks import PlayedClock
from tests.unit.specs import tiny_mixtral_spec
from tests.unit.transitions import UP, World, cluster_of, host_of

SLOW, FAST = index(20.0), index(0.01)
FACTS = MemoryFacts(64, KvGeometry(16, 256, 1024, 4, 256), 1 << 20, 4096, 2, 20)


class Inbox:
    def __init__(self) -> None:
        self.come: deque[tuple[bytes, Received[Signal]]] = deque()
        self.connected: set[bytes] = set()
        self.is_found = True

    def has_path(self) -> bool:
        return self.is_found

    def is_connected(self, peer: bytes) -> bool:
        return peer in self.connected

    def receive(self) -> tuple[bytes, Received[Signal]] | None:
        return self.come.popleft() if self.come else None

    def close(self) -> None:
        self.come.clear()
        self.is_found = True


class Bench:
    """An autoscaler whose scaler is the test: `answer` is what orders meet."""

    def __init__(self, **policy: Any) -> None:
        self.now = 1_000.0
        self.clock = PlayedClock(lambda: self.now)
        self.inbox = Inbox()
        self.orders: list[Order | CancelOperation] = []
        self.answer: Exception | None = None
        self.counted: list[str] = []
        self.told: list[tuple[str, str, dict[str, str]]] = []
        config = ScalerConfig(run_dir="/nowhere")
        self.num_served = 0
        self.is_changing = False
        parts = (config, tiny_mixtral_spec(), self.serve, PolicyConfig(**{"mode": "act", **policy}))
        self.heard: list[RankWindow] = []
        self.scaler = Autoscaler(*parts, self.take, self.tell, self.counted.append, self.heard.append, self.clock)  # type: ignore[arg-type]
        self.world = World(UP.before)
        host = host_of(self.world.seen())
        assert host.hmm is not None
        self.hmm, self.pool = msgspec.structs.replace(host.hmm, memory=FACTS), host.pool
        self.numbers: dict[str, int] = {}

    def serve(self) -> Any:
        self.num_served += 1
        return self.inbox

    def take(self, order: Order | CancelOperation) -> None:
        self.orders.append(order)
        if self.answer is not None:
            raise self.answer

    def tell(self, kind: str, reason: str, /, **facts: str) -> None:
        self.told.append((kind, reason, facts))

    def push(self, window: Signal) -> None:
        self.inbox.come.append((b"", Received(0, "x", 0, window)))

    def router(self, name: str = "router:1", **facts: Any) -> None:
        number = self.numbers[name] = self.numbers.get(name, 0) + 1
        now = self.clock.monotonic()
        known = {"epoch": self.world.layout.epoch, "ended_s": now, "span_s": 1.0, "admitted": 2, "prompt_tokens": 60}
        self.push(RouterWindow(router=name, number=number, **{**known, **facts}))  # type: ignore[arg-type]

    def rank(self, slot: int, tp: int = 0, **facts: Any) -> None:
        incarnation = self.world.ranks[slot]
        number = self.numbers[incarnation] = self.numbers.get(incarnation, 0) + 1
        now = self.clock.monotonic()
        known = {"epoch": self.world.layout.epoch, "ended_s": now, "span_s": 1.0, "kv_total": 1_000, "kv_used": 100}
        rank = RankId(slot - tp, tp)
        self.push(RankWindow(rank=rank, incarnation=incarnation, number=number, **{**known, **facts}))  # type: ignore[arg-type]

    def resize(self, replicas: int) -> None:
        """Another layout comes into force, of the first so many replicas."""
        layout = self.world.layout
        seats = tuple(seat for seat in layout.seats if seat.rank.replica < replicas)
        self.world.layout = msgspec.structs.replace(layout, epoch=layout.epoch + 1, seats=seats)
        self.hmm = msgspec.structs.replace(self.hmm, layout=self.world.layout)

    def load(self) -> Load | None:
        return self.scaler.observe(cluster_of(self.hmm, self.pool), frozenset(), is_changing=self.is_changing)

    def tick(self, *routers: str, ranks: tuple[int, ...] = (0, 1)) -> Load:
        """A second, in which these tell of their load."""
        self.now += TICK_S
        for name in routers:
            self.router(name)
        for slot in ranks:
            self.rank(slot)
        load = self.load()
        assert load is not None
        return load

    def decision(self, reason: Reason, target: int | None = None, *, acts: bool = False) -> Decision:
        op_id = "policy-1" if target else None
        return Decision(target=target, reason=reason, evidence=Evidence(), state=PolicyState(), op_id=op_id, acts=acts)


# ---- what is seen ----------------------------------------------------------------------------------------------------


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


# ---- what is decided -------------------------------------------------------------------------------------------------


def test_a_decision_is_told_when_it_differs_from_the_one_before() -> None:
    bench = Bench()
    for reason, target in (
        (Reason.STEADY, None),
        (Reason.STEADY, None),
        (Reason.GROW_PANIC, 3),
        (Reason.GROW_PANIC, 4),
    ):
        bench.scaler.note(bench.decision(reason, target), 2)
    assert [(reason, facts["target"]) for _, reason, facts in bench.told] == [
        ("steady", "2"),
        ("grow_panic", "3"),
        ("grow_panic", "4"),
    ]
    assert [decided.target for decided in bench.scaler.decided] == [4, 3, None], "newest first"
    assert bench.counted == ["steady", "grow_panic", "grow_panic"]


def test_decisions_that_take_turns_do_not_crowd_out_other_events() -> None:
    bench = Bench(mode="advise")
    for turn in range(240):
        bench.scaler.note(bench.decision(Reason.GROW_PANIC, 3) if turn % 2 else bench.decision(Reason.STEADY), 2)
        assert bench.scaler.decision is not None
        assert bench.scaler.decision.target == (3 if turn % 2 else None), "the last one is shown all the same"
        bench.now += 1.0
    assert len(bench.told) == len(bench.scaler.decided) == 2 * 240 / TELL_AGAIN_S
    assert len(bench.counted) == 240
    bench.scaler.note(bench.decision(Reason.GROW_PANIC, 3, acts=True), 2)
    bench.scaler.note(bench.decision(Reason.GROW_PANIC, 3, acts=True), 2)
    assert len(bench.told) == 10, "what is done is told each time"


def test_the_saturation_is_shown_anew_where_the_decision_stays() -> None:
    bench = Bench()
    for ttft in (0.1, 0.7):
        decision = bench.decision(Reason.STEADY)
        evidence = msgspec.structs.replace(decision.evidence, raw=Saturation(ttft))
        bench.scaler.note(msgspec.structs.replace(decision, evidence=evidence), 2)
    assert len(bench.scaler.decided) == 1
    assert bench.scaler.saturation == Saturation(0.7)
    assert bench.scaler.decision is not None
    assert bench.scaler.decision.evidence.raw == Saturation(0.7), "why it is so now"
    assert bench.scaler.decided[0].evidence.raw == Saturation(0.1), "and what it was told with"


def test_what_is_done_is_told_each_time_and_only_so_many_are_kept() -> None:
    bench = Bench()
    for _ in range(DECISIONS_MAX + 5):
        bench.scaler.note(bench.decision(Reason.REPEAT_ORDER, 3, acts=True), 2)
    assert len(bench.told) == DECISIONS_MAX + 5
    assert len(bench.scaler.decided) == DECISIONS_MAX


def test_an_order_is_one_like_an_operators() -> None:
    bench = Bench()
    bench.scaler.scale(ScaleTo("policy-1", 3, "grow_panic"))
    (order,) = bench.orders
    assert isinstance(order, Order)
    assert order.target is not None
    assert (order.op_id, order.target.replicas, order.request.reason) == ("policy-1", 3, "policy: grow_panic")
    bench.scaler.turn()
    assert len(bench.orders) == 1, "it has been accepted"
    assert bench.tick().accepted == "policy-1"


def test_an_order_waits_for_the_operation_that_gives_way_to_it() -> None:
    bench = Bench()
    bench.answer = Running("operation op is in progress", "op")
    bench.scaler.scale(ScaleTo("policy-1", 3, "supersede_shrink", "op"))
    first, second = bench.orders
    assert first == CancelOperation("op", by="policy")
    assert isinstance(second, Order)
    bench.scaler.turn()
    bench.answer = None
    bench.scaler.turn()
    bench.scaler.turn()
    assert [type(order) for order in bench.orders[2:]] == [Order, Order]
    assert bench.tick().refused is None


def test_an_order_does_not_follow_somebody_elses_operation() -> None:
    """A growth to 3 would make the 5 replicas smaller that an operator has asked for meanwhile."""
    bench = Bench()
    bench.answer = Running("operation op is in progress", "op")
    bench.scaler.scale(ScaleTo("policy-1", 3, "supersede_shrink", "op"))
    bench.answer = Running("operation grow is in progress", "grow")
    bench.scaler.turn()
    num = len(bench.orders)
    bench.answer = None
    bench.scaler.turn()
    assert len(bench.orders) == num
    assert bench.tick().refused is None


def test_a_refused_order_is_told_and_not_repeated() -> None:
    bench = Bench()
    bench.answer = DoesNotFit("host:0 has no room")
    bench.scaler.scale(ScaleTo("policy-1", 3, "grow_panic"))
    assert [(kind, facts["op_id"], facts["code"]) for kind, _, facts in bench.told] == [
        ("policy_refused", "policy-1", "does_not_fit")
    ]
    bench.scaler.turn()
    assert len(bench.orders) == 1
    assert bench.tick().refused == RefusedOrder("policy-1", is_of_size=True)


@pytest.mark.parametrize("error", [None, NotFound("no operation op", code="unknown_operation")])
def test_an_operation_that_cannot_end_is_cancelled(error: ElasticMoEError | None) -> None:
    bench = Bench()
    bench.answer = error
    bench.scaler.cancel(CancelStuck("op"))
    assert bench.orders == [CancelOperation("op", by="policy")]


def test_a_cancel_is_repeated_until_it_is_taken() -> None:
    """An operation that stands because the store is away cannot be cancelled before the store is back."""
    bench = Bench()
    bench.answer = Later(Unavailable("the store does not answer"))
    bench.scaler.cancel(CancelStuck("op"))
    bench.scaler.turn()
    bench.answer = None
    bench.scaler.turn()
    bench.scaler.turn()
    assert bench.orders == [CancelOperation("op", by="policy")] * 3
    bench.answer = Later(Unavailable("the store does not answer"))
    bench.scaler.cancel(CancelStuck("op"))
    bench.scaler.use(PolicyConfig(mode="off"))
    bench.scaler.turn()
    assert len(bench.orders) == 4


def test_another_policy_that_might_have_given_it_leaves_an_order_waiting() -> None:
    """A growth that waits for a shrink to give way came a repetition later, after ten seconds."""
    bench = Bench()
    bench.answer = Running("operation op is in progress", "op")
    bench.scaler.scale(ScaleTo("policy-1", 3, "supersede_shrink", "op"))
    bench.scaler.use(PolicyConfig(mode="act", ttft_s=7.0))
    bench.scaler.turn()
    assert len(bench.orders) == 3
    bench.scaler.use(PolicyConfig(mode="act", replicas_max=2))
    bench.scaler.turn()
    assert len(bench.orders) == 3


def test_an_order_that_the_policy_waits_for_no_more_is_dropped() -> None:
    """There are no more devices for it, say: accepted all the same, it would be nobody's."""
    bench = Bench()
    bench.answer = Running("operation op is in progress", "op")
    bench.scaler.scale(ScaleTo("policy-1", 3, "supersede_shrink", "op"))
    bench.scaler.wait_for("policy-1")
    bench.scaler.turn()
    assert len(bench.orders) == 3
    bench.scaler.wait_for(None)
    bench.scaler.turn()
    assert len(bench.orders) == 3


def test_another_policy_drops_the_order_of_the_one_before() -> None:
    bench = Bench()
    bench.answer = Running("operation op is in progress", "op")
    bench.scaler.scale(ScaleTo("policy-1", 3, "supersede_shrink", "op"))
    bench.scaler.use(PolicyConfig(mode="off"))
    bench.scaler.turn()
    assert len(bench.orders) == 2
