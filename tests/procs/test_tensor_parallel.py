"""Whole deployments whose replicas have several ranks (ADR 37): they serve, scale and survive as any other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.greedy import OUTPUT_TOKENS, greedy
from tests.procs.integrity import check_integrity

pytestmark = pytest.mark.procs

ORACLE: dict[str, Any] = {"tp": 2, "max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 4}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "tp", "replicas"), [("tiny-mixtral", 2, 2), ("tiny-olmoe", 2, 1)])
def test_greedy_tokens_equal_transformers(
    name: str, tp: int, replicas: int, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 31, 32, 33, 100, 150)]
    settings = {"max_tokens_per_step": 32, "max_model_len": 256}
    deployment = deploy(name, replicas=replicas, devices=replicas * tp, tp=tp, **settings)
    with httpx.Client(base_url=deployment.base_url, timeout=60, trust_env=False) as client:
        body = {"model": name, "prompt": prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    check_integrity(deployment)
    report = deployment.stop()
    assert sorted(request.tokens for request in report.requests.values()) == sorted(greedy(model_folder(name), prompts))


async def test_it_scales_under_load_and_streams_are_exact(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=1, devices=6, **ORACLE)
    async with Load(deployment.base_url, clients=8, seed=9) as load:
        for replicas in (2, 3, 1):
            assert (await asyncio.to_thread(deployment.scale, replicas=replicas))["phase"] == "done"
            await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 200
    assert deployment.stop().count("error") == 0
