"""The planner: from a layout and a target to the cheapest transition, with its figures, or a refusal. Pure.

Which replicas join and leave is settled by `replica_assignment.py`, where experts live and what is read from where by
`placement.py`, KV and peaks by `common/capacity.py`. `plan_way` is the way in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from elasticmoe.common.capacity import Capacity, Instants, MemoryForecast, Sizes
from elasticmoe.common.layout import Layout, Seat
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import Unready
from elasticmoe.common.protocol.hmm import RecordCopy
from elasticmoe.common.protocol.scaler import MemoryFacts
from elasticmoe.services.scaler.cluster import Cluster
from elasticmoe.services.scaler.planning.placement import place, spread_common
from elasticmoe.services.scaler.planning.plan import Leg, Plan, Rates, Target
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
    lost = {seat.device for seat in seating.leaving} if target.is_lost else set()
    steps = _steps(layout, seating, sizes, lost)
    instants = Capacity(sizes, memory).instants(layout, [after for after, _ in steps])
    legs = []
    before = layout
    for (after, copies), instant in zip(steps, instants, strict=True):
        legs.append(_leg(before, after, copies, instant, sizes))
        before = after
    if target.is_lost:
        rates = msgspec.structs.replace(rates, copy_bytes_per_s=0.0)  # nobody computes meanwhile
    seconds = sum(_predict(leg, instant, sizes, rates) for leg, instant in zip(legs, instants, strict=True))
    return Plan(
        kind=_kind(seating),
        before=layout,
        legs=tuple(legs),
        experts_moved=sum(copy.key.kind == "expert" for leg in legs for copy in leg.copies),
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


def _steps(layout: Layout, seating: Seating, sizes: Sizes, lost: set[str]) -> list[tuple[Layout, list[RecordCopy]]]:
    """The layouts of the legs, each with what has to be copied to get there; from the checkpoint what only `lost`
    devices held."""
    seats = tuple(sorted((*seating.staying, *seating.joining), key=lambda seat: seat.rank))
    devices = {seat.slot: "" if seat.device in lost else seat.device for seat in (*layout.seats, *seating.joining)}
    homes, experts = place(layout.homes, [seat.slot for seat in seats], sizes.experts, devices)
    final = Layout(layout.epoch + 1, layout.tp, seats, homes)
    if seating.leaving:
        return [(final, [*_common(layout, seating, sizes, experts), *experts])]
    joined = msgspec.structs.replace(final, homes=layout.homes)
    steps = [(joined, _common(layout, seating, sizes, []))]
    if homes != layout.homes:
        steps.append((msgspec.structs.replace(final, epoch=joined.epoch + 1), experts))
    return steps


def _common(layout: Layout, seating: Seating, sizes: Sizes, experts: list[RecordCopy]) -> list[RecordCopy]:
    """Copies of base and layers to the joining seats, from holders of the same tp index, beside those of `experts`."""
    busy: Counter[str] = Counter()
    for copy in experts:
        busy[copy.source] += sizes.of(copy.key)
    holders = sorted(layout.seats, key=lambda seat: seat.slot)
    copies: list[RecordCopy] = []
    for tp in range(layout.tp):
        joiners = [seat.device for seat in seating.joining if seat.rank.tp == tp]
        if joiners:
            sources = [seat.device for seat in holders if seat.rank.tp == tp]
            records = [(RecordKey("base", shard=tp), sizes.base)]
            records += [(RecordKey("layer", layer, shard=tp), nbytes) for layer, nbytes in enumerate(sizes.layers)]
            copies += spread_common(records, sources, joiners, busy)
    return copies


def _leg(before: Layout, after: Layout, copies: list[RecordCopy], instants: Instants, sizes: Sizes) -> Leg:
    return Leg(
        layout=after,
        joining=_without(after.seats, before.seats),
        leaving=_without(before.seats, after.seats),
        copies=tuple(copies),
        kv_handles=instants.kv_handles,
        kv_handles_after=instants.kv_handles_after,
        bytes_copied=sum(sizes.of(copy.key) for copy in copies),
        peak_bytes=instants.peak,
    )


def _without(seats: tuple[Seat, ...], others: tuple[Seat, ...]) -> tuple[Seat, ...]:
    known = set(others)
    return tuple(seat for seat in seats if seat not in known)


def _predict(leg: Leg, instants: Instants, sizes: Sizes, rates: Rates) -> float:
    """Seconds of a leg: clear KV, create handles and copy, let joiners warm up, flip, release, make KV of it. The
    checkpoint counts as one device that is read from."""
    egress: Counter[str] = Counter()
    ingress: Counter[str] = Counter()
    handles: Counter[str] = Counter()
    for copy in leg.copies:
        nbytes = sizes.of(copy.key)
        egress[copy.source] += nbytes
        ingress[copy.target] += nbytes
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


def planned_from(cluster: Cluster) -> tuple[Layout, MemoryFacts, MemoryForecast]:
    """The layout that a plan starts from now, the facts of its memory, and what bounds the plan. Raises Unready while
    the HMM is away, and while nothing is loaded."""
    committed, facts = cluster.in_force.committed, cluster.memory
    if cluster.phase is None:
        raise Unready("the HMM does not answer")
    if cluster.phase != "ready" or facts is None or committed is None:
        raise Unready("the HMM has loaded no model yet")
    used = {seat.device for seat in committed.seats}
    forecast = MemoryForecast(
        budgets={device.device: device.budget for device in cluster.devices},
        footprint=facts.footprint,
        ledger=facts.ledger,
        kv_handle_bytes=facts.kv.handle_bytes,
        kv_handles_min=facts.kv_handles_min,
        kv_handles={
            device.device: device.kv // facts.kv.handle_bytes for device in cluster.devices if device.device in used
        },
        kv_handles_load=facts.kv_handles_load,
        mailbox=facts.mailbox,
    )
    return committed, facts, forecast
