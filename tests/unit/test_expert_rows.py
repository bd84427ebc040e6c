"""How often experts are routed to: counted by an exchange, told by a rank, added up by a scaler."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import encode
from elasticmoe.common.protocol.errors import ProtocolError, Unready
from elasticmoe.common.protocol.signals import CODEC, RankWindow
from elasticmoe.services.scaler.api.experts import HALF_LIFE_S, RANKS_KEPT, ExpertLoads
from elasticmoe.services.scaler.api.snapshot import StatusSnapshot
from elasticmoe.services.worker.exchange.expert_rows import SAMPLED_EVERY, ExpertRowCounter, ExpertRows
from elasticmoe.services.worker.rank.windows import EXPERTS_EVERY_S, FollowerWindows
from tests.unit.test_rank_windows import SEAT, Bench
from tests.unit.test_scaler_admin import snapshot_of
from tests.unit.transitions import UP, World
from tests.unit.windows import Pushed


def counts(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_every_so_manieth_step_is_counted_and_told_once() -> None:
    counter = ExpertRowCounter((3, 0, 2))
    for _ in range(2 * SAMPLED_EVERY + 1):
        counter.begin_step()
        counter.count(0, counts(1, 0, 4))
        counter.count(2, counts(0, 2, 0))
    assert counter.take() == ExpertRows(3, ((0, 3), (2, 12), (7, 6)))
    assert counter.take() == ExpertRows(0, ())


def test_a_model_without_experts_has_none() -> None:
    counter = ExpertRowCounter((0, 0))
    counter.begin_step()
    assert counter.take() == ExpertRows(1, ())


def test_a_window_now_and_then_tells_them() -> None:
    bench = Bench()
    bench.expert_rows = ExpertRows(4, ((3, 9), (5, 1)))
    told = []
    for _ in range(int(2 * EXPERTS_EVERY_S)):
        bench.add(f"request-{bench.now}", max_tokens=1)
        bench.step(0.5)
        window = bench.pass_time(0.6)
        assert window is not None
        assert CODEC.decode(encode(window, sender="r")).body == window
        told.append(window.expert_rows)
    assert 1 <= sum(rows == ((3, 9), (5, 1)) for rows in told) <= 3
    assert set(told) == {(), ((3, 9), (5, 1))}


def test_a_follower_tells_of_its_experts_and_of_nothing_else() -> None:
    pushed, rows = Pushed(), [ExpertRows(4, ((3, 9), (5, 1))), ExpertRows(0, ()), ExpertRows(2, ())]
    windows = FollowerWindows(msgspec.structs.replace(SEAT, rank=RankId(1, 1)), pushed, lambda: rows.pop(0), 50.0)
    for second in range(round(3 * EXPERTS_EVERY_S) + 1):
        windows.turn(50.0 + second, 7)
    first, second_ = pushed.windows
    assert isinstance(first, RankWindow)
    assert isinstance(second_, RankWindow)
    assert (first.rank, first.number, first.epoch, first.span_s) == (RankId(1, 1), 1, 7, EXPERTS_EVERY_S)
    assert (first.expert_steps, first.expert_rows) == (4, ((3, 9), (5, 1)))
    assert (second_.number, second_.expert_steps, second_.ended_s) == (2, 2, 50.0 + 3 * EXPERTS_EVERY_S)
    assert rows == []


@pytest.mark.parametrize(
    "facts", [{"expert_rows": ((1, 1),)}, {"expert_steps": 1, "expert_rows": ((2, 1), (1, 1))}, {"expert_steps": -1}]
)
def test_rows_that_contradict_one_another_are_refused(facts: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ProtocolError)):
        CODEC.decode(encode(window(**facts), sender="r"))


def window(slot: int = 0, ended_s: float = 1.0, **facts: Any) -> RankWindow:
    fields: dict[str, Any] = {"rank": RankId(slot, 0), "incarnation": f"rank-r{slot}t0:0", "number": 1, "epoch": 1}
    return RankWindow(**{**fields, "ended_s": ended_s, "span_s": 1.0, **facts})


def test_what_ranks_tell_is_added_up_by_expert_and_by_rank() -> None:
    """One layer of four experts; r0 has 0 and 2, r1 has 1 and 3."""
    loads, snapshot = ExpertLoads(), snapshot_of(World(UP.before))
    assert loads.read(snapshot, 1.0).load == [[]]
    loads.take(window(0, expert_steps=10, expert_rows=((0, 60), (2, 20))))
    loads.take(window(1, expert_steps=20, expert_rows=((1, 80), (3, 80))))
    loads.take(window(1))  # tells nothing of them
    view = loads.read(snapshot, 1.0)
    assert view.owners == [[0, 1, 0, 1]]
    assert view.load == [[1500, 1000, 500, 1000]]  # 6, 4, 2 and 4 rows in a step
    assert [(rank.rank, rank.rows_per_step, rank.imbalance) for rank in view.ranks] == [
        ("r0t0", 8.0, 1.0),
        ("r1t0", 8.0, 1.0),
    ]
    loads.take(window(0, expert_steps=10, expert_rows=((0, 240),)))
    assert [rank.imbalance for rank in loads.read(snapshot, 1.0).ranks] == [1.333, 0.667]


def test_what_was_told_long_ago_counts_less_and_who_has_gone_counts_nothing() -> None:
    loads, snapshot = ExpertLoads(), snapshot_of(World(UP.before))
    loads.take(window(0, 10.0, expert_steps=8, expert_rows=((0, 80),)))
    loads.take(window(0, 10.0 + HALF_LIFE_S, expert_steps=4, expert_rows=((2, 40),)))
    assert loads.read(snapshot, 10.0 + HALF_LIFE_S).load == [[2000, 0, 2000, 0]]
    assert loads.read(snapshot, 10.0 + HALF_LIFE_S).sampled_steps == 8.0
    for n in range(2 * RANKS_KEPT):
        loads.take(window(0, incarnation=f"gone-{n}", expert_steps=1, expert_rows=((1, 9),)))
    assert loads.read(snapshot, 10.0 + HALF_LIFE_S).load == [[]]  # none of those that live


def test_what_nobody_adds_to_fades_by_the_clock() -> None:
    loads, snapshot = ExpertLoads(), snapshot_of(World(UP.before))
    loads.take(window(0, 10.0, expert_steps=8, expert_rows=((0, 80),)))
    assert loads.read(snapshot, 10.0 + HALF_LIFE_S).sampled_steps == 4.0
    assert loads.read(snapshot, 10.0 + HALF_LIFE_S).ranks[0].rows_per_step == 10.0
    gone = loads.read(snapshot, 10.0 + 5 * HALF_LIFE_S)
    assert (gone.sampled_steps, gone.load, gone.ranks[0].rows_per_step) == (0.0, [[]], None)


def test_only_experts_that_a_rank_still_has_count() -> None:
    """r0 gave 2 of its experts away: what it told of them is neither its load nor theirs."""
    loads = ExpertLoads()
    snapshot = snapshot_of(World(UP.before))
    loads.take(window(0, expert_steps=10, expert_rows=((0, 60), (1, 60), (3, 60), (99, 5))))
    loads.take(window(1, expert_steps=10, expert_rows=((1, 30), (3, 30))))
    view = loads.read(snapshot, 1.0)
    assert view.load == [[2000, 1000, 0, 1000]]
    assert [(rank.rows_per_step, rank.imbalance) for rank in view.ranks] == [(6.0, 1.0), (6.0, 1.0)]


def test_nothing_is_known_before_the_first_layout() -> None:
    with pytest.raises(Unready):
        ExpertLoads().read(StatusSnapshot("starting", "", None, None, None, 0, {}), 0.0)
