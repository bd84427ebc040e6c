"""Large texts leave the router with much memory that nobody uses: it goes back to the system after they have ended."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest

from elasticmoe.common.protocol.errors import ElasticMoEError, Overloaded
from elasticmoe.services.router.text import jobs, texts
from elasticmoe.services.router.text.jobs import Job, Reply
from elasticmoe.services.router.text.texts import LARGE_CHARS, Texts
from elasticmoe.services.router.text.tokenizer import ServedModel
from tests.procs.router_harness import write_model

LARGE = "x" * (LARGE_CHARS + 1)


class Crowded:
    """Workers with whom a job waits for its turn until it is let go, and is refused then."""

    def __init__(self) -> None:
        self.turns = defaultdict[str, asyncio.Event](asyncio.Event)

    async def run(self, job: Job, client: str) -> Reply:
        await self.turns[client].wait()
        raise Overloaded("no turn came")


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When memory was given back."""
    found: list[float] = []
    monkeypatch.setattr(texts, "TRIM_AFTER_SECONDS", 0.01)
    monkeypatch.setattr(texts, "give_memory_back", lambda: found.append(asyncio.get_running_loop().time()))
    return found


async def tokenize(served: Texts, text: str, client: str) -> None:
    with pytest.raises(ElasticMoEError):
        await served.tokenize(jobs.Tokenize(text, None, False, False, 10_000_000), client)


async def idle(num: int = 10) -> None:
    """So many times as long as memory is kept."""
    await asyncio.sleep(num * 0.01)


async def until(given_back: list[float], num: int) -> None:
    async with asyncio.timeout(30):
        while len(given_back) < num:
            await idle(1)


async def test_memory_is_given_back_after_a_text_however_long_it_waited(
    tmp_path: Path, given_back: list[float]
) -> None:
    workers = Crowded()
    served = Texts(ServedModel(write_model(tmp_path / "model"), "m").codec, workers)
    first, second = (asyncio.create_task(tokenize(served, LARGE, client)) for client in ("a", "b"))
    await idle()
    assert given_back == []  # nothing has ended yet
    for client, task, num in (("a", first, 1), ("b", second, 2)):
        ended_at = asyncio.get_running_loop().time()
        workers.turns[client].set()
        await task
        await until(given_back, num)
        assert given_back[-1] > ended_at
    await idle()
    assert len(given_back) == 2  # and nobody looks any more


async def test_what_ends_shortly_before_memory_is_given_back_is_not_missed(
    tmp_path: Path, given_back: list[float]
) -> None:
    """What a request held is free only when its answer has gone."""
    workers = Crowded()
    served = Texts(ServedModel(write_model(tmp_path / "model"), "m").codec, workers)
    tasks = [asyncio.create_task(tokenize(served, LARGE, client)) for client in "ab"]
    await idle(1)
    for client in "ab":
        workers.turns[client].set()
    await asyncio.gather(*tasks)
    await until(given_back, 2)
    await idle()
    assert len(given_back) == 2


async def test_short_texts_leave_nothing(tmp_path: Path, given_back: list[float]) -> None:
    workers = Crowded()
    served = Texts(ServedModel(write_model(tmp_path / "model"), "m").codec, workers)
    task = asyncio.create_task(tokenize(served, "x" * 10_000, "a"))
    await idle(1)
    workers.turns["a"].set()
    await task
    await idle()
    assert given_back == []
