"""The planner's rules by example, and its refusals."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from elasticmoe.common.capacity import MemoryForecast, Sizes, sizes_of
from elasticmoe.common.families import records
from elasticmoe.common.layout import Layout, RankId, Seat, initial_layout
from elasticmoe.common.model_spec import RecordKey, round_up
from elasticmoe.common.protocol.errors import DoesNotFit, ElasticMoEError, InvalidRequest, NotFound
from elasticmoe.services.scaler.planning.plan import Plan, Rates, Target
from elasticmoe.services.scaler.planning.planner import make_plan
from tests.unit.planner_cases import DEVICES, KV_HANDLE, LEDGER, memory_of, run_plan
from tests.unit.specs import tiny_mixtral_spec, tiny_qwen3_spec

SIZES = Sizes(base=50, layers=(20, 30, 20), experts=(10, 0, 10))
COUNTS = (8, 0, 8)


def plan_for(layout: Layout, target: Target, spare: int = 40, sizes: Sizes = SIZES) -> Plan:
    """A plan with enough memory, run once on the model of a host."""
    memory = memory_of(layout, sizes, spare)
    plan = make_plan(layout, target, sizes, memory, DEVICES)
    run_plan(plan, sizes, memory)
    return plan


def on(*numbers: int) -> Layout:
    """A layout on the devices of these numbers."""
    return initial_layout(COUNTS, [DEVICES[number] for number in numbers])


@pytest.mark.parametrize("spec", [tiny_mixtral_spec(), tiny_qwen3_spec()], ids=["mixtral", "qwen3"])
def test_sizes_are_those_of_the_page_handles(spec) -> None:  # type: ignore[no-untyped-def]
    sizes = sizes_of(spec, 4096)
    for record in records(spec):
        assert sizes.of(record.key) == round_up(record.nbytes, 4096)
    assert [nbytes > 0 for nbytes in sizes.experts] == [count > 0 for count in spec.num_experts_by_layer]
    assert sizes.common == sizes.of(RecordKey("base")) + sum(sizes.layers)


def test_scaling_up_serves_first_and_moves_experts_then() -> None:
    plan = plan_for(on(0, 1, 2), Target(replicas=4))
    assert plan.kind == "scale_up"
    first, second = plan.legs
    assert first.joining == (Seat(RankId(3, 0), 3, "host:3"),)
    assert first.layout.homes == plan.before.homes
    assert first.layout.num_experts_on(3) == 0
    assert {copy.key.kind for copy in first.copies} == {"base", "layer"}
    assert {copy.key.kind for copy in second.copies} == {"expert"}
    assert plan.experts_moved == 4
    assert plan.bytes_copied == 50 + 70 + 40
    assert [leg.layout.epoch for leg in plan.legs] == [2, 3]
    assert plan.after.num_experts_on(3) == 4
    assert first.kv_handles["host:3"] == first.kv_handles_after["host:3"] == second.kv_handles["host:3"]
    assert second.kv_handles_after["host:3"] > 8 * second.kv_handles["host:3"] - 8


def test_four_to_six_devices_move_twenty_of_64_experts() -> None:
    sizes = Sizes(1, (1,), (10,))
    plan = plan_for(initial_layout([64], DEVICES[:4]), Target(replicas=6), sizes=sizes)
    assert plan.experts_moved == 20
    taken = Counter(copy.source for copy in plan.legs[1].copies)
    assert sorted(taken.values()) == [5, 5, 5, 5]
    links = Counter((copy.source, copy.target) for copy in plan.legs[1].copies)
    assert max(links.values()) == 3


def test_nothing_moves_where_experts_are_fewer_than_devices() -> None:
    sizes = Sizes(1, (1, 1), (10, 10))
    plan = plan_for(initial_layout([3, 3], DEVICES[:4]), Target(replicas=6), sizes=sizes)
    assert len(plan.legs) == 1
    assert plan.experts_moved == 0
    assert plan.after.homes == plan.before.homes


def test_any_replica_may_leave_and_gives_what_it_holds() -> None:
    plan = plan_for(on(0, 1, 2, 3), Target(remove=(1,)))
    (leg,) = plan.legs
    assert plan.kind == "scale_down"
    assert leg.leaving == (Seat(RankId(1, 0), 1, "host:1"),)
    assert leg.joining == ()
    assert {copy.source for copy in leg.copies} == {"host:1"}
    assert plan.experts_moved == 4
    assert plan.after.slots == (0, 2, 3)
    again = plan_for(plan.after, Target(replicas=4))
    assert again.legs[0].joining == (Seat(RankId(1, 0), 1, "host:1"),), "the lowest numbers that are free"


def test_what_a_lost_device_held_comes_from_the_checkpoint() -> None:
    plain = plan_for(on(0, 1, 2), Target(remove=(1,)))
    lost = plan_for(on(0, 1, 2), Target(remove=(1,), is_lost=True))
    assert (lost.after, lost.bytes_copied, lost.kind) == (plain.after, plain.bytes_copied, "scale_down")
    sources = {copy.source for leg in plain.legs for copy in leg.copies}
    assert "host:1" in sources
    assert {copy.source for leg in lost.legs for copy in leg.copies} == {"" if s == "host:1" else s for s in sources}
    assert lost.legs[0].kv_handles["host:1"] == plain.legs[0].kv_handles["host:1"]


def test_fewer_replicas_remove_the_highest_numbers() -> None:
    plan = plan_for(on(0, 1, 2, 3), Target(replicas=2))
    assert [seat.rank.replica for seat in plan.legs[0].leaving] == [2, 3]


def test_replacing_a_device_reads_from_the_one_that_leaves_too() -> None:
    plan = plan_for(on(0, 1), Target(devices=("host:1", "host:5")))
    (leg,) = plan.legs
    assert plan.kind == "replace"
    assert leg.joining == (Seat(RankId(2, 0), 2, "host:5"),)
    assert leg.leaving == (Seat(RankId(0, 0), 0, "host:0"),)
    given = Counter({device: 0 for device in ("host:0", "host:1")})
    for copy in leg.copies:
        given[copy.source] += SIZES.of(copy.key)
    assert sum(given.values()) == 200
    assert abs(given["host:0"] - given["host:1"]) <= 20, "experts have one source; the rest evens them out"


def test_an_expert_with_several_homes_keeps_the_one_that_saves_moves() -> None:
    seats = tuple(Seat(RankId(i, 0), i, DEVICES[i]) for i in range(4))
    layout = Layout(1, 1, seats, (((0, 1), (0, 1), (0,), (0,), (2,), (2,)), (), ((2,), (2,), (3,), (3,), (1,), (1,))))
    plan = plan_for(layout, Target(replicas=4))
    assert plan.kind == "none", "the same devices are no reason to move"
    plan = plan_for(layout, Target(remove=(3,)))
    assert plan.after.homes[0] == ((1,), (1,), (0,), (0,), (2,), (2,)), "what others hold makes room for the rest"
    assert plan.experts_moved == 2


def test_a_target_that_is_reached_already_needs_no_leg() -> None:
    layout = on(0, 1)
    for target in (Target(replicas=2), Target(devices=("host:1", "host:0")), Target(remove=())):
        plan = plan_for(layout, target)
        assert (plan.kind, plan.legs, plan.bytes_copied, plan.seconds) == ("none", (), 0, 0.0)
        assert plan.peak_bytes == plan.bytes_before == plan.bytes_after > 0
        assert plan.after == layout


@pytest.mark.parametrize(
    ("target", "kind", "code", "text"),
    [
        (Target(), InvalidRequest, "invalid_target", "exactly one of replicas, devices and remove; it has 0"),
        (Target(replicas=1, remove=(0,)), InvalidRequest, "invalid_target", "it has 2"),
        (Target(replicas=-1), InvalidRequest, "invalid_target", "at least 1, is -1"),
        (Target(replicas=0), InvalidRequest, "last_replica", "at least 1 replica must stay"),
        (Target(remove=(0, 1)), InvalidRequest, "last_replica", "at least 1 replica must stay"),
        (Target(devices=()), InvalidRequest, "last_replica", "at least 1 replica must stay"),
        (
            Target(replicas=11),
            InvalidRequest,
            "too_few_devices",
            "need 9 more than the 2 in use, and 8 are free: take 10",
        ),
        (Target(remove=(0, 0)), InvalidRequest, "invalid_target", "the 2 replicas to remove are only 1"),
        (Target(remove=(7,)), NotFound, "unknown_replica", "replica 7 is not one of the 2 replicas: r0, r1"),
        (
            Target(devices=("host:0", "host:99")),
            NotFound,
            "unknown_device",
            "host:99 is not one of the 10 devices: host:0, host:1",
        ),
        (Target(devices=("host:0", "host:0")), InvalidRequest, "invalid_target", "only 1 different"),
    ],
)
def test_impossible_targets_are_refused(target: Target, kind: type[ElasticMoEError], code: str, text: str) -> None:
    layout = on(0, 1)
    with pytest.raises(kind, match=text) as refusal:
        make_plan(layout, target, SIZES, memory_of(layout, SIZES, 40), DEVICES)
    assert refusal.value.code == code


def test_replicas_of_several_devices_join_and_leave_whole() -> None:
    layout = initial_layout(COUNTS, DEVICES[:4], tp=2)
    memory = memory_of(layout, SIZES, 40)
    plan = make_plan(layout, Target(replicas=3), SIZES, memory, DEVICES)
    assert [(str(seat.rank), seat.device) for seat in plan.legs[0].joining] == [("r2t0", "host:4"), ("r2t1", "host:5")]
    for target, text in (
        (Target(devices=("host:0", "host:1", "host:2")), "3 devices: no whole replicas of tp=2"),
        (Target(devices=("host:0", "host:1", "host:2", "host:5")), "replica 1 would keep only some of its 2 devices"),
    ):
        with pytest.raises(InvalidRequest, match=text) as refusal:
            make_plan(layout, target, SIZES, memory, DEVICES)
        assert refusal.value.code == "invalid_target"
    with pytest.raises(
        InvalidRequest,
        match="6 replicas of 2 devices need 8 more than the 4 in use, and 6 are free: take 5 replicas at most",
    ):
        make_plan(layout, Target(replicas=6), SIZES, memory, DEVICES)


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    layout = on(0, 1)
    memory = memory_of(layout, SIZES, 3)  # 200 bytes of weights and 3 KV handles of 16
    text = "after the release: of the budget of 1.23 KiB, weights take 280 B and the ledger 7 B; 0 KV handles of 16 B"
    with pytest.raises(DoesNotFit, match=text) as refusal:
        make_plan(layout, Target(replicas=1), SIZES, memory, DEVICES)
    assert refusal.value.code == "does_not_fit"
    small = msgspec.structs.replace(memory, budgets=memory.budgets | {"host:2": 180})
    with pytest.raises(DoesNotFit, match=r"host:2 .* the budget of 180"):
        make_plan(layout, Target(replicas=3), SIZES, small, DEVICES)
    budgets = {device: budget for device, budget in memory.budgets.items() if device != "host:2"}
    known = msgspec.structs.replace(memory, budgets=budgets)
    with pytest.raises(NotFound, match="host:2") as unknown:
        make_plan(layout, Target(replicas=3), SIZES, known, DEVICES)
    assert unknown.value.code == "unknown_device"


def test_experts_that_leave_become_kv_and_kv_makes_room_for_experts() -> None:
    layout = on(0, 1)
    memory = memory_of(layout, SIZES, 20)
    up = make_plan(layout, Target(replicas=4), SIZES, memory, DEVICES)
    gained = up.legs[-1].kv_handles_after["host:0"] - 20
    assert gained == 40 // KV_HANDLE, "4 of 8 experts left"
    after = MemoryForecast(
        memory.budgets, memory.footprint, LEDGER, KV_HANDLE, memory.kv_handles_min, up.legs[-1].kv_handles_after
    )
    down = make_plan(up.after, Target(replicas=2), SIZES, after, DEVICES)
    assert down.legs[0].kv_handles["host:0"] == down.legs[0].kv_handles_after["host:0"] == 20
    assert down.legs[0].kv_handles["host:3"] == after.kv_handles["host:3"], "a leaving device keeps its KV"
    run_plan(down, SIZES, after)


def test_predictions_follow_the_rates() -> None:
    layout = on(0, 1)
    memory = memory_of(layout, SIZES, 40)
    slow, fast = (
        make_plan(layout, Target(replicas=3), SIZES, memory, DEVICES, Rates(link_bytes_per_s=rate, step_s=0.01))
        for rate in (10, 1e9)
    )
    assert slow.seconds > fast.seconds + 10
    assert slow.legs == fast.legs
    assert slow.pause_ms == 20
    limited = make_plan(
        layout, Target(replicas=3), SIZES, memory, DEVICES, Rates(link_bytes_per_s=1e9, copy_bytes_per_s=10)
    )
    assert slow.seconds > limited.seconds > fast.seconds + 3, "of those that get experts, not of those that join"
    shrunk, lost = (
        make_plan(layout, Target(remove=(1,), is_lost=is_lost), SIZES, memory, DEVICES, Rates(copy_bytes_per_s=10))
        for is_lost in (False, True)
    )
    assert shrunk.seconds > lost.seconds + 1, "nobody computes meanwhile, so nobody is spared"


def test_sizes_of_another_model_are_a_programming_error() -> None:
    layout = on(0, 1)
    with pytest.raises(ValueError, match="not of the same model"):
        make_plan(layout, Target(replicas=1), Sizes(1, (1,), (1,)), memory_of(layout, SIZES, 40), DEVICES)


def test_384_devices_are_planned_without_a_limit_of_slots() -> None:
    counts = [0] * 3 + [256] * 58
    devices = [f"device:{i}" for i in range(384)]
    sizes = Sizes(100, (10,) * 61, tuple(5 if count else 0 for count in counts))
    layout = initial_layout(counts, devices[:320], slots_max=384)
    memory = MemoryForecast(dict.fromkeys(devices, 10_000), 5_000, 1, 10, 4, dict.fromkeys(devices[:320], 10))
    plan = make_plan(layout, Target(replicas=384), sizes, memory, devices)
    plan.after.check(384)
    assert plan.after.dp == 384
