"""Deployments whose ranks exchange tokens in other ways than by the bus: exact through growth, shrinking and deaths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.devices import standins
from tests.procs.deployment import Deployment
from tests.procs.elastic import Elastic, Expected, TolerantLoad, holding, in_thread, start_elastic
from tests.procs.failpoints import Failpoints
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]


@pytest.fixture
def _no_leak() -> None:
    """`start_elastic` looks for what is left."""


def kill_in_an_exchange(elastic: Elastic, rank: str) -> None:
    """A rank dies between a dispatch and its combine, while the others wait for its answers."""
    old = elastic.deployment.rank_pids()[rank]
    elastic.points.arm(f"rank.combine@{rank}", "die")
    assert elastic.points.wait_hit(f"rank.combine@{rank}") == old
    deployment = elastic.deployment
    wait_until(lambda: deployment.rank_pids().get(rank) not in (None, old), "another process in the seat", 120.0)
    elastic.deployment.wait_serving()


def mailbox_bytes(elastic: Elastic) -> dict[str, int]:
    """What each device's part for ledger and mailbox takes."""
    devices: list[dict[str, Any]] = elastic.deployment.admin("/v1/devices")["devices"]
    return {device["device"]: device["memory"]["other"] for device in devices}


@pytest.mark.slow
async def test_mailboxes_come_and_go_with_their_seats(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """They are made, mapped by all, counted and given back, whoever dies meanwhile: a rank in mid-exchange, the HMM."""
    model = model_folder("oracle")
    with start_elastic(model, tmp_path / "points", replicas=2, exchange="mailbox") as elastic:
        deployment = elastic.deployment
        before = await in_thread(holding, elastic)
        taken = await in_thread(mailbox_bytes, elastic)
        assert taken["host:0"] == taken["host:1"] > 1 << 20  # a granule for the mailbox, and the ledger
        assert taken["host:2"] == 0
        async with TolerantLoad(deployment.base_url, clients=8, seed=3) as load:
            await in_thread(elastic.resize, replicas=3)
            await in_thread(kill_in_an_exchange, elastic, "r2t0")
            await in_thread(check_integrity, deployment)
            old = await in_thread(deployment.kill, "hmm")
            await in_thread(deployment.wait_restarted, "hmm", old)
            await in_thread(deployment.wait_serving)
            await in_thread(kill_in_an_exchange, elastic, "r0t0")
            await in_thread(elastic.resize, replicas=1)
            assert (await in_thread(mailbox_bytes, elastic))["host:2"] == 0
            await in_thread(check_integrity, deployment)
            await in_thread(elastic.resize, replicas=2)
        assert Expected(model).check(load.streams) > 500
        after = await in_thread(holding, elastic)
        assert after.memory == before.memory


@pytest.mark.slow
async def test_groups_of_torch_distributed_follow_the_layouts(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Exact through growth, shrinking and deaths in mid-exchange, and nobody listens but on loopback."""
    model = model_folder("oracle")
    with start_elastic(model, tmp_path / "points", replicas=2, exchange="torch_dist") as elastic:
        deployment = elastic.deployment
        async with TolerantLoad(deployment.base_url, clients=8, seed=3) as load:
            await in_thread(elastic.resize, replicas=4)
            listening = [
                place.laddr.ip
                for pid in (await in_thread(deployment.rank_pids)).values()
                for place in psutil.Process(pid).net_connections("inet")
                if place.status == psutil.CONN_LISTEN
            ]
            assert set(listening) == {"127.0.0.1"}
            await in_thread(kill_in_an_exchange, elastic, "r2t0")
            await in_thread(check_integrity, deployment)
            await in_thread(elastic.resize, replicas=1)
            await in_thread(elastic.resize, replicas=3)
            await in_thread(kill_in_an_exchange, elastic, "r0t0")
            await in_thread(check_integrity, deployment)
        assert Expected(model).check(load.streams) > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", standins.KINDS)
async def test_accelerators_exchange_by_mailboxes(
    kind: str, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins of their drivers, with torch's CPU for the device: nothing is set but the devices' names."""
    model, points = model_folder("oracle"), Failpoints(tmp_path / "points")
    with standins.memory(monkeypatch):
        environment = standins.environment(kind)
        settings: dict[str, Any] = {"kv_bytes": 8 << 20, "device_bytes": 256 << 20, "failpoint_dir": points.folder}
        deployment = Deployment(model, replicas=2, devices=f"{kind}:0-2", environment=environment, **settings)
        elastic = Elastic(deployment.wait_ready(), points)
        try:
            async with TolerantLoad(deployment.base_url, clients=4, seed=5) as load:
                await in_thread(elastic.resize, replicas=3)
                await in_thread(kill_in_an_exchange, elastic, "r1t0")
                await in_thread(elastic.resize, replicas=1)
                await in_thread(check_integrity, deployment)
            assert Expected(model).check(load.streams) > 100
            deployment.stop()
        finally:
            points.forget()
            deployment.discard()
