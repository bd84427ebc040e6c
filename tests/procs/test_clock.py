"""The wall clock jumps by hours under a whole deployment, its store included: nothing that lasts is counted by it
(promise P22). A library that is loaded before all others moves the clock; see clock_shim.c."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.faults import store_client
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]

HOUR_S = 3600
SETTINGS: dict[str, Any] = {"max_sequences": 32, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 2}


class WallClock:
    """The clock of every process that `environment` is given to."""

    def __init__(self, folder: Path) -> None:
        library, offset = folder / "clock_shim.so", folder / "offset"
        source = Path(__file__).with_name("clock_shim.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, source, "-ldl", "-pthread"], check=True
        )
        offset.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIM_FILE": str(offset)}
        with open(offset, "r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 8)

    def set(self, offset_s: int) -> None:
        """Let it be `offset_s` before the true time, from now on."""
        self._mapped[:8] = struct.pack("=q", offset_s)

    def close(self) -> None:
        self._mapped.close()


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[WallClock]:
    clock = WallClock(tmp_path)
    yield clock
    clock.close()


def offset_of_store(deployment: Deployment) -> float:
    """What the store's clock is before ours."""
    with store_client(deployment) as client:
        seconds, _ = client.time()
    return seconds - time.time()


def lease_ms(deployment: Deployment) -> int:
    """For how long the scaler's lease lasts, as the store counts; negative without one."""
    with store_client(deployment) as client:
        (key,) = client.keys("elasticmoe:*:lease") or [b"none"]
        return int(client.pttl(key))


def wait_lease(deployment: Deployment) -> None:
    """Wait until the lease has been renewed by the clock as it is now."""
    wait_until(lambda: 0 < lease_ms(deployment) <= 10_000, "the lease is renewed", 60.0)


def accepted_s(operation: dict[str, Any]) -> float:
    """How long ago an operation was accepted, by our clock and the scaler's."""
    return time.time() - operation["accepted_unix"]


@pytest.mark.slow
async def test_jumps_of_an_hour_expire_nothing(
    clock: WallClock, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2, devices=3, environment=clock.environment, **SETTINGS)
    assert abs(offset_of_store(deployment)) < 60
    pids, ranks = deployment.pids, deployment.rank_pids()
    fence = deployment.admin("/v1/layout")["fence"]
    async with TimedLoad(deployment.base_url, clients=8, seed=5) as load:
        await load.wait_streams(8)
        for offset_s, replicas in ((HOUR_S, 3), (-HOUR_S, 2)):
            began = load.now()
            clock.set(offset_s)
            assert abs(await asyncio.to_thread(offset_of_store, deployment) - offset_s) < 60
            await load.wait_streams(8)
            await asyncio.to_thread(wait_lease, deployment)
            operation = await asyncio.to_thread(deployment.scale, replicas=replicas, deadline_s=60)
            assert (operation["phase"], operation["is_late"]) == ("done", False)
            assert operation["elapsed_s"] < 60
            assert abs(accepted_s(operation) + offset_s) < 60, "the scaler's clock did not jump"
            assert load.longest_gap(began) < 30
        # The clock jumps both ways while an operation is under way.
        status, accepted = await asyncio.to_thread(
            deployment.admin_call, "POST", "/v1/scale", {"replicas": 3, "deadline_s": 60}
        )
        assert status == 202
        for offset_s in (HOUR_S, -HOUR_S):
            clock.set(offset_s)
            await load.wait_streams(2)
        operation = await asyncio.to_thread(deployment.wait_operation, accepted["op_id"])
        assert (operation["phase"], operation["is_late"]) == ("done", False)
    assert load.broken == []
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 500
    check_integrity(deployment)
    assert deployment.pids == pids, "somebody restarted"
    assert ranks.items() <= deployment.rank_pids().items(), "a rank was replaced"
    assert deployment.admin("/v1/layout")["fence"] == fence, "the lease was lost"
    assert deployment.stop().count("error") == 0


def test_a_dead_scalers_lease_does_not_last_for_the_hour_that_the_clock_went_back(
    clock: WallClock, deploy: Callable[..., Deployment]
) -> None:
    settings = SETTINGS | {"lease_ms": 20_000}  # it does not end while this process stands still
    deployment = deploy("oracle", replicas=1, devices=2, environment=clock.environment, **settings)
    fence = deployment.admin("/v1/layout")["fence"]
    pid = deployment.kill("scaler", signal.SIGSTOP)  # the next one is not there yet
    clock.set(-HOUR_S)
    assert lease_ms(deployment) > HOUR_S * 900
    os.kill(pid, signal.SIGKILL)
    deployment.wait_restarted("scaler", pid)
    deployment.wait_serving()
    assert deployment.admin("/v1/layout")["fence"] > fence
    assert deployment.scale(replicas=2)["phase"] == "done"
    deployment.stop()
