"""The planner against an independent model of a host and a reference for the fewest moves."""

from __future__ import annotations

from collections import Counter

import msgspec
import networkx
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.layout import Layout, RankId, Seat, initial_layout
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.services.scaler.planning.placement import spread_common
from elasticmoe.services.scaler.planning.plan import Plan, Target
from elasticmoe.services.scaler.planning.planner import make_plan
from tests.unit.planner_cases import (
    DEVICES,
    KV_HANDLE,
    KV_MIN,
    LEDGER,
    layouts,
    memory_of,
    records_of,
    run_plan,
    sizes,
    targets,
    weights_of,
)

MANY = [f"host:{i}" for i in range(18)]


def fewest_moves(holders: tuple[tuple[int, ...], ...], slots: tuple[int, ...]) -> int:
    """The fewest moves of one layer by maximum flow: expert -> staying holder -> its share, or one of the remainder."""
    quotient, remainder = divmod(len(holders), len(slots))
    graph = networkx.DiGraph()
    graph.add_edge("remainder", "sink", capacity=remainder)
    graph.add_node("source")
    for slot in slots:
        graph.add_edge(("slot", slot), "sink", capacity=quotient)
        graph.add_edge(("slot", slot), "remainder", capacity=1)
    for expert, homes in enumerate(holders):
        graph.add_edge("source", ("expert", expert), capacity=1)
        for slot in set(homes) & set(slots):
            graph.add_edge(("expert", expert), ("slot", slot), capacity=1)
    return len(holders) - int(networkx.maximum_flow_value(graph, "source", "sink"))


def check_placement(before: Layout, after: Layout, plan: Plan) -> None:
    """Counts within one of each other, and the fewest moves, in every layer."""
    moved = Counter(copy.key.layer for leg in plan.legs for copy in leg.copies if copy.key.kind == "expert")
    for layer, holders in enumerate(before.homes):
        held = [len(after.experts_on(slot, layer)) for slot in after.slots]
        assert sum(held) == len(holders)
        assert max(held) - min(held) <= 1
        assert moved[layer] == fewest_moves(holders, after.slots)
    assert plan.experts_moved == sum(moved.values())


def check_legs(plan: Plan, target: Target) -> None:
    """Epochs, seats and homes of each leg."""
    before = plan.before
    for leg in plan.legs:
        leg.layout.check()
        assert leg.layout.epoch == before.epoch + 1
        assert leg.layout.tp == before.tp
        staying = set(before.seats) & set(leg.layout.seats)
        assert set(leg.joining) == set(leg.layout.seats) - staying
        assert set(leg.leaving) == set(before.seats) - staying
        assert not {seat.slot for seat in leg.joining} & set(before.slots)
        before = leg.layout
    if len(plan.legs) == 2:
        assert plan.kind == "scale_up"
        assert plan.legs[0].layout.homes == plan.before.homes
        assert plan.legs[1].joining == plan.legs[1].leaving == plan.legs[0].leaving == ()
    else:
        assert len(plan.legs) == (plan.kind != "none")
    if target.replicas is not None:
        assert plan.after.dp == target.replicas
    if target.devices is not None:
        assert {seat.device for seat in plan.after.seats} == set(target.devices)
    if target.remove is not None:
        gone = {seat.rank.replica for seat in plan.before.seats} - {seat.rank.replica for seat in plan.after.seats}
        assert gone == set(target.remove)


def kv_room(memory: MemoryForecast, device: str, weights: int) -> int:
    """KV handles that belong on a device beside `weights`."""
    wanted = max((memory.footprint - weights) // KV_HANDLE, memory.kv_handles_load)
    return min(wanted, (memory.budgets[device] - LEDGER - weights) // KV_HANDLE)


def check_kv(plan: Plan, sizes: Sizes, memory: MemoryForecast) -> None:
    """KV handles by the formula of the footprint, in every leg: on all devices of a replica those of the one with the
    least room."""

    def partners(device: str, *layouts: Layout) -> set[str]:
        """The devices of its replica."""
        seats = {seat for layout in layouts for seat in layout.seats}
        replica = next(seat.rank.replica for seat in seats if seat.device == device)
        return {seat.device for seat in seats if seat.rank.replica == replica}

    def of(layout: Layout, other: Layout) -> dict[str, int]:
        """Bytes of the union of both layouts by device."""
        left, right = records_of(layout), records_of(other)
        union = {device: left.get(device, set()) | right.get(device, set()) for device in {*left, *right}}
        return {device: sum(sizes.of(key) for key in keys) for device, keys in union.items()}

    now = dict(memory.kv_handles)
    before = plan.before
    for number, leg in enumerate(plan.legs):
        after, union = weights_of(leg.layout, sizes), of(before, leg.layout)
        joining = {seat.device for seat in leg.joining}
        early = joining if number + 1 < len(plan.legs) else set()
        assert leg.kv_handles.keys() == union.keys()
        assert leg.kv_handles_after.keys() == after.keys()
        for device, handles in leg.kv_handles_after.items():
            assert handles >= KV_MIN
            if device not in early:
                assert handles == min(kv_room(memory, each, after[each]) for each in partners(device, leg.layout))
        for device, handles in leg.kv_handles.items():
            if device in joining:
                assert handles == leg.kv_handles_after[device]
            else:
                replica = partners(device, before, leg.layout)
                assert handles == min(min(now[each], kv_room(memory, each, union[each])) for each in replica)
            if device in early:
                final = plan.legs[1].kv_handles_after[device]
                assert handles == min(max(KV_MIN, final // 8), final)
        now, before = leg.kv_handles_after, leg.layout


@given(st.data())
@settings(max_examples=300)
def test_every_plan_keeps_every_rule(data: st.DataObject) -> None:
    model, counts = data.draw(sizes())
    layout = data.draw(layouts(counts, holders_max=data.draw(st.sampled_from([1, 1, 3]))))
    target = data.draw(targets(layout))
    extra = 100 * sum(model.experts) * max(counts)  # room for any placement
    memory = memory_of(layout, model, KV_MIN + extra // KV_HANDLE + 1)
    plan = make_plan(layout, target, model, memory, DEVICES)
    assert plan == make_plan(layout, target, model, memory, DEVICES)
    check_legs(plan, target)
    check_kv(plan, model, memory)
    run_plan(plan, model, memory)
    assert plan.bytes_copied == sum(leg.bytes_copied for leg in plan.legs)
    assert (plan.seconds > 0) == (plan.pause_ms > 0) == bool(plan.legs)
    if plan.kind != "none":
        check_placement(layout, plan.after, plan)


@given(st.data())
@settings(max_examples=300)
def test_tight_memory_is_kept_or_the_plan_is_refused(data: st.DataObject) -> None:
    model, counts = data.draw(sizes())
    layout = data.draw(layouts(counts))
    target = data.draw(targets(layout))
    spare = data.draw(st.integers(KV_MIN, 12))
    memory = memory_of(layout, model, spare, data.draw(st.integers(-20, 40)), data.draw(st.sampled_from([0, spare])))
    start = weights_of(layout, model)
    handles = {
        device: min(count, (memory.budgets[device] - LEDGER - start[device]) // KV_HANDLE)
        for device, count in memory.kv_handles.items()
    }
    memory = msgspec.structs.replace(memory, kv_handles={device: max(0, count) for device, count in handles.items()})
    if min(handles.values()) < KV_MIN:
        return
    generous = msgspec.structs.replace(memory, footprint=1 << 40, budgets=dict.fromkeys(DEVICES, 1 << 41))
    try:
        plan = make_plan(layout, target, model, memory, DEVICES)
    except DoesNotFit:
        free = make_plan(layout, target, model, generous, DEVICES)
        staged = [
            (device, sum(model.of(key) for key in keys))
            for before, after in zip([layout, *(leg.layout for leg in free.legs)], [leg.layout for leg in free.legs])  # noqa: B905
            for device, keys in union(before, after).items()
            if device in records_of(after)
        ]
        assert any(kv_room(memory, device, nbytes) < KV_MIN for device, nbytes in staged)
        return
    check_kv(plan, model, memory)
    run_plan(plan, model, memory)


def union(before: Layout, after: Layout) -> dict[str, set[RecordKey]]:
    """Records by device of two layouts together."""
    left, right = records_of(before), records_of(after)
    return {device: left.get(device, set()) | right.get(device, set()) for device in {*left, *right}}


@given(st.data())
@settings(max_examples=100)
def test_up_and_down_again_keeps_every_rule(data: st.DataObject) -> None:
    model, counts = data.draw(sizes())
    size = data.draw(st.integers(1, 5))
    layout = initial_layout(counts, DEVICES[:size])
    spare = KV_MIN + 100 * sum(model.experts) * max(counts) // KV_HANDLE + 1
    memory = memory_of(layout, model, spare)
    for _ in range(4):
        replicas = sorted({seat.rank.replica for seat in layout.seats})
        gone = data.draw(st.lists(st.sampled_from(replicas), max_size=len(replicas) - 1, unique=True))
        more = Target(replicas=data.draw(st.integers(1, len(DEVICES))))
        target = data.draw(st.sampled_from([more, Target(remove=tuple(gone))]))
        plan = make_plan(layout, target, model, memory, DEVICES)
        check_legs(plan, target)
        check_kv(plan, model, memory)
        host = run_plan(plan, model, memory)
        if plan.kind != "none":
            check_placement(layout, plan.after, plan)
        assert max(plan.after.slots) < len(DEVICES)
        layout = plan.after
        memory = msgspec.structs.replace(
            memory, kv_handles={seat.device: host.kv[seat.device] for seat in layout.seats}
        )


@given(st.integers(2, 8), st.sampled_from([5, 8, 12, 16]), st.integers(1, 8), st.integers(1, 12))
def test_totals_over_the_layers_are_even_where_the_choice_is_free(old: int, count: int, new: int, layers: int) -> None:
    counts = [count] * layers
    model = Sizes(1, (1,) * layers, (10,) * layers)
    layout = initial_layout(counts, DEVICES[:1])
    memory = memory_of(layout, model, 10_000)
    layout = make_plan(layout, Target(replicas=old), model, memory, DEVICES).after
    held = [layout.num_experts_on(slot) for slot in layout.slots]
    # One device had all: it carries a remainder in every layer that has one, the others share the rest evenly.
    assert max(held[1:]) - min(held[1:]) <= 1


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_common_records_are_read_evenly_from_all_holders(sources: int, joiners: int, nbytes: list[int]) -> None:
    records = [(RecordKey("layer", layer), size) for layer, size in enumerate(nbytes)]
    holders, targets = MANY[:sources], MANY[sources : sources + joiners]
    copies = spread_common(records, holders, targets, {})
    assert Counter((copy.key, copy.target) for copy in copies) == {
        (key, target): 1 for key, _ in records for target in targets
    }
    given_by = Counter(dict.fromkeys(holders, 0))
    for copy in copies:
        given_by[copy.source] += nbytes[copy.key.layer]
    assert max(given_by.values()) - min(given_by.values()) <= 2 * max(nbytes)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_no_link_is_hot(sources: int, joiners: int, layers: int) -> None:
    records = [(RecordKey("layer", layer), 1) for layer in range(layers)]
    copies = spread_common(records, MANY[:sources], MANY[sources : sources + joiners], {})
    links = Counter((copy.source, copy.target) for copy in copies)
    assert max(links.values()) <= -(-layers // sources) + 1


def test_seats_of_tensor_parallel_joiners_read_from_their_own_share() -> None:
    seats = tuple(Seat(RankId(i // 2, i % 2), i, DEVICES[i]) for i in range(4))
    layout = Layout(1, 2, seats, (((0,), (1,), (2,), (3,), (0,), (1,)),))
    model = Sizes(5, (3,), (10,))
    plan = make_plan(layout, Target(replicas=3), model, memory_of(layout, model, 50), DEVICES)
    share = {seat.device: seat.rank.tp for seat in plan.after.seats}
    for copy in plan.legs[0].copies:
        assert share[copy.source] == share[copy.target]
    assert [str(seat.rank) for seat in plan.legs[0].joining] == ["r2t0", "r2t1"]
