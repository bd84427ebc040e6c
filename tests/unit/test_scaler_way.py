"""The plan of an operation where no replica stays: the new ones join first, then the old ones leave."""

from __future__ import annotations

from elasticmoe.common.capacity import MemoryForecast, Sizes
from elasticmoe.common.layout import initial_layout
from elasticmoe.services.scaler.planning.plan import Rates, Target
from elasticmoe.services.scaler.planning.planner import plan_way

SIZES = Sizes(100, (10,), (7,))
DEVICES = tuple(f"host:{i}" for i in range(4))
LAYOUT = initial_layout([4], DEVICES[:2])
MEMORY = MemoryForecast(dict.fromkeys(DEVICES, 10_000), 1_000, 10, 50, 2, dict.fromkeys(DEVICES[:2], 17))


def test_every_leg_has_replicas_that_stay() -> None:
    plan = plan_way(LAYOUT, Target(devices=DEVICES[2:]), SIZES, MEMORY, DEVICES, Rates())
    assert {seat.device for seat in plan.after.seats} == set(DEVICES[2:])
    assert (plan.kind, plan.before, plan.bytes_copied) == (
        "replace",
        LAYOUT,
        sum(leg.bytes_copied for leg in plan.legs),
    )
    layout = LAYOUT
    for leg in plan.legs:
        assert leg.layout.epoch == layout.epoch + 1
        assert {seat.device for seat in layout.seats} & {seat.device for seat in leg.layout.seats}
        layout = leg.layout


def test_other_plans_are_the_planners_own() -> None:
    plan = plan_way(LAYOUT, Target(replicas=3), SIZES, MEMORY, DEVICES, Rates())
    assert (plan.kind, plan.after.dp) == ("scale_up", 3)
