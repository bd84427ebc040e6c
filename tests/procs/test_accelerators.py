"""Whole deployments on accelerators by their real names (`npu:0`, `cuda:0`), on stand-ins of their drivers: torch
computes with its CPU on the memory that they share out. They serve, grow, shrink and recover, and give all back.

`make accel-standin` runs these, those that are marked `accel` too, and other tests of whole deployments on both kinds.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.cli.models import configs, random_checkpoint
from elasticmoe.services.worker.rank.lockstep import STEP_MS_MAX
from tests.devices import standins
from tests.procs.clients import Load, check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.greedy import OUTPUT_TOKENS, greedy
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS: dict[str, Any] = {"kv_bytes": 8 << 20, "max_sequences": 16, "standbys": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": configs.TINY_MIXTRAL,
    "deepseek_v2": configs.TINY_DEEPSEEK_V2,
    "qwen2_moe": configs.TINY_QWEN2_MOE,
    "qwen3_moe": configs.TINY_QWEN3_MOE,
    "olmoe": configs.TINY_OLMOE,
    "granitemoe": configs.TINY_GRANITEMOE,
    "glm4_moe": configs.TINY_GLM4_MOE,
    "glm4_moe_lite": configs.TINY_GLM4_MOE_LITE,
    "deepseek_v3": configs.TINY_DEEPSEEK_V3,
}
IN_CI = [("npu", "deepseek_v2"), ("cuda", "mixtral")]  # of each kind of attention one, on the other accelerator


class Accelerators:
    """Of one kind, in memory of their own. Processes that this test starts have them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self._folder = folder

    def used(self) -> list[int]:
        """Bytes of each that some process holds."""
        return standins.used(self.kind, self._folder)

    def fault(self, pid: int) -> None:
        """Take its contexts from a process."""
        standins.fault(self._folder, pid)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def accelerators(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerators]:
    """What is left of their memory at the end is an error."""
    with standins.memory(monkeypatch) as folder:
        standins.install(kind, monkeypatch)
        made = Accelerators(kind, folder)
        yield made
        wait_until(lambda: not any(made.used()), f"all memory given back: {made.used()}", 60.0)


both = pytest.mark.parametrize("kind", standins.KINDS, indirect=True)


def ends_of_ranks(deployment: Deployment) -> str:
    """What was said of ranks' ends, and of memory that was dropped."""
    words = ("rank_exited", "rank exit", "eject", "ends", "memory_replaced", "dropped", "keeper", "detached", "refused")
    lines = [
        f"{name}: {line}"
        for name in ("scaler", "hmm", "pool")
        for line in deployment.log(name).splitlines()
        if any(word in line for word in words)
    ]
    return "\n".join(lines)


async def streams(load: Load, num: int) -> None:
    """Until so many more have ended."""
    wanted = len(load.streams) + num
    await asyncio.to_thread(wait_until, lambda: len(load.streams) >= wanted, f"{num} streams", 60.0)


async def restart(deployment: Deployment, name: str) -> None:
    """kill -9 of a service, and until it is there again and all serve."""
    old = await asyncio.to_thread(deployment.kill, name)
    await asyncio.to_thread(deployment.wait_restarted, name, old)
    await asyncio.to_thread(deployment.wait_serving)


@both
async def test_a_deployment_serves_scales_and_recovers(
    kind: str, accelerators: Accelerators, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=1, devices=3, **SETTINGS)
    assert deployment.record.devices == f"{kind}:0-2"
    memory = [device["memory"] for device in deployment.admin("/v1/devices")["devices"]]
    assert [(one["total"], one["budget"]) for one in memory] == [(1 << 30, 818 << 20)] * 3  # 80 %, in whole pages
    async with Load(deployment.base_url, clients=8, seed=1) as load:
        assert (await asyncio.to_thread(deployment.scale, replicas=3))["phase"] == "done"
        assert [nbytes > 0 for nbytes in accelerators.used()] == [True, True, True, False]
        assert {rank["device"] for rank in deployment.admin("/v1/layout")["ranks"]} == {f"{kind}:{n}" for n in range(3)}
        await streams(load, 8)
        before = deployment.rank_pids()
        deployment.kill("r1t0")
        await streams(load, 16)
        for name in ("hmm", "keeper"):
            await restart(deployment, name)
            await streams(load, 16)
        now = deployment.rank_pids()
        # An NPU's memory is nobody's but its maker's: ranks of a successor are new ones. A GPU's is taken over.
        stayed = [now[name] == before[name] for name in ("r0t0", "r2t0")]
        assert stayed == [kind == "cuda"] * 2, ends_of_ranks(deployment)
        await asyncio.to_thread(check_integrity, deployment)
        assert (await asyncio.to_thread(deployment.scale, replicas=2))["phase"] == "done"
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 500
    assert deployment.stop(is_clean=kind == "cuda").count("error") == 0
    assert accelerators.used() == [0] * 4


@pytest.mark.parametrize("kind", ["cuda"], indirect=True)
async def test_a_rank_whose_context_is_lost_ends_and_another_one_has_its_device(
    accelerators: Accelerators, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """A sticky error is its process's alone. It shows when the rank gives memory away, as here, or in what torch
    computes."""
    deployment = deploy("oracle", replicas=2, devices=3, **SETTINGS)
    async with Load(deployment.base_url, clients=8, seed=11) as load:
        await streams(load, 8)
        before = await asyncio.to_thread(deployment.rank_pids)
        accelerators.fault(before["r1t0"])
        await asyncio.to_thread(resized, deployment, replicas=3)

        def changed() -> set[str]:
            now = deployment.rank_pids()
            return {name for name, pid in before.items() if now.get(name, pid) != pid}

        assert await asyncio.to_thread(wait_until, changed, "another rank", 60.0) == {"r1t0"}, ends_of_ranks(deployment)
        await streams(load, 8)
        await asyncio.to_thread(resized, deployment, replicas=2)
        await streams(load, 8)
        await asyncio.to_thread(check_integrity, deployment)
        devices = (await asyncio.to_thread(deployment.admin, "/v1/devices"))["devices"]
        assert [device["failure"] for device in devices] == [""] * 3
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 300
    ended = [line for line in deployment.log("pool").splitlines() if "rank exited" in line and "driver_failed" in line]
    assert len(ended) == 1, ends_of_ranks(deployment)
    assert "answers 700, CUDA_ERROR_ILLEGAL_ADDRESS" in ended[0]
    assert deployment.stop().count("error") == 0
    assert accelerators.used() == [0] * 4


def resized(deployment: Deployment, **body: Any) -> None:
    operation = deployment.scale(**body)
    assert operation["phase"] == "done", operation


@both
async def test_devices_on_one_accelerator_serve_beside_others_and_are_lost_with_it(
    kind: str, accelerators: Accelerators, deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    deployment = deploy("oracle", replicas=2, devices=f"{kind}:0/3,{kind}:1", **SETTINGS)
    parts, whole = [f"{kind}:0.{part}" for part in range(3)], f"{kind}:1"

    def ranks() -> dict[str, str]:
        return {f"r{rank['replica']}": rank["device"] for rank in deployment.admin("/v1/layout")["ranks"]}

    budgets = {one["device"]: one["memory"]["budget"] >> 20 for one in deployment.admin("/v1/devices")["devices"]}
    assert budgets == dict.fromkeys(parts, 272) | {whole: 818}
    assert ranks() == {"r0": parts[0], "r1": whole}
    async with Load(deployment.base_url, clients=8, seed=3) as load:
        await streams(load, 8)
        await asyncio.to_thread(resized, deployment, replicas=3)
        assert ranks() == {"r0": parts[0], "r1": whole, "r2": parts[1]}
        assert [nbytes > 0 for nbytes in accelerators.used()] == [True, True, False, False]
        await streams(load, 16)
        await asyncio.to_thread(resized, deployment, remove=[2], lost=True)
        assert ranks() == {"r1": whole}, "what else is on it is lost, too"
        await streams(load, 8)
        status, refused = await asyncio.to_thread(deployment.admin_call, "POST", "/v1/scale", {"replicas": 2})
        assert (status, refused["error"]["code"]) == (422, "too_few_devices"), refused
        await asyncio.to_thread(resized, deployment, devices=[whole, parts[2]])
        await streams(load, 8)
        await asyncio.to_thread(resized, deployment, replicas=3)  # it is back, and so are its other parts
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 300
    assert deployment.stop().count("error") == 0
    assert accelerators.used() == [0] * 4


@pytest.mark.usefixtures("accelerators")
@pytest.mark.parametrize("kind", ["npu"], indirect=True)
async def test_a_rank_that_dies_with_the_hmm_in_the_midst_of_a_step_is_waited_for_no_longer_than_a_load(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nobody ends the generation of the bus, which has gone with the HMM: who waits in the step hears of that."""
    points = Failpoints(tmp_path)
    deployment = deploy("oracle", replicas=3, failpoint_dir=tmp_path, **SETTINGS)
    async with Load(deployment.base_url, clients=8, seed=4) as load:
        await streams(load, 8)
        before = deployment.rank_pids()
        points.arm("rank.combine@r1t0")
        held = await asyncio.to_thread(points.wait_hit, "rank.combine@r1t0")
        await asyncio.sleep(1.0)  # the others wait for it, in the exchange of that layer
        old = deployment.kill("hmm")
        os.kill(held, signal.SIGKILL)
        begun = time.monotonic()
        points.forget()
        await asyncio.to_thread(deployment.wait_restarted, "hmm", old)
        await asyncio.to_thread(
            wait_until, lambda: not set(deployment.rank_pids().values()) & set(before.values()), "other ranks", 60.0
        )
        assert time.monotonic() - begun < STEP_MS_MAX / 2e3, ends_of_ranks(deployment)
        await streams(load, 16)
        await asyncio.to_thread(check_integrity, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 200
    assert deployment.stop(is_clean=False).count("error") == 0


@pytest.mark.parametrize("kind", ["npu"], indirect=True)
async def test_an_npu_that_has_no_room_for_the_model_twice_is_loaded_anew_by_an_hmms_successor(
    accelerators: Accelerators,
    deploy: Callable[..., Deployment],
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STANDIN_BYTES", str(48 << 20))  # of which budgets are 38; a rank takes 36
    deployment = deploy("oracle", replicas=2, kv_bytes=4 << 20, max_sequences=16, standbys=2)
    assert all(nbytes > 24 << 20 for nbytes in accelerators.used()[:2])
    async with Load(deployment.base_url, clients=8, seed=2) as load:
        await streams(load, 8)
        await restart(deployment, "hmm")
        await streams(load, 24)
        await asyncio.to_thread(check_integrity, deployment)
    assert "is short" in deployment.log("hmm")
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 200
    assert deployment.stop(is_clean=False).count("error") == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(kind, family, marks=[] if (kind, family) in IN_CI else [pytest.mark.accel])
        for family in FAMILIES
        for kind in standins.KINDS
    ],
    indirect=["kind"],
)
@pytest.mark.usefixtures("accelerators")
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    rng = random.Random(family)
    model = random_checkpoint(tmp_path / family, FAMILIES[family], seed=8, dtype="float32", tokenizer=True)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 33, 70)]
    body = {"model": family, "prompt": prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    settings = SETTINGS | {"kv_bytes": 64 << 20}  # blocks of odd sizes fill whole pages in large handles only
    deployment = Deployment(model, replicas=2, devices=2, max_tokens_per_step=32, max_model_len=256, **settings)
    try:
        deployment.wait_ready()
        answer = httpx.post(f"{deployment.base_url}/v1/completions", json=body, timeout=100, trust_env=False)
        assert answer.status_code == 200, answer.text
        report = deployment.stop()
    finally:
        deployment.discard()
    assert sorted(request.tokens for request in report.requests.values()) == sorted(greedy(model, prompts))
