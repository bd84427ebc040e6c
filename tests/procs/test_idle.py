"""A deployment that nobody asks anything waits for events instead of looking for them: `bench idle` measures it, and
this fails where some loop begins to poll. That it notices what it must in time: test_gray_failure.py and others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elasticmoe.cli.bench.idle import processes_of, watch
from tests.procs.deployment import Deployment
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow]

SWITCHES_MAX = 80.0  # per second, of all processes together; 50 were measured, and 430 while they polled
SECONDS = 5.0


def test_nobody_polls_while_there_is_nothing_to_do(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("oracle", replicas=2, devices=4)
    rows: list[dict[str, float]] = []

    def is_idle() -> bool:
        # What the start has begun ends at its own time, so the first look may still see it.
        rows[:] = watch(processes_of(deployment.run_dir), SECONDS)
        return rows[-1]["switches per s"] <= SWITCHES_MAX

    wait_until(is_idle, "the deployment is idle", 4 * SECONDS)
    print(*rows, sep="\n")
    named = {str(row["process"]) for row in rows}
    assert {"launcher", "store", "keeper", "hmm", "pool", "scaler", "router", "rank r0t0", "rank r1t0"} <= named
    deployment.stop()
