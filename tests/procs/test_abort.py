"""Before COMMIT an operation can be given up at any step, by the operator or by a failure, and leaves no trace: the old
layout serves on in the very same pages. After COMMIT it completes, whatever fails. Streams are exact throughout."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.elastic import STANDBYS, Elastic, Holding, holding, in_thread, start_elastic, wait_same
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(180)]

CLIENTS = 8  # with answers so long that every rank has a sequence at every moment
UP: dict[str, Any] = {"replicas": 4}  # r3t0 joins on the free device
DOWN: dict[str, Any] = {"remove": [2]}

# The scaler's loop stands still at these, so it takes the cancel up only afterwards: the gate keeps the operation from
# being committed before that.
GATES = {
    "scaler.stage.before": "hmm.copy",
    "scaler.stage.after": "hmm.copy",
    "scaler.start_joiner.before": "rank.ready@r3t0",
    "scaler.start_joiner.after": "rank.ready@r3t0",
    "scaler.move.before": "rank.hand_over@r2t0",
    "scaler.move.after": "rank.hand_over@r2t0",
}
CANCEL_UP = [
    "scaler.leg1.prepare.before",
    "scaler.leg1.prepare.after",
    "scaler.stage.before",
    "scaler.stage.after",
    "hmm.stage",
    "hmm.vacating.before",
    "hmm.vacating.after",
    "hmm.claim",
    "hmm.copying.before",
    "hmm.copying.after",
    "hmm.copy",
    "hmm.staged.before",
    "hmm.staged.after",
    "scaler.start_joiner.before",
    "scaler.start_joiner.after",
    "rank.attach@r3t0",
    "rank.warm_up@r3t0",
    "rank.ready@r3t0",
    "rank.apply@r0t0",
    "rank.applied@r0t0",
    "scaler.leg1.commit.before",  # the commit waits for its record, or for the word that the store has it
    "scaler.leg1.commit.after",
]
CANCEL_DOWN = [
    "scaler.leg1.prepare.after",
    "scaler.stage.after",
    "hmm.stage",
    "hmm.vacating.after",
    "hmm.vacate",
    "hmm.claim",
    "hmm.copying.after",
    "hmm.copy",
    "hmm.staged.before",
    "hmm.staged.after",
    "scaler.move.before",
    "scaler.move.after",
    "rank.hand_over@r2t0",
    "rank.take.before",
    "rank.take.after",
    "rank.applied@r0t0",
    "scaler.leg1.commit.before",
    "scaler.leg1.commit.after",
]
FAIL = [  # what is asked for, where, what happens there, and the code that the operation shows
    (UP, "hmm.stage", "raise does_not_fit", "does_not_fit"),
    (UP, "hmm.claim", "raise does_not_fit", "does_not_fit"),
    (UP, "hmm.copy", "raise does_not_fit", "does_not_fit"),
    (UP, "hmm.copy", "raise device_error", "device_error"),
    (UP, "rank.attach@r3t0", "die", "joiner_exited"),
    (UP, "rank.attach@r3t0", "raise unavailable", "joiner_exited"),
    (UP, "rank.warm_up@r3t0", "die", "joiner_exited"),
    (UP, "rank.warm_up@r3t0", "raise device_error", "joiner_exited"),
    (UP, "rank.ready@r3t0", "die", "joiner_exited"),
    (DOWN, "hmm.stage", "raise does_not_fit", "does_not_fit"),
    (DOWN, "hmm.claim", "raise does_not_fit", "does_not_fit"),
    (DOWN, "hmm.copy", "raise does_not_fit", "does_not_fit"),
]
OF_STREAMS = ("rank.hand_over", "rank.take.before", "rank.take.after")  # passed only where a stream moves
ATTEMPTS = 5
LATE = [(UP, "hmm.copy"), (UP, "rank.warm_up@r3t0"), (DOWN, "hmm.copy"), (DOWN, "rank.applied@r0t0")]


def is_up(target: dict[str, Any]) -> str:
    return "up" if target is UP else "down"


@pytest.fixture(scope="module")
def elastic(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    """Three replicas on four devices, with the KV that grew when the third one came; every test leaves it so."""
    with start_elastic(model_folder("oracle"), tmp_path_factory.mktemp("points"), replicas=2) as started:
        started.resize(replicas=3)
        yield started


@pytest.fixture
async def load(elastic: Elastic, model_folder: Callable[[str], Path]) -> Any:
    """Clients that stream throughout the test; afterwards every token is compared, and nothing else has changed."""
    await in_thread(settle, elastic)
    async with Load(elastic.deployment.base_url, clients=CLIENTS, seed=5, shortest=120, longest=240) as load:
        await load.wait_begun(CLIENTS)
        try:
            yield load
            await in_thread(elastic.points.clear)
            await in_thread(check_integrity, elastic.deployment)
        finally:
            elastic.points.forget()
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 0


def settle(elastic: Elastic) -> None:
    """Begin with three replicas, whatever a test that failed has left."""
    elastic.deployment.wait_serving()
    if elastic.replicas() != [0, 1, 2]:
        elastic.resize(devices=["host:0", "host:1", "host:2"])
    wait_until(lambda: holding(elastic).standby == STANDBYS, "standbys are there again")


def cancel(elastic: Elastic, op_id: str) -> tuple[int, Any]:
    return elastic.deployment.admin_call("DELETE", f"/v1/operations/{op_id}")


def order_up_to(
    elastic: Elastic, target: dict[str, Any], point: str, deadline_s: float | None = None
) -> tuple[str, Holding]:
    """Begin the operation and wait until a process is at `point`: the op_id, and what was held before. An operation can
    pass a point of streams by: those of the rank that leaves may have ended of themselves. And a machine with other
    work may come to the deadline before it comes to the point. It is undone then, and ordered again."""
    points = elastic.points
    for _ in range(ATTEMPTS):
        before = holding(elastic)
        points.arm(point)
        op_id = elastic.scale(**target, **({} if deadline_s is None else {"deadline_s": deadline_s}))
        if deadline_s is None and not point.startswith(OF_STREAMS):
            points.wait_hit(point)
            return op_id, before
        if points.wait_hit_unless(point, lambda op_id=op_id: elastic.operation(op_id)["phase"] in ("done", "aborted")):
            return op_id, before
        points.disarm(point)  # the way back passes it too
        settle(elastic)
    raise AssertionError(f"{ATTEMPTS} operations passed {point} by")


def cancel_at(elastic: Elastic, target: dict[str, Any], point: str) -> Holding:
    """Give an operation up while a process is at `point`. What was held before."""
    points, gate = elastic.points, GATES.get(point)
    if gate:
        points.arm(gate, is_optional=True)
    op_id, before = order_up_to(elastic, target, point)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(cancel, elastic, op_id)
        if gate:
            points.release(point)
        status, shown = answer.result(30)
    assert status == 202, (status, shown)
    points.release(point)
    if gate:
        points.release(gate)
        points.disarm(gate)
    operation = elastic.deployment.wait_operation(op_id)
    assert (operation["phase"], operation["outcome"]) == ("aborted", "cancelled"), operation
    assert operation["error"]["code"] == "cancelled", operation
    return before


@pytest.mark.parametrize("point", CANCEL_UP)
async def test_cancel_of_growing_leaves_no_trace(elastic: Elastic, load: Load, point: str) -> None:
    before = await in_thread(cancel_at, elastic, UP, point)
    await in_thread(wait_same, elastic, before)


@pytest.mark.parametrize("point", CANCEL_DOWN)
async def test_cancel_of_shrinking_leaves_no_trace(elastic: Elastic, load: Load, point: str) -> None:
    before = await in_thread(cancel_at, elastic, DOWN, point)
    await in_thread(wait_same, elastic, before)


@pytest.mark.parametrize(("target", "point", "action", "code"), FAIL, ids=lambda x: is_up(x) if x in (UP, DOWN) else x)
async def test_failure_before_commit_leaves_no_trace(
    elastic: Elastic, load: Load, target: dict[str, Any], point: str, action: str, code: str
) -> None:
    before = await in_thread(holding, elastic)
    elastic.points.arm(point, action)
    operation = await in_thread(elastic.deployment.scale, **target)
    assert (operation["phase"], operation["error"]["code"]) == ("aborted", code), operation
    assert operation["error"]["message"], operation
    await in_thread(wait_same, elastic, before)


@pytest.mark.parametrize(("target", "point"), LATE, ids=lambda x: is_up(x) if x in (UP, DOWN) else x)
async def test_deadline_before_commit_leaves_no_trace(
    elastic: Elastic, load: Load, target: dict[str, Any], point: str
) -> None:
    op_id, before = await in_thread(order_up_to, elastic, target, point, 2.0)

    def is_aborting() -> bool:
        return elastic.operation(op_id)["phase"] in ("abort", "aborted")

    await in_thread(wait_until, is_aborting, "abort", 30.0)
    elastic.points.release(point)
    operation = await in_thread(elastic.deployment.wait_operation, op_id)
    assert (operation["phase"], operation["error"]["code"]) == ("aborted", "deadline_exceeded"), operation
    await in_thread(wait_same, elastic, before)


COMPLETE = [  # after COMMIT: where it is held, and what happens meanwhile
    ("scaler.send_commit.before", "cancel"),
    ("scaler.send_commit.after", "cancel"),
    ("hmm.committed.before", "cancel"),
    ("hmm.committed.after", "cancel"),
    ("hmm.committed.after", "r3t0"),
    ("rank.flip.before", "cancel"),
    ("scaler.send_release.before", "cancel"),
    ("hmm.releasing.before", "cancel"),
    ("hmm.releasing.after", "r3t0"),
    ("scaler.leg2.prepare.after", "cancel"),
    ("scaler.leg2.prepare.before", "hmm.stage: raise does_not_fit"),
    ("scaler.leg2.prepare.before", "hmm.claim: raise does_not_fit"),
    ("scaler.leg2.prepare.before", "hmm.copy: raise does_not_fit"),
]


def fail_after_commit(elastic: Elastic, point: str, fault: str) -> None:
    points = elastic.points
    points.arm(point)
    op_id = elastic.scale(**UP)
    points.wait_hit(point)
    if fault == "cancel":
        codes = {"committed"}
        if point.startswith("scaler.send"):
            points.release(point)  # its loop stands still, and answers afterwards
            codes.add("operation_ended")  # or the operation is quicker than the request
        status, answer = cancel(elastic, op_id)
        assert status == 409, answer
        assert answer["error"]["code"] in codes, answer
    elif fault.startswith("r"):
        os.kill(elastic.deployment.rank_pids()[fault], signal.SIGKILL)
    else:
        name, action = fault.split(": ")
        points.arm(name, action)
    points.release(point)
    operation = elastic.deployment.wait_operation(op_id)
    assert operation["phase"] == "done", operation
    assert elastic.replicas() == [0, 1, 2, 3]


@pytest.mark.parametrize(("point", "fault"), COMPLETE)
async def test_after_commit_growing_completes(
    elastic: Elastic, model_folder: Callable[[str], Path], point: str, fault: str
) -> None:
    await in_thread(settle, elastic)
    before = await in_thread(holding, elastic)
    async with Load(elastic.deployment.base_url, clients=CLIENTS, seed=6, longest=120) as load:
        try:
            await in_thread(fail_after_commit, elastic, point, fault)
            elastic.points.clear()
            await in_thread(elastic.deployment.wait_serving)
            await in_thread(check_integrity, elastic.deployment)
            await in_thread(elastic.resize, remove=[3])
        finally:
            elastic.points.forget()
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 0
    after = await in_thread(holding, elastic)
    assert (after.pages, after.files, after.memory) == (before.pages, before.files, before.memory)
