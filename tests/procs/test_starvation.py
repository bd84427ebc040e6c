"""One small allocation of a process fails, wherever it is: no request notices (promise P11).

What fails is the N-th allocation of the interpreter, of any thread, after a turn of the process's loop has begun.
Ranks, HMM and scaler may end of it and are started again; the pool goes on.

By default the pool alone; all of them: `pytest -m "soak or procs" tests/procs/test_starvation.py`. The router is not
tried here: it too goes on as a rule, but a request whose reader was to be woken may wait until its deadline.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity

pytestmark = [
    pytest.mark.procs,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("_testcapi") is None, reason="this Python has no _testcapi"),
]

SETTINGS: dict[str, Any] = {
    "max_sequences": 16,
    "kv_bytes": 4 << 20,
    "device_bytes": 64 << 20,
    "standbys": 2,
    "rank_restarts_max": 1_000,
}
MANY = (1, 2, 3, 5, 9, 17, 26, 37, 60, 90, 150, 316, 700, 1_200, 2_000, 5_000)
FEW = (2, 26, 116, 700)  # of a service that ends each time: the launcher gives up after five ends in a minute


async def starve(
    deployment: Deployment, points: Failpoints, load: TimedLoad, point: str, numbers: Sequence[int]
) -> None:
    """Let one allocation after the other fail, each once the last has been survived."""
    for number in numbers:
        points.arm(point, f"starve {number}")
        await asyncio.to_thread(points.wait_hit, point)
        await load.wait_streams(4)
        await asyncio.to_thread(deployment.wait_serving)
    points.clear()


@pytest.mark.parametrize(
    ("point", "numbers"),
    [
        ("pool.turn", MANY),
        pytest.param("rank.turn@r0t0", MANY, marks=pytest.mark.soak),
        pytest.param("hmm.turn", FEW, marks=pytest.mark.soak),
        pytest.param("scaler.turn", FEW, marks=pytest.mark.soak),
    ],
)
async def test_an_allocation_that_fails_costs_no_request(
    point: str,
    numbers: Sequence[int],
    deploy: Callable[..., Deployment],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    points = Failpoints(tmp_path / "points")
    deployment = deploy("oracle", replicas=2, devices=3, failpoint_dir=points.folder, **SETTINGS)
    pids = deployment.pids
    async with TimedLoad(deployment.base_url, clients=6, seed=5) as load:
        await load.wait_streams(6)
        await starve(deployment, points, load, point, numbers)
    assert (load.broken, load.errors) == ([], {})
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    ended = {name for name, pid in deployment.pids.items() if pid != pids[name]}
    assert ended <= {point.partition(".")[0]} - {"pool", "rank"}
    assert deployment.scale(replicas=3)["phase"] == "done"
    check_integrity(deployment)
    assert deployment.stop().count("error") == 0
