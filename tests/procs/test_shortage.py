"""A rank that finds no memory in the midst of a step lets the others go and steps again with them; no process ends, no
request notices more than a pause (promise P11)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.protocol.hmm import GetHmmStatus
from elasticmoe.common.protocol.scaler import HmmStatus
from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import ask, check_integrity

pytestmark = [pytest.mark.procs, pytest.mark.slow]

SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 1}
POINT = "rank.step.begun@r0t0"


def generation(deployment: Deployment) -> int:
    status = ask(deployment, "hmm", GetHmmStatus())
    assert isinstance(status, HmmStatus)
    assert status.running
    return status.generation


async def test_a_step_without_memory_is_taken_again_by_all(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    points = Failpoints(tmp_path / "points")
    deployment = deploy("oracle", replicas=2, failpoint_dir=points.folder, **SETTINGS)
    pids, ranks = deployment.pids, deployment.rank_pids()
    async with TimedLoad(deployment.base_url, clients=6, seed=5) as load:
        await load.wait_streams(6)
        for _ in range(3):
            before = generation(deployment)
            points.arm(POINT, "raise out_of_memory")
            begin = load.now()
            await asyncio.to_thread(points.wait_hit, POINT)
            await load.wait_streams(12)
            print(f"longest pause {load.longest_gap(begin) * 1e3:.0f} ms")
            # Halted, and started again: nobody waited for the rank that had given up.
            assert generation(deployment) >= before + 2
    points.clear()
    assert (deployment.pids, deployment.rank_pids()) == (pids, ranks)
    assert (load.broken, load.errors) == ([], {})
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    assert "a step found no memory" in deployment.log("pool") + deployment.log("worker")
    check_integrity(deployment)
    assert deployment.stop().count("error") == 0
