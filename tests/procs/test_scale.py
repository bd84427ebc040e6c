"""Growing and shrinking under load: nothing fails, nothing is lost, nothing is computed twice, and the bytes are where
the plan says."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.procs.clients import Load, check_against_undisturbed, check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.integrity import check_integrity

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(900)]

RESIZES = 50
DEVICES = 6
SETTINGS: dict[str, Any] = {"max_sequences": 48, "kv_bytes": 4 << 20, "device_bytes": 64 << 20, "standbys": 3}


def replicas_of(deployment: Deployment) -> list[int]:
    return sorted({rank["replica"] for rank in deployment.admin("/v1/layout")["ranks"]})


def draw_target(rng: random.Random, present: list[int]) -> dict[str, Any]:
    """A random resize: to a number of replicas, or without some that may be any."""
    while True:
        if len(present) > 1 and rng.random() < 0.4:
            return {"remove": rng.sample(present, rng.randint(1, len(present) - 1))}
        replicas = rng.randint(1, DEVICES)
        if replicas != len(present):
            return {"replicas": replicas}


def check_figures(operation: dict[str, Any]) -> None:
    """What was done is what was planned, and real pages never exceeded what was predicted."""
    assert operation["phase"] == "done", operation
    figures = operation["figures"]
    assert figures["bytes_copied"] == figures["bytes_planned"] == operation["planned"]["bytes_copied"], operation
    assert 0 < figures["peak_bytes_total"] <= figures["peak_bytes_planned"] == operation["planned"]["peak_bytes"]
    for device, change in operation["planned"]["devices"].items():
        assert figures["peak_bytes"].get(device, 0) <= change["peak_bytes"], (device, operation)


async def resize_under_load(deployment: Deployment, folder: Path, clients: int, resizes: int = RESIZES) -> int:
    """At random, with everything checked that can be. Returns the number of tokens that were compared."""
    rng = random.Random(20251002)
    async with Load(deployment.base_url, clients=clients, seed=1) as load:
        for _ in range(resizes):
            target = draw_target(rng, await asyncio.to_thread(replicas_of, deployment))
            operation = await asyncio.to_thread(deployment.scale, **target)
            check_figures(operation)
            await asyncio.to_thread(check_integrity, deployment)
    metrics = httpx.get(deployment.base_url + "/metrics", timeout=60, trust_env=False).text
    (recomputed,) = re.findall(r"^elasticmoe:recomputed_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert float(recomputed) == 0
    report = deployment.stop()
    assert report.count("error") == 0
    assert report.count("finish") == len(load.streams)
    return check_load_against_oracle(load.streams, folder)


async def test_50_random_resizes_under_32_streams_are_exact(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2, devices=DEVICES, **SETTINGS)
    assert await resize_under_load(deployment, model_folder("oracle"), clients=32) > 10_000


async def test_50_random_resizes_of_a_cache_of_latents_are_exact(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """One plane of an odd width in place of keys and values; fewer streams, as the resizes are what it is about."""
    deployment = deploy("oracle-latent", replicas=2, devices=DEVICES, **SETTINGS)
    assert await resize_under_load(deployment, model_folder("oracle-latent"), clients=8) > 2_000


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
async def test_random_resizes_of_ranks_that_compute_with_torch_are_exact(
    tp: int, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    resizes = 16 // tp
    deployment = deploy("oracle", replicas=2, devices=tp * DEVICES, tp=tp, compute="torch", **SETTINGS)
    assert await resize_under_load(deployment, model_folder("oracle"), clients=8, resizes=resizes) > 20 * resizes


@pytest.mark.parametrize("resizes", [6, pytest.param(RESIZES, marks=pytest.mark.soak)])
async def test_random_resizes_of_replicas_of_two_ranks_are_exact(
    resizes: int, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """Up to six of them; all KV moves, from each rank to the one of the same tp index."""
    deployment = deploy("oracle", replicas=2, devices=2 * DEVICES, tp=2, **SETTINGS)
    assert await resize_under_load(deployment, model_folder("oracle"), clients=8, resizes=resizes) > 20 * resizes


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny-mixtral", {}),
        ("tiny-qwen3-moe", {}),
        pytest.param("tiny-mixtral", {"compute": "torch"}, id="torch", marks=pytest.mark.slow),
        pytest.param("tiny-qwen3-moe", {"dtype": "bfloat16", "activations": "bfloat16"}, id="rounded"),
    ],
)
async def test_greedy_streams_across_a_resize_equal_an_undisturbed_run(
    name: str, settings: dict[str, Any], deploy: Callable[..., Deployment]
) -> None:
    deployment = deploy(name, replicas=2, devices=4, max_model_len=512, standbys=3, **settings)
    async with Load(deployment.base_url, clients=8, seed=3, prompts=12, shortest=200, longest=200) as load:
        for replicas in (4, 1, 3, 2):
            assert (await asyncio.to_thread(deployment.scale, replicas=replicas))["phase"] == "done"
            await asyncio.to_thread(check_integrity, deployment)
    assert len(load.streams) >= 8
    check_against_undisturbed(deployment.base_url, name, load.streams)


def kv_blocks(deployment: Deployment) -> dict[str, int]:
    return {rank["device"]: rank["kv_blocks"] for rank in deployment.admin("/v1/layout")["ranks"]}


def weights(deployment: Deployment) -> dict[str, int]:
    return {entry["device"]: entry["memory"]["weights"] for entry in deployment.admin("/v1/devices")["devices"]}


def test_memory_that_experts_leave_becomes_kv_and_comes_back(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy("tiny-mixtral", replicas=1, devices=3, kv_bytes=4 << 20, device_bytes=64 << 20)
    before_kv, before_weights = kv_blocks(deployment), weights(deployment)
    assert deployment.scale(replicas=3)["phase"] == "done"
    after_kv, after_weights = kv_blocks(deployment), weights(deployment)
    given_up = before_weights["host:0"] - after_weights["host:0"]
    assert given_up > 0
    status = deployment.admin("/v1/devices")["devices"][0]["memory"]
    grown = after_kv["host:0"] - before_kv["host:0"]
    bytes_per_block = status["kv"] // after_kv["host:0"]
    handle_bytes = 2 << 20
    assert 0 <= given_up - grown * bytes_per_block < handle_bytes  # in whole handles
    assert deployment.scale(remove=[1, 2])["phase"] == "done"
    assert (kv_blocks(deployment), weights(deployment)["host:0"]) == (before_kv, before_weights["host:0"])
    check_integrity(deployment)
