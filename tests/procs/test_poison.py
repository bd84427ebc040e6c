"""Requests that their ranks fail of, in real processes: each ends alone, with one clear error, after a bounded number
of deaths, and all others get every token (promise P25). Kills that no request is to blame for end none."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.services.worker.engine.trial import GUILTY_FAILURES, SUSPECT_FAILURES
from tests.procs.clients import Stream, check_load_against_oracle, stream_completion
from tests.procs.deployment import Deployment
from tests.procs.failpoints import Failpoints
from tests.procs.gaps import TimedLoad
from tests.procs.integrity import check_integrity
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow, pytest.mark.timeout(400)]

FOLDER = Path(__file__).parent / "poison"
SETTINGS: dict[str, Any] = {
    "max_sequences": 16,
    "kv_bytes": 4 << 20,
    "device_bytes": 64 << 20,
    "standbys": 3,
    "rank_restarts_max": 1_000,
    "rank_stall_s": 6.0,  # for requests that hang; a busy machine may stop other ranks for as long as this
    "rank_restarts_window_s": 0.5,  # as many deaths as a test needs, one after the other
}
PROMPT = [7, 3, 9, 4, 1, 8, 2, 2, 6]


def load_poison() -> Any:
    spec = importlib.util.spec_from_file_location("poison", FOLDER / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


seed_of = load_poison().seed_of


@contextmanager
def poisoned(folder: Path, model: Path, replicas: int, **settings: Any) -> Iterator[tuple[Deployment, Failpoints]]:
    points = Failpoints(folder)
    environment = {"PYTHONPATH": str(FOLDER), load_poison().STRIKES: str(folder / "strikes")}
    settings = SETTINGS | settings
    deployment = Deployment(model, replicas=replicas, environment=environment, failpoint_dir=folder, **settings)
    deployment.wait_ready()
    try:
        yield deployment, points
        deployment.stop()
    finally:
        deployment.discard()


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[tuple[Deployment, Failpoints]]:
    with poisoned(tmp_path_factory.mktemp("points"), model_folder("oracle"), 2) as both:
        yield both


@pytest.fixture(scope="module")
def one(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[tuple[Deployment, Failpoints]]:
    with poisoned(tmp_path_factory.mktemp("points"), model_folder("oracle"), 1) as both:
        yield both


@pytest.fixture(scope="module", params=[("one", 1), ("two", 2)], ids=lambda param: param[0])
def either(request: pytest.FixtureRequest) -> tuple[Deployment, Failpoints, int]:
    """Both in turn, with their replicas. Of the module as they are: a test that started one would seem to leak it."""
    name, replicas = request.param
    return (*request.getfixturevalue(name), replicas)


def strikes(deployment: tuple[Deployment, Failpoints]) -> list[str]:
    """Ids under which bad requests have struck so far."""
    path = deployment[1].folder / "strikes"
    return path.read_text().split() if path.exists() else []


def num_deaths(deployment: Deployment) -> int:
    return deployment.log("pool").count("rank exited")


def settle(deployment: Deployment, replicas: int) -> None:
    wait_until(lambda: len(deployment.rank_pids()) == replicas, "all ranks are there", 60.0)
    check_integrity(deployment)


async def send(deployment: Deployment, seed: int, **fields: Any) -> Stream:
    async with httpx.AsyncClient(base_url=deployment.base_url, timeout=60, trust_env=False) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        return await stream_completion(http, model, PROMPT, 30, seed=seed, **({"temperature": 0.5} | fields))


async def try_one(deployment: Deployment, model: Path, seed: int, replicas: int, **fields: Any) -> tuple[int, float]:
    """Beside others, whose tokens are checked: how many ranks died of it, and the others' longest pause."""
    before = await asyncio.to_thread(num_deaths, deployment)
    async with TimedLoad(deployment.base_url, clients=8, seed=seed % 97, longest=60) as load:
        await load.wait_streams(4)
        begin = load.now()
        bad = await send(deployment, seed, **fields)
        await load.wait_streams(8)
        longest = load.longest_gap(begin)
    assert (bad.finish, bad.error) == (None, "request_failed")
    assert (load.broken, load.errors) == ([], {})
    assert check_load_against_oracle(load.streams, model) > 100
    await asyncio.to_thread(settle, deployment, replicas)
    return await asyncio.to_thread(num_deaths, deployment) - before, longest


LATER = len(PROMPT) + 6
CASES = [
    ("exchange", "raises", 0, 0),
    ("exchange", "raises", LATER, 0),
    ("exchange", "is killed", 0, 1 + GUILTY_FAILURES),
    ("exchange", "crashes", LATER, SUSPECT_FAILURES + GUILTY_FAILURES),
    ("exchange", "hangs", 0, 1 + GUILTY_FAILURES),
    ("choice", "raises", LATER, 0),
    ("choice", "is killed", LATER, SUSPECT_FAILURES + GUILTY_FAILURES),
    ("commit", "raises", LATER, SUSPECT_FAILURES + GUILTY_FAILURES),
    ("report", "raises", LATER, 0),
    ("plan", "raises", 0, 0),
    ("plan", "raises", LATER, 0),
    ("report", "is killed", LATER, SUSPECT_FAILURES + GUILTY_FAILURES),
]


@pytest.mark.parametrize(("stage", "action", "position", "deaths"), CASES)
async def test_it_ends_alone_on_two_ranks(
    two: tuple[Deployment, Failpoints],
    model_folder: Callable[[str], Path],
    stage: str,
    action: str,
    position: int,
    deaths: int,
) -> None:
    seed = seed_of(stage, action, position)
    died, longest = await try_one(two[0], model_folder("oracle"), seed, 2)
    print(f"{stage} {action} at {position}: {died} deaths, longest pause {longest:.2f} s")
    assert died == deaths


async def test_it_ends_alone_where_replicas_have_two_ranks(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    """The first one of a replica fails of it, and its follower waits for it in vain."""
    cases = [("exchange", "raises", LATER, 0), ("exchange", "is killed", 0, 1 + GUILTY_FAILURES)]
    with poisoned(tmp_path, model_folder("oracle"), 2, tp=2, devices=4) as (deployment, _):
        for stage, action, position, deaths in cases:
            seed = seed_of(stage, action, position)
            assert (await try_one(deployment, model_folder("oracle"), seed, 4))[0] == deaths, action


@pytest.mark.parametrize(
    ("stage", "action", "position", "deaths"),
    [("exchange", "raises", LATER, 0), ("exchange", "is killed", LATER, SUSPECT_FAILURES + GUILTY_FAILURES)],
)
async def test_it_ends_alone_on_the_only_rank(
    one: tuple[Deployment, Failpoints],
    model_folder: Callable[[str], Path],
    stage: str,
    action: str,
    position: int,
    deaths: int,
) -> None:
    died, _ = await try_one(one[0], model_folder("oracle"), seed_of(stage, action, position), 1)
    assert died == deaths


async def test_it_is_known_where_the_router_submits_it_anew(
    two: tuple[Deployment, Failpoints], model_folder: Callable[[str], Path]
) -> None:
    """The log probabilities of a token that was not told yet are lost with its rank: the router starts the request
    anew, under another id, maybe at another rank, and with what is known against it. It is computed like a prompt then,
    so one failed step makes it suspect. Where the rank's next process has computed the row that it adopted once more
    before it heard of that, the row has failed twice as what it was, which makes it suspect too."""
    before = strikes(two)
    died, _ = await try_one(two[0], model_folder("oracle"), seed_of("report", "is killed", LATER), 2, logprobs=1)
    ids = strikes(two)[len(before) :]
    first = len(list(itertools.takewhile(lambda name: "~" not in name, ids)))  # not started anew yet
    wanted = min(first, SUSPECT_FAILURES) + GUILTY_FAILURES
    assert len(ids) == died, ids
    # On a busy machine the row goes on, alone, while the router tries it elsewhere: it may not hear what is found out.
    assert died in {wanted, wanted + max(0, first - SUSPECT_FAILURES)}, ids


async def test_the_client_is_told_so(two: tuple[Deployment, Failpoints]) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True, "seed": seed_of("choice", "raises", 0)}
    async with httpx.AsyncClient(base_url=two[0].base_url, timeout=60, trust_env=False) as http:
        answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("request_failed", "server_error", None)
    assert "other requests are not affected" in error["message"]
    assert "out of bounds" not in answer.text


async def test_ten_deaths_in_a_row_end_nobody(
    either: tuple[Deployment, Failpoints, int], model_folder: Callable[[str], Path]
) -> None:
    """Each process of the seat dies in its first step: none is completed in between."""
    deployment, points, replicas = either
    point = "rank.step.begun@r0t0"
    before = await asyncio.to_thread(num_deaths, deployment)
    async with TimedLoad(deployment.base_url, clients=12, seed=3, shortest=20, longest=60) as load:
        await load.wait_streams(4)
        for _ in range(10):
            points.arm(point, "die")
            await asyncio.to_thread(points.wait_hit, point)
        await load.wait_streams(12)
    points.clear()
    assert (load.broken, load.errors) == ([], {})
    assert check_load_against_oracle(load.streams, model_folder("oracle")) > 300
    assert await asyncio.to_thread(num_deaths, deployment) - before == 10
    await asyncio.to_thread(settle, deployment, replicas)
    assert "is ended" not in deployment.log("pool").split("rank exited")[-1]
