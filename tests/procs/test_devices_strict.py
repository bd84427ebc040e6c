"""A whole deployment on the second device backend: keys for descriptors, pages of 2 MiB, memory that no CPU address
reaches. It serves, grows, loses its HMM and a rank, shrinks, and leaves every token as it should be."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.devices import strict
from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.deployment import ROOT, Deployment
from tests.procs.integrity import check_integrity

pytestmark = [pytest.mark.procs, pytest.mark.slow]

SETTINGS: dict[str, Any] = {
    "device_bytes": 512 << 20,
    "kv_bytes": 8 << 20,
    "max_sequences": 16,
    "standbys": 1,
}


async def test_a_deployment_serves_scales_and_recovers(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    environment = {
        "PYTHONPATH": os.pathsep.join((str(ROOT / "tests/devices/site"), str(ROOT))),
        strict.FOLDER: str(tmp_path / "devices"),
    }
    folder = model_folder("oracle")
    deployment = Deployment(folder, replicas=1, devices=3, environment=environment, **SETTINGS).wait_ready()
    try:
        async with Load(deployment.base_url, clients=8, seed=1) as load:
            assert (await asyncio.to_thread(deployment.scale, replicas=3))["phase"] == "done"
            keys = list((tmp_path / "devices").glob("*.key"))
            assert len(keys) > 10
            assert all(int(key.read_text().split()[3]) % strict.GRANULARITY == 0 for key in keys)
            assert {key.read_text().split()[0] for key in keys} == {"host:0", "host:1", "host:2"}
            await asyncio.to_thread(check_integrity, deployment)
            os.kill(deployment.pids["hmm"], signal.SIGKILL)
            assert (await asyncio.to_thread(deployment.scale, replicas=2))["phase"] == "done"
            await asyncio.to_thread(check_integrity, deployment)
            rank = deployment.admin("/v1/layout")["ranks"][0]
            os.kill(rank["pid"], signal.SIGKILL)
            assert (await asyncio.to_thread(deployment.scale, replicas=1))["phase"] == "done"
            await asyncio.to_thread(check_integrity, deployment)
        assert check_load_against_oracle(load.streams, folder) > 100
        report = deployment.stop()
        assert report.count("error") == 0
    finally:
        deployment.discard()
