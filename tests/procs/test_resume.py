"""A deployment whose processes are all killed, the launcher too: the next `up` goes on with what was committed, says
what it ignores because of that, drops nothing unasked, and no epoch ever falls (promise P7)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

Up = Callable[..., Deployment]


def seen(deployment: Deployment) -> tuple[int, int, int]:
    """Epoch, fencing epoch and replicas, while it serves."""
    layout = deployment.admin("/v1/layout")
    return layout["epoch"], layout["fence"], layout["replicas"]


def said(deployment: Deployment) -> str:
    """What `up` has printed once it serves."""
    wait_until(lambda: "is served at" in deployment.output(), "`up` says where it serves")
    return deployment.output()


def refusal(deployment: Deployment) -> str:
    """The last line of an `up` that does not start."""
    assert deployment.launcher.wait(60) == 1
    return deployment.output().splitlines()[-1]


def test_replicas_of_two_ranks_go_on_as_such(up: Up) -> None:
    first = up(replicas=1, tp=2).wait_ready()
    first.scale(replicas=2)
    epoch, fence, _ = seen(first)
    first.cut_off()
    assert "--tp was 2, and is 1 now" in refusal(up(replicas=2, tp=1))
    second = up(replicas=1, tp=2).wait_ready()
    assert seen(second) == (epoch, fence + 1, 2)
    assert set(second.rank_pids()) == {"r0t0", "r0t1", "r1t0", "r1t1"}
    second.stop()


def test_what_was_committed_goes_on_and_only_fresh_drops_it(up: Up) -> None:
    first = up(replicas=2).wait_ready()
    assert "resum" not in said(first)
    operation_id = first.scale(replicas=3)["op_id"]
    epoch, fence, _ = seen(first)
    instance = first.admin("/v1/scale")["instance_id"]
    first.cut_off()

    second = up(replicas=2).wait_ready()
    assert seen(second) == (epoch, fence + 1, 3)
    assert f"resumed: layout {epoch} with 3 replicas, as it was committed last" in said(second)
    assert "--replicas 2 is ignored because of that" in said(second)
    size = second.admin("/v1/scale")
    assert (size["instance_id"], size["operation_id"], size["phase"]) == (instance, operation_id, "done")
    second.cut_off()

    # Fewer devices than the layout uses, other weights: nothing of that is carried out, or dropped.
    left = {path.name: path.read_bytes() for path in (second.run_dir / "state").glob("fence-*")}
    fewer = up(replicas=2, devices=2)
    told = refusal(fewer)
    assert told.startswith(f"elasticmoe: state_differs: {fewer.run_dir} holds what is left of a deployment")
    assert "--devices (ELASTICMOE_DEVICES) has to be host:3 or more; it is host:2 now" in told
    assert {path.name for path in (fewer.run_dir / "logs").glob("*.log")} == {"store.log"}, "nothing else was started"
    assert "state_differs" in refusal(up(replicas=2, dtype="bfloat16"))
    kept = {path.name: path.read_bytes() for path in (second.run_dir / "state").glob("fence-*")}
    assert kept["fence-layout"] == left["fence-layout"]
    assert int(kept["fence-scaler"]) >= int(left["fence-scaler"])

    third = up(replicas=1, devices=2, flags=("--fresh",)).wait_ready()
    assert "beginning anew" in said(third)
    assert "resumed" not in said(third)
    anew, fence_anew, replicas = seen(third)
    assert (anew, replicas) == (epoch + 1, 1)
    assert fence_anew > fence + 1
    assert third.admin("/v1/scale")["instance_id"] != instance
    third.cut_off()

    # More devices contradict nothing; and what was begun anew is what is resumed now.
    last = up(replicas=2, devices=4).wait_ready()
    assert seen(last)[::2] == (anew, 1)
    assert last.scale(replicas=4)["phase"] == "done"
    last.stop()


@pytest.mark.parametrize(
    "point", ["scaler.leg1.prepare.after", "scaler.leg1.commit.after", "scaler.leg1.migrate.after"]
)
def test_an_operation_that_was_cut_off_goes_on_and_ends_above_what_was_seen(up: Up, point: str) -> None:
    first = up(replicas=2).wait_ready()
    points = Failpoints(first.run_dir.parent / "points")
    points.arm(point)
    _, accepted = first.admin_call("POST", "/v1/scale", {"replicas": 3})
    points.wait_hit(point)
    epoch, fence, _ = seen(first)
    first.cut_off()
    points.forget()

    second = up(replicas=1).wait_ready()
    assert f"operation {accepted['op_id']}, which was in progress, goes on" in said(second)
    epochs = [seen(second)[0]]

    def has_ended() -> bool:
        epochs.append(seen(second)[0])
        status, shown = second.admin_call("GET", f"/v1/operations/{accepted['op_id']}")
        return status == 200 and shown["phase"] == "done"

    wait_until(has_ended, "the operation ends", 60.0)
    assert epochs == sorted(epochs)
    assert epochs[0] >= epoch
    assert seen(second)[1:] == (fence + 1, 3)
    second.stop()
