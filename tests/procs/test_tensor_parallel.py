"""Whole deployments whose replicas have several ranks (ADR 37): they serve, scale and survive as any other."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.common.families import load_spec
from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.collector import Collector, collecting
from tests.procs.deployment import Deployment
from tests.procs.gaps import TimedLoad
from tests.procs.greedy import OUTPUT_TOKENS, greedy
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs

STEP_TOKENS = 128
BLOCK_SIZE = 16
# So wide that 4 MiB of KV hold 256 tokens of a rank of two: an accelerator has no less.
WIDE = configs.TINY_MIXTRAL | {"num_hidden_layers": 2, "head_dim": 1024}
ORACLE: dict[str, Any] = {
    "tp": 2,
    "max_sequences": 16,
    "kv_bytes": 4 << 20,
    "device_bytes": 64 << 20,
    "max_tokens_per_step": STEP_TOKENS,
    "standbys": 3,
    "rank_restarts_max": 1_000,
}


def lose(deployment: Deployment, names: list[str], number: signal.Signals) -> None:
    """Kill ranks, or stop them, and wait until others have taken their seats, and all step."""
    before = deployment.rank_pids()
    victims = {deployment.kill(name, number) for name in names}

    def are_replaced() -> bool:
        now = deployment.rank_pids()
        is_serving = deployment.admin("/v1/layout")["phase"] == "serving"
        return is_serving and now.keys() == before.keys() and victims.isdisjoint(now.values())

    try:
        wait_until(are_replaced, f"{names} replaced", 60.0)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{deployment.explain()}") from None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "tp", "replicas", "compute"),
    [
        ("tiny-olmoe", 2, 1, "torch"),
        ("tiny-deepseek-v2", 4, 1, "auto"),
    ],
)
def test_greedy_tokens_equal_transformers(
    name: str,
    tp: int,
    replicas: int,
    compute: str,
    deploy: Callable[..., Deployment],
    model_folder: Callable[[str], Path],
) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 31, 32, 33, 100, 150)]
    settings = {"max_tokens_per_step": 32, "max_model_len": 256, "compute": compute}
    deployment = deploy(name, replicas=replicas, devices=replicas * tp, tp=tp, **settings)
    with httpx.Client(base_url=deployment.base_url, timeout=60, trust_env=False) as client:
        body = {"model": name, "prompt": prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    check_integrity(deployment)
    report = deployment.stop()
    assert sorted(request.tokens for request in report.requests.values()) == sorted(greedy(model_folder(name), prompts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.timeout(180)
def test_greedy_tokens_equal_transformers_where_kv_is_shared_and_taken(tmp_path: Path) -> None:
    """Each replica's KV holds one of two long prompts, so that some lose their blocks and are computed again; all
    have the same beginning, which those that come later find in the prefix cache."""
    model = random_checkpoint(tmp_path / "model", WIDE, seed=3, dtype="float32", tokenizer=True)
    rng = random.Random(3)
    beginning, fresh = ([rng.randrange(256) for _ in range(length)] for length in (2 * BLOCK_SIZE, 150))
    long = [beginning + [at, *fresh[: 110 + at]] for at in range(4)]
    short = [beginning + [at, *fresh[:at]] for at in range(4)] + [fresh[:1], fresh[:31], fresh[:32], fresh[:33]]
    block_bytes = load_spec(model, "float32", 2).kv_block_bytes(BLOCK_SIZE)
    settings = {"max_tokens_per_step": 32, "max_model_len": 256, "tp": 2, "block_size": BLOCK_SIZE}
    settings["kv_bytes"] = 256 // BLOCK_SIZE * block_bytes
    with collecting() as collector:
        deployment = Deployment(model, replicas=3, devices=6, otlp_endpoint=collector.url, **settings)
        try:
            deployment.wait_ready()
            assert {rank["kv_blocks"] for rank in deployment.admin("/v1/layout")["ranks"]} == {256 // BLOCK_SIZE}
            prefills = [
                prefills_of(deployment, collector, name, prompts) for name, prompts in (("a", long), ("b", short))
            ]
            check_integrity(deployment)
            report = deployment.stop()
        finally:
            deployment.discard()
    assert any(facts["elasticmoe.preemptions"] for facts in prefills[0])
    assert any(facts["elasticmoe.cached_tokens"] and not facts["elasticmoe.preemptions"] for facts in prefills[1])
    assert sorted(request.tokens for request in report.requests.values()) == sorted(greedy(model, long + short))


def prefills_of(
    deployment: Deployment, collector: Collector, request_id: str, prompts: list[list[int]]
) -> list[dict[str, Any]]:
    """What is traced of the computing of prompts that come in one request."""
    body = {"model": "model", "prompt": prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    options: dict[str, Any] = {"json": body, "headers": {"x-request-id": request_id}}
    answer = httpx.post(deployment.base_url + "/v1/completions", timeout=60, trust_env=False, **options)
    assert answer.status_code == 200, answer.text
    return [span.facts for span in collector.within(collector.request(request_id))["prefill"]]


async def test_it_scales_under_load_and_streams_are_exact(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=1, devices=6, **ORACLE)
    async with Load(deployment.base_url, clients=8, seed=9) as load:
        for replicas in (2, 3, 1):
            assert (await asyncio.to_thread(deployment.scale, replicas=replicas))["phase"] == "done"
            await asyncio.to_thread(check_integrity, deployment)
    assert deployment.metric("elasticmoe:recomputed_tokens_total") == 0
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 200
    assert deployment.stop().count("error") == 0


async def test_each_rank_tells_where_its_time_goes(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("oracle", replicas=1, devices=2, **ORACLE)
    async with Load(deployment.base_url, clients=4, seed=2):
        found = await asyncio.to_thread(wait_until, lambda: all_shares(deployment), "shares of both ranks")
    assert sorted(found) == ["r0t0", "r0t1"]
    for parts in found.values():
        assert sorted(parts) == ["overhead", "waiting"]
        assert 0 < sum(parts.values()) < 1, "the rest is mathematics"
    assert deployment.stop().count("error") == 0


def all_shares(deployment: Deployment) -> dict[str, dict[str, float]] | None:
    """By rank, as the router shows them; None while one of two ranks has not told what it waits."""
    text = httpx.get(deployment.base_url + "/metrics", timeout=60, trust_env=False).text
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name == "elasticmoe:step_share" else ():
            found.setdefault(sample.labels["rank"], {})[sample.labels["part"]] = sample.value
    return found if len(found) == 2 and all(parts["waiting"] for parts in found.values()) else None


@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.parametrize("tp", [4, 8])
async def test_wide_replicas_scale_and_survive(
    tp: int, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=1, devices=2 * tp, **ORACLE | {"tp": tp, "standbys": tp})
    async with TimedLoad(deployment.base_url, clients=4, seed=9) as load:
        assert (await asyncio.to_thread(deployment.scale, replicas=2))["phase"] == "done"
        assert deployment.metric("elasticmoe:recomputed_tokens_total") == 0
        await asyncio.to_thread(lose, deployment, [f"r1t{tp - 1}"], signal.SIGKILL)
        await load.wait_streams(4)
        await asyncio.to_thread(check_integrity, deployment)
        assert (await asyncio.to_thread(deployment.scale, replicas=1))["phase"] == "done"
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 50
    assert deployment.stop().count("error") == 0


@pytest.mark.timeout(180)
@pytest.mark.slow
async def test_ranks_that_die_or_stop_cost_no_token(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """A follower, a leader, one of each, a whole replica; a follower and a leader that live and do nothing; services
    that end beside them."""
    deployment = deploy("oracle", replicas=2, devices=4, rank_stall_s=2.4, **ORACLE)
    async with TimedLoad(deployment.base_url, clients=8, seed=4) as load:
        await load.wait_streams(4)
        for names in (["r0t1"], ["r1t0"], ["r0t0", "r1t1"], ["r0t0", "r0t1"]):
            await asyncio.to_thread(lose, deployment, names, signal.SIGKILL)
            await load.wait_streams(4)
            await asyncio.to_thread(check_integrity, deployment)
        for name in ("r1t1", "r0t0"):
            await asyncio.to_thread(lose, deployment, [name], signal.SIGSTOP)
            await load.wait_streams(4)
            await asyncio.to_thread(check_integrity, deployment)
        for service in ("hmm", "pool", "scaler"):
            pid = deployment.kill(service)
            await asyncio.to_thread(deployment.wait_restarted, service, pid)
            await asyncio.to_thread(deployment.wait_serving)
            await asyncio.to_thread(check_integrity, deployment)
            await load.wait_streams(4)
    assert deployment.metric("elasticmoe:recomputed_tokens_total") <= 8 * STEP_TOKENS
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 200
    assert deployment.stop().count("error") == 0
