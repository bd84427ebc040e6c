"""An open loop: arrivals go out at their time whatever the server does, and each of them is told once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from elasticmoe.cli.load.endpoint import endpoint_of
from elasticmoe.cli.load.player import Player
from elasticmoe.cli.load.prompts import Prompts
from elasticmoe.cli.load.result import NO_ROOM, Result
from elasticmoe.cli.load.sample import NO_CONNECTION, TIMED_OUT
from elasticmoe.cli.traces.arrival import Arrival

GOOD = (
    b"HTTP/1.1 200 OK\r\n\r\n"
    b'data: {"choices":[{"text":"a"}]}\n\n'
    b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"


@asynccontextmanager
async def server(answer: Callable[[int], bytes | None]) -> AsyncIterator[str]:
    """Answers request number N with `answer(N)`; None: never, until its client leaves."""
    handlers: set[asyncio.Task[None]] = set()
    num = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        told, num = answer(num), num + 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if told is None:
                await reader.read()
            else:
                writer.write(told)
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    running = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
    finally:
        running.close()
        await running.wait_closed()
        async with asyncio.timeout(60):
            await asyncio.gather(*handlers)


class Told:
    """What a player tells; a list by number."""

    def __init__(
        self, url: str, *, connections_max: int = 100, silence_s: float = 30.0, retry_s: float | None = None
    ) -> None:
        self.results: list[Result] = []
        self.gaps: list[list[float]] = []
        self.player = Player(
            endpoint_of(url),
            "m",
            Prompts(1, 512),
            self._on_result,
            connections_max=connections_max,
            silence_s=silence_s,
            retry_s=retry_s,
        )

    def _on_result(self, result: Result, gaps: list[float]) -> None:
        self.results.append(result)
        self.gaps.append(gaps)

    async def play(self, arrivals: list[Arrival]) -> list[Result]:
        async with asyncio.timeout(20):
            await self.player.play(arrivals)
        return sorted(self.results, key=lambda result: result.number)


def every(seconds: float, num: int) -> list[Arrival]:
    return [Arrival(number * seconds, 8, 2) for number in range(num)]


async def test_each_arrival_goes_out_at_its_time() -> None:
    async with server(lambda _: GOOD) as url:
        found = await Told(url).play(every(0.02, 10))
    assert [result.number for result in found] == list(range(10))
    assert {(result.outcome, result.error, result.tokens, result.status) for result in found} == {
        ("completed", "", 2, 200)
    }
    for result in found:
        assert result.scheduled_s == pytest.approx(result.number * 0.02, abs=1e-3)
        assert result.sent_s is not None
        assert result.first_token_s is not None
        assert result.last_token_s is not None
        assert result.ended_s is not None
        assert 0 <= result.scheduled_s <= result.sent_s <= result.first_token_s <= result.last_token_s <= result.ended_s
        assert result.lag_ms / 1e3 <= result.sent_s - result.scheduled_s + 1e-3


async def test_a_server_that_never_answers_does_not_hold_up_the_schedule() -> None:
    """All have been sent though none has ended: what makes a loop open."""
    async with server(lambda _: None) as url:
        told = Told(url)
        task = asyncio.create_task(told.play(every(0.01, 20)))
        async with asyncio.timeout(60):
            while told.player.num_running < 20:
                await asyncio.sleep(0.005)
        assert told.results == []
        told.player.stop()
        found = await task
    assert len(found) == 20
    assert {(result.outcome, result.error, result.first_token_s) for result in found} == {("interrupted", "", None)}


async def test_arrivals_beyond_the_connections_are_told_as_not_sent() -> None:
    async with server(lambda _: None) as url:
        told = Told(url, connections_max=3)
        task = asyncio.create_task(told.play(every(0.01, 10)))
        async with asyncio.timeout(60):
            while len(told.results) < 7:
                await asyncio.sleep(0.005)
        told.player.stop()
        found = await task
    assert [result.outcome for result in found] == ["interrupted"] * 3 + ["not_sent"] * 7
    assert [result.error for result in found] == [""] * 3 + [NO_ROOM] * 7
    assert all(result.sent_s is None and result.tokens == 0 for result in found[3:])


async def test_a_server_that_is_silent_is_a_failure_of_each_request() -> None:
    async with server(lambda _: None) as url:
        found = await Told(url, silence_s=1.0).play(every(0.0, 3))
    assert [(result.outcome, result.error) for result in found] == [("failed", TIMED_OUT)] * 3


async def test_a_refused_request_is_not_sent_again() -> None:
    async with server(lambda number: BUSY if number % 2 else GOOD) as url:
        found = await Told(url).play(every(0.05, 6))
    assert [result.outcome for result in found] == ["completed", "refused"] * 3
    assert [result.status for result in found] == [200, 429] * 3


async def test_a_server_that_is_gone_is_a_failure_of_each_request() -> None:
    async with server(lambda _: GOOD) as url:
        pass
    found = await Told(url).play(every(0.0, 3))
    assert [(result.outcome, result.error) for result in found] == [("failed", NO_CONNECTION)] * 3
    assert all(result.ended_s is not None and result.sent_s is None for result in found)


async def test_stop_sends_nothing_more() -> None:
    async with server(lambda _: GOOD) as url:
        told = Told(url)
        task = asyncio.create_task(told.play([*every(0.0, 2), Arrival(3600.0, 8, 2)]))
        async with asyncio.timeout(60):
            while len(told.results) < 2:
                await asyncio.sleep(0.005)
        told.player.stop()
        assert len(await task) == 2


async def test_one_that_is_stopped_before_it_began_is_told_too() -> None:
    told = Told("http://127.0.0.1:1")

    def arrivals() -> Iterator[Arrival]:
        yield Arrival(0.0, 8, 2)
        raise AssertionError("the first was not stopped")

    spawn = told.player._spawn

    def spawn_and_stop(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = spawn(work)
        if told.player._unbegun:
            told.player.stop()
        return task

    told.player._spawn = spawn_and_stop  # type: ignore[method-assign]
    async with asyncio.timeout(60):
        await told.player.play(arrivals())
    assert [(result.number, result.outcome, result.sent_s) for result in told.results] == [(0, "interrupted", None)]


async def test_a_client_that_is_late_says_so() -> None:
    """All are due at once, and before: each is as late as it was to begin."""
    async with server(lambda _: GOOD) as url:
        begun = time.monotonic()
        found = await Told(url).play([Arrival(-0.5, 8, 2), Arrival(-0.25, 8, 2)])
        took_ms = (time.monotonic() - begun) * 1e3
    assert 500 <= found[0].lag_ms <= 500 + took_ms
    assert 250 <= found[1].lag_ms <= 250 + took_ms


async def test_results_that_cannot_be_kept_end_it() -> None:
    async with server(lambda _: GOOD) as url:
        told = Told(url)

        def fail(*_: object) -> None:
            raise OSError("disk full")

        told.player._on_result = fail
        with pytest.raises(OSError, match="disk full"):
            await told.play([*every(0.0, 1), Arrival(3600.0, 8, 2)])


async def test_no_arrivals_are_no_work() -> None:
    assert await Told("http://127.0.0.1:1").play([]) == []


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_have_their_length_and_share_what_their_prefixes_say() -> None:
    prompts = Prompts(1, 10)
    first = prompts.make(0, Arrival(0, 35, 1, (1, 2, 3)))
    second = prompts.make(1, Arrival(0, 24, 1, (1, 2, 9)))
    assert (len(first), len(second)) == (35, 24)
    assert first[:20] == second[:20]
    assert first[20:24] != second[20:24]
    assert first[:20] != prompts.make(2, Arrival(0, 35, 1, (2, 1)))[:20]
    assert prompts.make(3, Arrival(0, 7, 1, (1, 2))) == first[:7]
    assert all(0 <= token < 256 for token in first)


def test_prompts_without_prefixes_share_nothing_and_follow_the_seed() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(16, 400) for _ in range(50)]
    made = [Prompts(1, 512).make(number, Arrival(0, length, 1)) for number, length in enumerate(lengths)]
    assert [len(prompt) for prompt in made] == lengths
    assert len({tuple(prompt[:16]) for prompt in made}) == 50
    assert Prompts(1, 512).make(3, Arrival(0, lengths[3], 1)) == made[3]
    assert Prompts(2, 512).make(3, Arrival(0, lengths[3], 1)) != made[3]


async def test_a_patient_load_sends_again_what_was_turned_away_and_its_time_counts_from_when_it_was_due() -> None:
    async with server(lambda number: BUSY if number < 3 else GOOD) as url:
        told = Told(url, retry_s=0.05)
        (found,) = await told.play(every(1, 1))
    assert (found.outcome, found.status, found.tokens, told.player.num_retries) == ("completed", 200, 2, 3)
    assert found.scheduled_s == pytest.approx(0.0, abs=1e-3)
    assert found.first_token_s is not None
    assert found.first_token_s >= 0.15


async def test_a_patient_load_waits_for_a_server_that_comes_back() -> None:
    async with server(lambda _: GOOD) as url:
        pass
    told = Told(url, retry_s=0.02)
    playing = asyncio.create_task(told.play(every(1, 1)))
    while told.player.num_retries < 2:
        await asyncio.sleep(0.005)
    async with server(lambda _: GOOD) as other:
        told.player.set_endpoints(endpoint_of(other))
        (found,) = await playing
    assert (found.outcome, found.error) == ("completed", "")


async def test_a_patient_load_does_not_send_again_what_was_taken() -> None:
    async with server(lambda _: b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices":[{"text":"a"}]}\n\n') as url:
        told = Told(url, retry_s=0.01)
        (found,) = await told.play(every(1, 1))
    assert (found.outcome, found.error, told.player.num_retries) == ("failed", "cut_off", 0)


async def test_a_patient_load_that_is_stopped_tells_of_what_waits_for_its_turn() -> None:
    async with server(lambda _: BUSY) as url:
        told = Told(url, retry_s=30.0)
        playing = asyncio.create_task(told.play(every(1, 1)))
        while told.player.num_retries < 1:
            await asyncio.sleep(0.005)
        told.player.stop()
        (found,) = await playing
    assert found.outcome == "interrupted"


async def test_several_endpoints_take_turns() -> None:
    async with server(lambda _: GOOD) as one, server(lambda _: BUSY) as other:
        told = Told(one)
        told.player.set_endpoints(endpoint_of(one), endpoint_of(other))
        found = await told.play(every(0.01, 6))
    assert [result.outcome for result in found] == ["completed", "refused"] * 3
