"""A rank on `host` computes on the cores of its device, or on its part of all, and serves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.common.machine import usable_cores
from tests.procs.clients import Load, check_against_undisturbed
from tests.procs.deployment import Deployment

pytestmark = pytest.mark.procs

MODEL = "tiny-qwen3-moe"
SETTINGS: dict[str, Any] = {"performance_mode": "throughput", "max_model_len": 512}


@pytest.mark.parametrize(("devices", "most"), [(1, 64), (1, 1), (2, 64)])
def test_a_rank_computes_on_the_cores_of_its_device(devices: int, most: int, deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(MODEL, replicas=1, devices=devices, threads_max=most)
    threads = max(1, min(most, int(usable_cores()) // devices))
    assert re.findall(r"computes.*threads=(\d+)", deployment.log("pool")) == [str(threads)]
    body = {"model": MODEL, "prompt": list(range(200)), "max_tokens": 20, "ignore_eos": True}
    answer = httpx.post(f"{deployment.base_url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.json()["usage"]["completion_tokens"] == 20
    (pid,) = deployment.rank_pids().values()
    names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]
    assert names.count("kernels") == threads - 1
    deployment.stop()


async def test_ranks_that_share_cores_divide_them_anew_with_each_change(
    deploy: Callable[..., Deployment],
) -> None:
    """Streams across that have the same tokens as alone: the mode's rounded activations and longer steps, too."""
    deployment = deploy(MODEL, replicas=1, devices=2, dtype="bfloat16", **SETTINGS)
    assert len(deployment.rank_pids()) == 1
    async with Load(deployment.base_url, clients=8, seed=3, prompts=12, shortest=200, longest=200) as load:
        for replicas in (2, 1, 2):
            assert (await asyncio.to_thread(deployment.scale, replicas=replicas))["phase"] == "done"
    assert len(load.streams) >= 8
    check_against_undisturbed(deployment.base_url, MODEL, load.streams)
    cores = int(usable_cores())
    told = re.findall(r"computes.*threads=(\d+)", deployment.log("pool"))
    assert told[0] == str(cores)
    # The first rank's at its start and at three flips; each newcomer's, which leaves or stays, at its start.
    assert sorted(told) == sorted(map(str, [cores, cores // 2, cores, cores // 2, cores // 2, cores // 2]))
    deployment.stop()
