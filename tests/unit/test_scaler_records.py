"""Operations in the store: what the release before wrote is gone on with, and what nobody can read is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from elasticmoe.common.layout import Served
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.store import Store, Writer
from elasticmoe.services.scaler.api.requests import parse_scale
from elasticmoe.services.scaler.control.admission import accept
from elasticmoe.services.scaler.control.losses import lost_devices
from elasticmoe.services.scaler.operation.operation import (
    Accounting,
    CallerTrace,
    Figures,
    LegProgress,
    Operation,
    PhaseTime,
)
from elasticmoe.services.scaler.store.records import OPERATIONS
from tests.unit.test_scaler_resume import recall_of
from tests.unit.transitions import DOWN, UP, World, layout_of, operation_of

BY = Writer("scaler:a", 1)

# As the release before wrote it, without its plan: the third attempt of a second leg.
RELEASE_BEFORE: dict[str, Any] = {
    "op_id": "op",
    "kind": "scale_up",
    "request": {"replicas": 3, "devices": None, "remove": None, "reason": "", "deadline_s": 600.0, "is_lost": False},
    "plan": None,
    "accepted_unix": 0.0,
    "deadline_s": 60.0,
    "planned": None,
    "num_legs": 2,
    "leg": 1,
    "attempt": 2,
    "phase": "commit",
    "why": "everything is prepared",
    "clock": 3.3,
    "elapsed_s": 3.3,
    "phase_s": 0.0,
    "timings": [{"leg": 0, "phase": "plan", "seconds": 0.5}],
    "error": None,
    "is_cancelled": False,
    "is_late": False,
    "lost_before": ["host:7"],
    "lost_meanwhile": [],
    "retry_s": 1.5,
    "committed_s": 2.25,
    "flipped_s": None,
    "sources": [0, 1],
    "ahead": [{"source": 0, "target": 2, "num_sequences": 1}],
    "moves_s": 1.8,
    "num_rounds": 3,
    "bytes_prior": 1000,
    "bytes_of": ["op/1.2", 500],
    "handed_over": {"rank-r0t0:0": [0, 2]},
    "figures": {"capacity_s": 1.2, "bytes_copied": 1500},
}


def of_the_release_before(operation: Operation) -> dict[str, Any]:
    record: dict[str, Any] = msgspec.to_builtins(operation)
    del record["form"], record["caller"], record["policy_order"]
    parts = [record.pop(name) for name in ("progress", "accounting")]
    counted = parts[1]["bytes_of"]
    parts[1]["bytes_of"] = [str(TransitionId(*counted[0])), counted[1]] if counted else ["", 0]
    return record | parts[0] | parts[1]


@pytest.mark.parametrize(("name", "number"), [("policy-12-81234.117", 12), ("policy-12", None), ("mine", None)])
def test_whose_order_an_older_record_is_is_told_by_its_name(name: str, number: int | None) -> None:
    of_today = msgspec.to_builtins(OPERATIONS.decode(msgspec.msgpack.encode(RELEASE_BEFORE | {"op_id": name})))
    assert of_today["policy_order"] == number
    without = {field: value for field, value in of_today.items() if field != "policy_order"}
    assert OPERATIONS.decode(msgspec.msgpack.encode(without)).policy_order == number, "of yesterday"
    noted = OPERATIONS.decode(msgspec.msgpack.encode(of_today | {"op_id": "policy-12-81234.117", "policy_order": None}))
    assert noted.policy_order is None, "of today, an operator's"


def test_a_record_of_the_release_before_loses_nothing() -> None:
    operation = OPERATIONS.decode(msgspec.msgpack.encode(RELEASE_BEFORE))
    assert set(of_the_release_before(operation)) == set(RELEASE_BEFORE)
    assert (operation.leg, operation.phase, operation.lost_before) == (1, "commit", ("host:7",))
    assert operation.elapsed_s == 3.3
    assert operation.progress == LegProgress(
        attempt=2,
        retry_s=1.5,
        committed_s=2.25,
        ahead=operation.progress.ahead,
        sources=(0, 1),
        moves_s=1.8,
        num_rounds=3,
    )
    assert [move.target for move in operation.progress.ahead or ()] == [2]
    assert operation.accounting == Accounting(
        timings=(PhaseTime(0, "plan", 0.5),),
        bytes_prior=1000,
        bytes_of=(TransitionId("op", 1, 2), 500),
        handed_over={"rank-r0t0:0": (0, 2)},
        figures=Figures(capacity_s=1.2, bytes_copied=1500),
    )


@pytest.mark.parametrize("plan", [UP, DOWN])
@pytest.mark.parametrize("phase", ["prepare", "commit", "migrate", "release"])
def test_an_operation_of_the_release_before_is_gone_on_with(store: Store, plan: Any, phase: str) -> None:
    world = World(plan.before)
    operation = world.run_to(operation_of(plan), phase)
    store.put_operation(BY, of_the_release_before(operation))  # type: ignore[arg-type]
    again = store.get_operation(OPERATIONS)
    assert again == operation
    done = world.run(msgspec.structs.replace(operation, clock=None))
    assert (done.phase, world.layout) == ("done", plan.after)
    store.end_operation(BY, msgspec.structs.replace(done, plan=None))
    assert store.ended_operations(OPERATIONS) == [msgspec.structs.replace(done, plan=None)]


def test_an_operation_keeps_the_trace_of_whoever_ordered_it(store: Store) -> None:
    caller = CallerTrace(f"00-{'ab' * 16}-{'cd' * 8}-01", "a=1")
    operation = accept(parse_scale(b'{"replicas": 3}', 9.0, caller), "op", UP, None, 0.0, ())
    assert operation.caller == caller
    store.put_operation(BY, operation)
    assert store.get_operation(OPERATIONS) == operation


def test_devices_that_were_lost_before_the_upgrade_stay_lost(store: Store) -> None:
    ended = RELEASE_BEFORE | {"phase": "done"}
    store.end_operation(BY, ended)  # type: ignore[arg-type]
    assert lost_devices(None, store.ended_operations(OPERATIONS)) == {"host:7"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": 3}, "form"),
        ({"form": 2}, "attempt"),
        ({"hurried_s": 1.0}, "hurried_s"),
        ({"phase": "paused"}, "phase"),
        ({"bytes_of": 5}, "list"),
        ({"bytes_of": [5, 5]}, "text"),
        ({"bytes_of": ["op", 5]}, "form"),
        ({"bytes_of": ["op/1", 5]}, "form"),
        ({"bytes_of": ["op/1.2", "all"]}, "whole number"),
    ],
)
def test_a_record_of_any_other_form_is_refused_and_stays(
    store: Store, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    store.acquire_lease("scaler:a", 60_000, 0)
    store.put_layout(BY, layout_of(3, (0, 1)))
    store.put_served(BY, Served("/models/a", "float32"))
    store.put_operation(BY, change | RELEASE_BEFORE | change)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=said) as caught:
        store.get_operation(OPERATIONS)
    assert caught.value.code == "store_corrupt"
    recalled = recall_of(store, tmp_path).read(BY)  # type: ignore[arg-type]
    assert recalled.beginning.refusal is not None
    assert recalled.beginning.refusal.code == "state_differs"
    assert said in recalled.beginning.refusal.message
    assert "up --fresh" in recalled.beginning.refusal.message
    with pytest.raises(Unavailable, match=said):
        store.get_operation(OPERATIONS)


def test_one_of_another_release_that_has_ended_is_left_out(store: Store) -> None:
    store.end_operation(BY, RELEASE_BEFORE | {"form": 3})  # type: ignore[arg-type]
    store.end_operation(BY, operation_of(None))
    assert store.ended_operations(OPERATIONS) == [operation_of(None)]
