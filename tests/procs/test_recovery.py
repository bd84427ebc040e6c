"""kill -9 of ranks under load: their streams go on after one short gap, with every token right (promises P5, P23)."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.native.ledger import Ledger
from tests.procs.clients import check_load_against_oracle
from tests.procs.deployment import Deployment
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.timeout(400)]

SETTINGS: dict[str, Any] = {
    "max_sequences": 48,
    "kv_bytes": 4 << 20,
    "device_bytes": 64 << 20,
    "standbys": 3,
    "rank_restarts_max": 1_000,
    "rank_restarts_window_s": 0.5,  # kills of a test follow one another faster than crashes that the limit is for
}
STEP_TOKENS = 256  # max_tokens_per_step here


def kill(deployment: Deployment, victims: list[int]) -> None:
    """kill -9 of ranks, and wait until others have taken all their seats and step."""
    for pid in victims:
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        layout = deployment.admin("/v1/layout")
        pids = {rank["pid"] for rank in layout["ranks"] if rank["ready"]}
        return layout["phase"] == "serving" and len(pids) == len(layout["ranks"]) and pids.isdisjoint(victims)

    try:
        wait_until(replaced, "ranks replaced", 60.0)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{deployment.explain()}") from None


@pytest.mark.slow
async def test_kills_at_random_moments_lose_nothing(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    rng = random.Random(20261121)
    deployment = deploy("oracle", replicas=3, max_tokens_per_step=STEP_TOKENS, **SETTINGS)
    kills, gaps = 0, []
    load = TimedLoad(deployment.base_url, clients=32, seed=4)
    async with load:
        await load.wait_streams(16)
        for turn in range(15):
            await asyncio.sleep(rng.random() * 0.3)  # a random moment of their steps
            pids = list((await asyncio.to_thread(deployment.rank_pids)).values())
            victims = rng.sample(pids, 2 if turn % 5 == 4 else 1)
            since = load.now()
            await asyncio.to_thread(kill, deployment, victims)
            kills += len(victims)
            await load.wait_streams(4)
            gaps.append(load.longest_gap(since))
            await asyncio.to_thread(check_integrity, deployment)
    print("gaps", [round(gap, 2) for gap in gaps])
    assert kills == 18
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 5_000
    assert load.broken == []
    recomputed = deployment.metric("elasticmoe:recomputed_tokens_total")
    print("recomputed", recomputed, "resubmitted", deployment.metric("elasticmoe:requests_resubmitted_total"))
    assert recomputed <= kills * STEP_TOKENS
    report = deployment.stop()
    assert report.count("error") == 0
    assert report.count("finish") == len(load.streams)


@pytest.mark.slow
async def test_kills_during_resizes_lose_nothing(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    rng = random.Random(5)
    deployment = deploy("oracle", replicas=2, devices=4, **SETTINGS)
    load = TimedLoad(deployment.base_url, clients=16, seed=6)
    async with load:
        await load.wait_streams(8)
        for replicas in (4, 2, 3, 1, 3):
            pids = await asyncio.to_thread(deployment.rank_pids)
            resize = asyncio.create_task(asyncio.to_thread(deployment.scale, replicas=replicas))
            await asyncio.sleep(rng.random() * 0.6)  # some fall into the migration, others before or behind it
            os.kill(rng.choice(list(pids.values())), signal.SIGKILL)
            operation = await resize
            assert operation["phase"] in ("done", "aborted"), operation
            await asyncio.to_thread(deployment.wait_serving)
            await load.wait_streams(8)
            await asyncio.to_thread(check_settled, deployment)
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    assert load.broken == []
    report = deployment.stop()
    assert report.count("error") == 0
    assert report.count("finish") == len(load.streams)


def check_settled(deployment: Deployment) -> None:
    """check_integrity, once no rank is being replaced any more."""
    wait_until(lambda: deployment.admin("/v1/layout")["phase"] == "serving", "all seats filled", 60.0)
    check_integrity(deployment)


async def test_what_the_ledger_cannot_tell_the_router_can(
    deploy: Callable[..., Deployment], model_folder: Callable[[str], Path]
) -> None:
    """Requests that wait at the dead rank, and rows that are broken: submitted anew, with the tokens they had."""
    settings = SETTINGS | {"max_sequences": 4}
    deployment = deploy("oracle", replicas=2, **settings)
    load = TimedLoad(deployment.base_url, clients=24, seed=7, shortest=60)
    async with load:
        for _ in range(3):
            await load.wait_streams(6)
            pid = (await asyncio.to_thread(deployment.rank_pids))["r0t0"]
            os.kill(pid, signal.SIGSTOP)
            while await asyncio.to_thread(break_rows, deployment, "host:0") == 0:  # it has just been given none
                with suppress(ProcessLookupError):  # a rank that stood for long was ejected
                    os.kill(pid, signal.SIGCONT)
                await load.wait_streams(1)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            await asyncio.to_thread(kill, deployment, [pid])
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 1_000
    assert load.broken == []
    assert "ledger row dropped" in deployment.log("pool")
    assert deployment.metric("elasticmoe:requests_resubmitted_total") > 6
    report = deployment.stop()
    assert report.count("error") == 0
    touched = [r for r in report.requests.values() if r.num_resubmits and r.tokens]
    assert touched


def break_rows(deployment: Deployment, device: str) -> int:
    """Give every second live row of a device's ledger a block that does not exist. Its rank must be stopped or dead."""
    folder = Path(f"/proc/{deployment.pids['hmm']}/fd")
    path = next(fd for fd in folder.iterdir() if os.readlink(fd).startswith(f"/memfd:{device}.ledger"))
    with open(path, "r+b", buffering=0) as file:
        memory = mmap.mmap(file.fileno(), 0)
    ledger = Ledger(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory))
    broken = ledger.rows()[::2]
    for row in broken:
        ledger.append_blocks(row, [2**31 - 1])
    return len(broken)
