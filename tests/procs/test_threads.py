"""A rank on `host` computes on the cores of its device, and serves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from elasticmoe.common.machine import usable_cores
from tests.procs.deployment import Deployment

pytestmark = pytest.mark.procs


@pytest.mark.parametrize(("devices", "most"), [(1, 64), (1, 1), (2, 64)])
def test_a_rank_computes_on_the_cores_of_its_device(devices: int, most: int, deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("tiny-qwen3-moe", replicas=1, devices=devices, threads_max=most)
    threads = max(1, min(most, int(usable_cores()) // devices))
    assert re.findall(r"computes.*threads=(\d+)", deployment.log("pool")) == [str(threads)]
    body = {"model": "tiny-qwen3-moe", "prompt": list(range(200)), "max_tokens": 20, "ignore_eos": True}
    answer = httpx.post(f"{deployment.base_url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.json()["usage"]["completion_tokens"] == 20
    (pid,) = deployment.rank_pids().values()
    names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]
    assert names.count("kernels") == threads - 1
    deployment.stop()
