"""The whole system serves the oracle model exactly: every token depends on KV, experts and exchange being right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.procs.clients import check_against_oracle, closed_loop
from tests.procs.deployment import Deployment
from tests.procs.integrity import check_integrity

pytestmark = [pytest.mark.procs, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    "replicas", [1, 4, *(pytest.param(replicas, marks=pytest.mark.slow) for replicas in (2, 3, 5, 6))]
)
async def test_32_streams_with_cancels_are_exact(
    replicas: int, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=replicas, max_sequences=16, kv_bytes=4 << 20, device_bytes=64 << 20)
    streams = await closed_loop(deployment.base_url, clients=32, requests=160, seed=replicas, leavers=0.2)
    assert check_against_oracle(streams, model_folder("oracle")) > 1_500
    assert sum(stream.finish is None for stream in streams) >= 10
    check_integrity(deployment)
    report = deployment.stop()
    assert len(report.requests) == 160
    assert report.count("error") == 0


async def test_small_kv_preempts_and_stays_exact(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    # One handle of KV is 512 blocks, 8,192 tokens: the 32 streams want about twice as much, and preempt one another.
    # Accelerators have no fewer than two.
    on_accelerators = any(map(request.config.getoption, ("--accelerator", "--hardware")))
    kv_bytes = (4 if on_accelerators else 2) << 20
    deployment = deploy("oracle", replicas=1, kv_bytes=kv_bytes, max_model_len=1024, device_bytes=64 << 20)
    streams = await closed_loop(
        deployment.base_url, clients=32, requests=48, seed=5, prompt_tokens=(300, 500, 700), leavers=0.1
    )
    assert check_against_oracle(streams, model_folder("oracle")) > 500
    check_integrity(deployment)
