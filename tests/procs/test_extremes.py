"""Extreme sampling parameters over HTTP, on two ranks: an answer of finite numbers or one clear refusal, and the same
processes afterwards. Ten thousand draws of them without processes: unit/test_sampling_draws.py."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.extremes import Draw, draw
from tests.procs.deployment import Deployment
from tests.procs.integrity import check_integrity

pytestmark = pytest.mark.procs

SETTINGS: dict[str, Any] = {"max_sequences": 16, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 1}
DRAWS, CLIENTS = 300, 8


def no_number(text: str) -> float:
    raise AssertionError(f"{text} is no JSON number")


def check(made: Draw, answer: httpx.Response) -> None:
    body = json.loads(answer.content, parse_constant=no_number)
    if answer.status_code == 200:
        assert made.wrong == (), made.body
        assert body["choices"][0]["finish_reason"] in ("stop", "length")
        return
    assert answer.status_code == 400, (made.body, answer.text)
    assert body["error"]["code"] == "invalid_request"
    assert body["error"]["param"] in (made.wrong or ("min_tokens",)), (made.body, answer.text)


async def test_no_parameters_end_a_rank(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("tiny-mixtral", replicas=2, **SETTINGS)
    pids, ranks = deployment.pids, deployment.rank_pids()
    rng = random.Random(7)
    bodies = [draw(rng, 256, max_tokens=3) for _ in range(DRAWS)]
    bodies.append(Draw('{"prompt":"hello","max_tokens":4,"repetition_penalty":1e-300}', ("repetition_penalty",)))
    seen: list[int] = []
    async with httpx.AsyncClient(base_url=deployment.base_url, timeout=60, trust_env=False) as http:

        async def client() -> None:
            while bodies:
                made = bodies.pop()
                headers = {"content-type": "application/json"}
                answer = await http.post("/v1/completions", content=made.body, headers=headers)
                check(made, answer)
                seen.append(answer.status_code)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    assert {status: seen.count(status) > DRAWS // 10 for status in set(seen)} == {200: True, 400: True}
    assert (deployment.pids, deployment.rank_pids()) == (pids, ranks)
    await asyncio.to_thread(check_integrity, deployment)
    assert deployment.stop().count("error") == 0
