"""The planner: from a layout and a target to the cheapest transition, with its figures, or a refusal. Pure.

Which replicas join and leave is settled by `replica_assignment.py`, where experts live and what is read from where by
`placement.py`, KV and peaks by `capacity.py`. `plan_way` is the way in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import msgspec

from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.hmm import RecordCopy
from elasticmoe.services.scaler.planning.capacity import Capacity, Instants
from elasticmoe.services.scaler.planning.placement import Move, place, spread_common
from elasticmoe.services.scaler.planning.plan import Leg, MemoryForecast, Plan, Rates, Sizes, Target
from elasticmoe.services.scaler.planning.replica_assignment import Seating, reseat

_DEFAULT_RATES = Rates()


def make_plan(
    layout: Layout,
    target: Target,
    sizes: Sizes,
    memory: MemoryForecast,
    devices: Sequence[str],
    rates: Rates = _DEFAULT_RATES,
) -> Plan:
    """Plan the way from `layout` to `target`; `devices` are all of the host, in the order in which joiners take them.

    Deterministic; slots and replica numbers are not bounded here, but joiners take the lowest that are free, so they
    stay below the number of devices.

    Raises InvalidRequest (`invalid_target`, `too_few_devices`, `last_replica`),
    NotFound (`unknown_replica`, `unknown_device`) and DoesNotFit (`does_not_fit`), each with the figures.
    """
    seating = reseat(layout, target, devices)
    if tuple(len(experts) > 0 for experts in layout.homes) != tuple(nbytes > 0 for nbytes in sizes.experts):
        raise ValueError("sizes and layout are not of the same model")
    if not seating.joining and not seating.leaving:
        held = Capacity(sizes, memory).held(layout, memory.kv_handles)
        total = sum(held.values())
        return Plan("none", layout, (), 0, 0, total, total, total, 0.0, 0.0)
    steps = _steps(layout, seating, sizes)
    capacity = Capacity(sizes, memory)
    instants = capacity.instants(layout, steps)
    legs = []
    lost = {seat.device for seat in seating.leaving} if target.is_lost else set()
    before = layout
    for (after, moves), instant in zip(steps, instants, strict=True):
        legs.append(_leg(before, after, moves, instant, lost))
        before = after
    if target.is_lost:
        rates = msgspec.structs.replace(rates, copy_bytes_per_s=0.0)  # nobody computes meanwhile
    seconds = sum(
        _predict(leg, moves, instant, rates) for leg, (_, moves), instant in zip(legs, steps, instants, strict=True)
    )
    return Plan(
        kind=_kind(seating),
        before=layout,
        legs=tuple(legs),
        experts_moved=sum(move.key.kind == "expert" for _, moves in steps for move in moves),
        bytes_copied=sum(leg.bytes_copied for leg in legs),
        peak_bytes=max(instant.peak_total for instant in instants),
        bytes_before=sum(instants[0].start.values()),
        bytes_after=sum(instants[-1].released.values()),
        seconds=seconds,
        pause_ms=2e3 * rates.step_s,  # the step that the flip puts off, and the one that computes in its stead
    )


def plan_way(
    layout: Layout,
    target: Target,
    sizes: Sizes,
    memory: MemoryForecast,
    devices: Sequence[str],
    rates: Rates,
) -> Plan:
    """Plan the way from `layout` to `target`, as make_plan does, and raises what that raises."""
    plan = make_plan(layout, target, sizes, memory, devices, rates)
    after = {seat.device for seat in plan.after.seats}
    before = {seat.device for seat in layout.seats}
    if not after.isdisjoint(before):
        return plan
    both = tuple(device for device in devices if device in after | before)
    first = make_plan(layout, Target(devices=both), sizes, memory, devices, rates)
    between = msgspec.structs.replace(memory, kv_handles=first.legs[-1].kv_handles_after)
    wanted = tuple(device for device in devices if device in after)
    second = make_plan(first.after, Target(devices=wanted), sizes, between, devices, rates)
    return Plan(
        kind="replace",
        before=layout,
        legs=(*first.legs, *second.legs),
        experts_moved=first.experts_moved + second.experts_moved,
        bytes_copied=first.bytes_copied + second.bytes_copied,
        peak_bytes=max(first.peak_bytes, second.peak_bytes),
        bytes_before=first.bytes_before,
        bytes_after=second.bytes_after,
        seconds=first.seconds + second.seconds,
        pause_ms=max(first.pause_ms, second.pause_ms),
    )


def _kind(seating: Seating) -> Literal["scale_up", "scale_down", "replace"]:
    if len(seating.joining) == len(seating.leaving):
        return "replace"
    return "scale_up" if len(seating.joining) > len(seating.leaving) else "scale_down"


def _steps(layout: Layout, seating: Seating, sizes: Sizes) -> list[tuple[Layout, list[Move]]]:
    """The layouts of the legs, each with what has to move to get there."""
    seats = tuple(sorted((*seating.staying, *seating.joining), key=lambda seat: seat.rank))
    homes, experts = place(layout.homes, [seat.slot for seat in seats], sizes.experts)
    final = Layout(layout.epoch + 1, layout.tp, seats, homes)
    if seating.leaving:
        return [(final, [*_common(layout, seating, sizes, experts), *experts])]
    joined = msgspec.structs.replace(final, homes=layout.homes)
    steps = [(joined, _common(layout, seating, sizes, []))]
    if homes != layout.homes:
        steps.append((msgspec.structs.replace(final, epoch=joined.epoch + 1), experts))
    return steps


def _common(layout: Layout, seating: Seating, sizes: Sizes, busy: list[Move]) -> list[Move]:
    """Copies of base and layers to the joining seats, from holders of the same tp index."""
    records = [(RecordKey("base"), sizes.base)]
    records += [(RecordKey("layer", layer), nbytes) for layer, nbytes in enumerate(sizes.layers)]
    moves: list[Move] = []
    for tp in range(layout.tp):
        joiners = [seat.slot for seat in seating.joining if seat.rank.tp == tp]
        if joiners:
            sources = [seat.slot for seat in layout.seats if seat.rank.tp == tp]
            moves += spread_common(records, sources, joiners, busy)
    return moves


def _leg(before: Layout, after: Layout, moves: list[Move], instants: Instants, lost: set[str]) -> Leg:
    device = {seat.slot: seat.device for seat in (*before.seats, *after.seats)}
    source = {slot: "" if name in lost else name for slot, name in device.items()}
    return Leg(
        layout=after,
        joining=_without(after.seats, before.seats),
        leaving=_without(before.seats, after.seats),
        copies=tuple(RecordCopy(move.key, source[move.source], device[move.target]) for move in moves),
        kv_handles=instants.kv_handles,
        kv_handles_after=instants.kv_handles_after,
        bytes_copied=sum(move.nbytes for move in moves),
        peak_bytes=instants.peak,
    )


def _without(seats: tuple[Seat, ...], others: tuple[Seat, ...]) -> tuple[Seat, ...]:
    known = set(others)
    return tuple(seat for seat in seats if seat not in known)


def _predict(leg: Leg, moves: list[Move], instants: Instants, rates: Rates) -> float:
    """Seconds of a leg: clear KV, create handles and copy, let joiners warm up, flip, release, make KV of it."""
    egress: defaultdict[int, int] = defaultdict(int)
    ingress: defaultdict[int, int] = defaultdict(int)
    handles: Counter[str] = Counter()
    for move, copy in zip(moves, leg.copies, strict=True):
        egress[move.source] += move.nbytes
        ingress[move.target] += move.nbytes
        handles[copy.target] += 1
    for seat in leg.joining:
        handles[seat.device] += leg.kv_handles[seat.device]
    copying = max((*egress.values(), *ingress.values()), default=0) / rates.link_bytes_per_s
    if rates.copy_bytes_per_s and not leg.joining:
        copying = max(copying, leg.bytes_copied / rates.copy_bytes_per_s)
    grown = max(handles - leg.kv_handles[device] for device, handles in leg.kv_handles_after.items())
    seconds = copying + (max(handles.values(), default=0) + max(0, grown)) * rates.handle_s
    steps = 3 + instants.vacates  # staying ranks map between steps, flip, unmap between steps
    return seconds + steps * rates.step_s + (rates.warm_up_s if leg.joining else 0.0)
