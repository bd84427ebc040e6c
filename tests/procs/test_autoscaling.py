"""A deployment that follows its load, with real processes: it grows while requests come, shrinks when none do, and no
stream is wrong or lost, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]

# A step of the paced model takes some 12 ms and more of many streams: 24 of them break the objective of any size.
SETTINGS: dict[str, Any] = {
    "replicas": 1,
    "devices": 3,
    "kv_bytes": 8 << 20,
    "device_bytes": 64 << 20,
    "standbys": 2,
    "policy": "act",
    "itl_s": 0.012,
    "replicas_max": 3,
}
QUICK = {"hold_s": 1.0, "hold_max_s": 2.0, "down_over_s": 2.0, "fall_s": 2.0, "price_factor": 0.1}


def change(deployment: Deployment, **fields: Any) -> dict[str, Any]:
    policy = deployment.admin("/v1/policy")
    body = {"version": policy["version"], "policy": policy["policy"] | fields}
    status, told = deployment.admin_call("PUT", "/v1/policy", body)
    assert status == 200, told
    assert isinstance(told, dict)
    return told


def replicas(deployment: Deployment) -> int:
    status, size = deployment.admin_call("GET", "/v1/scale")
    assert status in (200, 503), size
    return int(size["effective_size"]) if status == 200 else 0  # a scaler that has not read the journal yet


async def grows_to(deployment: Deployment, least: int) -> None:
    await asyncio.to_thread(wait_until, lambda: replicas(deployment) >= least, f"{least} replicas serve", 60.0)


@pytest.mark.slow
async def test_it_grows_under_load_and_shrinks_after_it_and_no_stream_is_wrong(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle-paced", **SETTINGS)
    await asyncio.to_thread(change, deployment, **QUICK)
    async with Load(deployment.base_url, clients=24, seed=3, longest=60) as load:
        await grows_to(deployment, 2)
        await asyncio.to_thread(deployment.kill, "r0t0")
        old = await asyncio.to_thread(deployment.kill, "scaler")
        await asyncio.to_thread(deployment.wait_restarted, "scaler", old)
        await grows_to(deployment, 3)
    assert check_load_against_oracle(load.streams, model_folder("oracle-paced")) > 0
    policy = deployment.admin("/v1/policy")
    assert (policy["version"], policy["policy"]["hold_s"]) == (2, 1.0), "what was set outlives the scaler"
    wait_until(lambda: replicas(deployment) == 1, "nobody needs the others any more", 90.0)
    decisions = deployment.admin("/v1/decisions")["decisions"]
    assert {"shrink_idle"} <= {decision["reason"] for decision in decisions}

    def operations() -> list[dict[str, Any]]:
        known = deployment.admin("/v1/operations")["operations"]
        return [operation for operation in known if operation["kind"] != "none"]

    wait_until(lambda: all(operation["outcome"] is not None for operation in operations()), "the last has ended", 30.0)
    orders = operations()
    assert all(operation["by"] == "policy" for operation in orders)
    assert {operation["outcome"] for operation in orders} == {"done"}
    command = [sys.executable, "-m", "elasticmoe.cli.main", "policy", "replay", "--json"]
    replayed = subprocess.run(
        [*command, "--run-dir", str(deployment.run_dir)], capture_output=True, text=True, timeout=60.0
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    again = json.loads(replayed.stdout)
    assert len(again["policy"]) >= len(orders), "each order was recorded with all that it was made from"
    assert (again["different"], again["unreadable"]) == ([], 0)


@pytest.mark.slow
def test_chaos_lets_the_policy_decide_under_bursts_while_processes_are_killed() -> None:
    flags = ("--minutes", "0.3", "--fault-every", "6", "--clients", "24", "--devices", "host:3", "--seed", "4")
    command = [sys.executable, "-m", "elasticmoe.cli.main", "chaos", "--act", *flags]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=dict(os.environ) | {"COLUMNS": "200"}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = ran.stdout + ran.stderr
    for row in ("no token was wrong", "size and target within 1 to 3", "the size was what the policy wants"):
        (line,) = [line for line in told.splitlines() if row in line]
        assert " yes " in line, line
    assert "2 replicas" in told, "it never grew"
    # What is told of a fault is not less than what the streams saw: the longest pause is a fault's, or was beside none.
    found = re.search(r"longest (\d+) ms, longest outside of faults (\d+) ms", told)
    assert found, told
    longest, outside = map(int, found.groups())
    of_faults = [int(pause) for pause in re.findall(r"longest pause of a stream (\d+) ms", told)]
    assert of_faults
    assert longest == max(*of_faults, outside), told


async def test_advice_changes_nothing_and_writers_do_not_overwrite_one_another(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy("oracle-paced", **{**SETTINGS, "policy": "advise"})
    async with Load(deployment.base_url, clients=24, seed=4, longest=60):
        await asyncio.to_thread(
            wait_until, lambda: deployment.admin("/v1/policy")["target"] > 1, "it advises to grow", 60.0
        )
    policy = deployment.admin("/v1/policy")
    assert (policy["policy"]["mode"], policy["policy"]["itl_s"], policy["replicas"]) == ("advise", 0.012, 1)
    assert deployment.admin("/v1/operations")["operations"] == []
    told = change(deployment, mode="off")
    assert (told["version"], told["policy"]["mode"]) == (policy["version"] + 1, "off")
    body = {"version": policy["version"], "policy": {"mode": "act"}}
    status, refused = deployment.admin_call("PUT", "/v1/policy", body)
    assert (status, refused["error"]["code"]) == (409, "policy_changed")
    for bad in ({"ttft_s": 0}, {"mode": "on"}, {"replicas_min": 5, "replicas_max": 4}, {"colour": 1}):
        status, refused = deployment.admin_call("PUT", "/v1/policy", {"version": told["version"], "policy": bad})
        assert (status, refused["error"]["code"]) == (400, "invalid_request"), bad
    assert deployment.admin("/v1/policy")["version"] == told["version"]
