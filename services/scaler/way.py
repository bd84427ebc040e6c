"""The plan of an operation: the planner's, or two of its plans one after the other where no replica would stay. Pure.

Sequences of replicas that leave go to replicas that serve before the flip and after it. Where all are replaced at once
there are none: the new ones join first then, and the old ones leave in a leg of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from common.layout import Layout
from services.scaler.plan import Memory, Plan, Rates, Sizes, Target
from services.scaler.planner import make_plan


def plan_way(
    layout: Layout,
    target: Target,
    sizes: Sizes,
    memory: Memory,
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
