"""Scaler, HMM and store are away for a minute each under load, and no request notices (promise P6):
`pytest -m soak -s tests/soak/test_outages.py`.

tests/procs/test_restarts.py has outages as long as it takes to start a service again, and a store that hangs.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity

pytestmark = [pytest.mark.procs, pytest.mark.soak, pytest.mark.timeout(600)]

OUTAGE_S = 60.0
SETTINGS: dict[str, Any] = {"max_sequences": 32, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 2}


@asynccontextmanager
async def away(deployment: Deployment, name: str) -> AsyncIterator[None]:
    """Kill a service, and let nobody start it again for as long as this lasts."""
    launcher = deployment.launcher.pid
    os.kill(launcher, signal.SIGSTOP)
    try:
        old = await asyncio.to_thread(deployment.kill, name)
        yield
    finally:
        os.kill(launcher, signal.SIGCONT)
    await asyncio.to_thread(deployment.wait_restarted, name, old)


@pytest.mark.parametrize("name", ["scaler", "hmm", "store"])
async def test_a_minute_without_it_costs_no_request(
    name: str, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    async with TimedLoad(deployment.base_url, clients=8, seed=4) as load:
        begin = load.now()
        await load.wait_streams(64)
        steady_s = load.p99_gap(begin, load.now())
        begin, before = load.now(), len(load.streams)
        async with away(deployment, name):
            await asyncio.sleep(OUTAGE_S)  # the outage's length, not a wait for something
            served, longest_s = len(load.streams) - before, load.longest_gap(begin)
        await asyncio.to_thread(deployment.wait_serving)
        grown = await asyncio.to_thread(deployment.scale, replicas=3)
        assert grown["phase"] == "done", grown
        await asyncio.to_thread(check_integrity, deployment)
    print(
        f"\n{name} away for {OUTAGE_S:g} s: {served} requests served meanwhile, "
        f"longest pause {longest_s * 1e3:.0f} ms; p99 before {steady_s * 1e3:.0f} ms"
    )
    assert served > 100
    assert load.broken == []
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 2_000
    assert deployment.stop().count("error") == 0
