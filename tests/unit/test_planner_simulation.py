"""The benchmark's simulation: links are shared, budgets are kept, the end is what was planned."""

from __future__ import annotations

import msgspec
import pytest

from elasticmoe.cli.bench.plan import DEEPSEEK_V2_LITE, DEEPSEEK_V3, kv_handle_bytes, memory_for, sizes_of_geometry
from elasticmoe.cli.bench.plan_simulation import Assumptions, Links, simulate
from elasticmoe.common.capacity import Sizes
from elasticmoe.common.layout import initial_layout
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.hmm import RecordCopy
from elasticmoe.services.scaler.planning.plan import Leg, Target
from elasticmoe.services.scaler.planning.planner import make_plan

DEVICES = [f"device:{i}" for i in range(4)]
MACHINE = Assumptions(link_bytes_per_s=100.0, share=0.1, handle_s=0.0, warm_up_s=0.0, step_s=0.0)


def leg_of(*copies: tuple[str, str]) -> Leg:
    """A leg that copies a layer on each of these links; device:3 joins."""
    seat = initial_layout([0], DEVICES).seats[3]
    records = tuple(RecordCopy(RecordKey("layer", 0), source, target) for source, target in copies)
    return Leg(initial_layout([0], DEVICES), (seat,), (), records, {}, {}, 0, {})


@pytest.mark.parametrize(
    ("copies", "seconds"),
    [
        ([], 0.0),
        ([("device:0", "device:1")], 3.0),
        ([("device:0", "device:1"), ("device:0", "device:2")], 6.0),
        ([("device:0", "device:1"), ("device:2", "device:1")], 6.0),
        ([("device:0", "device:1"), ("device:1", "device:0")], 3.0),
        ([("device:0", "device:3"), ("device:0", "device:3"), ("device:0", "device:1")], 9.0),
    ],
)
def test_links_are_shared(copies: list[tuple[str, str]], seconds: float) -> None:
    assert Links(leg_of(*copies), Sizes(1, (30,), (0,)), MACHINE).run() == pytest.approx(seconds)


def test_the_sizes_are_those_of_the_published_models() -> None:
    for model, billions, padding in ((DEEPSEEK_V3, 671, 1.0), (DEEPSEEK_V2_LITE, 15.7, 18 / 16.5)):
        sizes = sizes_of_geometry(model, "bf16")
        total = sizes.common + sum(nbytes * count for nbytes, count in zip(sizes.experts, model.counts, strict=True))
        assert total / 2e9 == pytest.approx(billions * padding, rel=0.01)


@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 3)])
def test_a_plan_is_simulated_within_its_budgets(before: int, after: int) -> None:
    model, budget = DEEPSEEK_V2_LITE, 40 << 30
    sizes = sizes_of_geometry(model, "bf16")
    layout = initial_layout(model.counts, DEVICES[:before])
    memory = memory_for(model, layout, sizes, DEVICES, budget)
    assert memory.footprint <= budget < memory.footprint + memory.ledger + kv_handle_bytes(model)
    plan = make_plan(layout, Target(replicas=after), sizes, memory, DEVICES)
    line = simulate(plan, sizes, memory, MACHINE._replace(link_bytes_per_s=1e12))
    assert 0 < line.capacity <= line.balanced <= line.total
    assert line.peak_bytes <= plan.peak_bytes
    small = msgspec.structs.replace(memory, budgets=memory.budgets | {"device:0": memory.footprint // 2})
    with pytest.raises(ValueError, match=r"device:0: .* exceed the budget"):
        simulate(plan, sizes, small, MACHINE)
