"""A deployment that is stopped in order with its state, and started again in the same run directory: the size that it
was scaled to, the policy, the operations and the token are those that were in force, and nothing stale is left. What
the launcher does for that: test_keep_state.py."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from elasticmoe.cli.main import main
from tests.procs.clients import check_load_against_oracle, closed_loop
from tests.procs.deployment import Deployment, in_force
from tests.procs.failpoints import Failpoints
from tests.procs.waiting import wait_until
from tests.unit.stores import Server

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

Up = Callable[..., Deployment]
POLICY = {"mode": "act", "itl_s": 0.123, "ttft_s": 4.5, "replicas_min": 3, "replicas_max": 3}


def down(deployment: Deployment) -> None:
    assert main(["down", "--keep-state", "--run-dir", str(deployment.run_dir)]) == 0


@pytest.mark.parametrize("how", ["down", "signal"])
def test_a_stop_that_keeps_the_state_is_gone_on_with(up: Up, model_folder: Callable[[str], Path], how: str) -> None:
    flags = ("--keep-state",) if how == "signal" else ()
    first = up(replicas=2, flags=flags).wait_ready()
    assert first.scale(replicas=3)["outcome"] == "done"
    policy = first.admin("/v1/policy")
    body = {"version": policy["version"], "policy": policy["policy"] | POLICY}
    status, answer = first.admin_call("PUT", "/v1/policy", body)
    assert status == 200, answer
    before, layout = in_force(first), first.admin("/v1/layout")
    assert {name: before["policy"][1][name] for name in POLICY} == POLICY
    assert len(before["operations"]) == 1
    first.stop_keeping((lambda: down(first)) if how == "down" else None)

    second = up(replicas=2, flags=flags).wait_ready()
    wait_until(lambda: "is served at" in second.output(), "`up` says where it serves")
    assert f"resuming the deployment that was stopped in {second.run_dir}" in second.output()
    assert f"resumed: layout {layout['epoch']} with 3 replicas" in second.output()
    assert in_force(second) == before
    now = second.admin("/v1/layout")
    assert (now["epoch"], now["fence"]) == (layout["epoch"], layout["fence"] + 1)
    assert set(second.rank_pids().values()).isdisjoint(rank["pid"] for rank in layout["ranks"])
    streams = asyncio.run(closed_loop(second.base_url, clients=4, requests=12, seed=1))
    assert check_load_against_oracle(streams, model_folder("oracle")) > 0
    if how == "down":
        second.stop()
    else:
        second.stop_keeping()
        assert main(["down", "--run-dir", str(second.run_dir)]) == 0
        assert {entry.name for entry in second.run_dir.iterdir()} == {"launcher.lock", "logs"}


def test_a_store_elsewhere_has_it_still(up: Up) -> None:
    folder = Path(tempfile.mkdtemp(prefix="em-"))
    server = Server(folder)
    try:
        first = up(replicas=2, store_url=server.url, flags=("--keep-state",)).wait_ready()
        assert first.scale(replicas=3)["outcome"] == "done"
        before = in_force(first)
        first.stop_keeping()
        second = up(replicas=2, store_url=server.url).wait_ready()
        assert in_force(second) == before
        second.stop()
    finally:
        server.stop()
        shutil.rmtree(folder)


def test_an_operation_in_progress_ends_under_the_next_start(up: Up) -> None:
    first = up(replicas=2).wait_ready()
    points = Failpoints(first.run_dir.parent / "points")
    point = "scaler.leg1.prepare.after"
    points.arm(point)
    op_id = first.order(replicas=3)
    points.wait_hit(point)
    epoch = first.admin("/v1/layout")["epoch"]

    def stop() -> None:
        first.launcher.terminate()
        wait_until(lambda: "stopping scaler" in first.output(), "the scaler is asked to end")
        points.clear()  # it goes on, and hears of it

    assert main(["down", "--keep-state", "--timeout", "0.01", "--run-dir", str(first.run_dir)]) == 1
    first.stop_keeping(stop)

    second = up(replicas=1).wait_ready()
    wait_until(lambda: "is served at" in second.output(), "`up` says where it serves")
    assert f"operation {op_id}, which was in progress, goes on" in second.output()
    assert second.wait_operation(op_id)["outcome"] == "done"
    layout = second.admin("/v1/layout")
    assert layout["replicas"] == 3
    assert layout["epoch"] > epoch
    second.stop()
