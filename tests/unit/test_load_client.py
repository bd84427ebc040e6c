"""The client of load against a scripted server: what it sends, how it reads answers, and who comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from elasticmoe.cli.load import client
from elasticmoe.cli.load.client import Load, Target, run_clients
from elasticmoe.cli.load.endpoint import Shape, endpoint_of
from elasticmoe.cli.load.sample import BAD_STREAM, CUT_OFF, TIMED_OUT, Sample
from elasticmoe.cli.load.stream import complete
from elasticmoe.common.protocol.errors import ConfigError

TOKEN = b'data: {"choices":[{"text":"a"}],"usage":null}\n\n'
END = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\ndata: [DONE]\n\n'
OK = b"HTTP/1.1 200 OK\r\n\r\n"
SHAPE = Shape("m", 4, 4)


@asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[str]:
    """Answers each request with the next of `answers`, and with the last from then on."""
    left = list(answers)
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        with suppress(OSError, asyncio.IncompleteReadError):  # a client that was stopped left in the midst of it
            try:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(left.pop(0) if len(left) > 1 else left[0])
                await writer.drain()
            finally:
                writer.close()
                await writer.wait_closed()

    running = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
    finally:
        running.close()
        await running.wait_closed()
        async with asyncio.timeout(60):  # no connection outlives the loop
            await asyncio.gather(*handlers)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_closed_clients_go_on_and_note_what_they_saw() -> None:
    async with server(OK + TOKEN, OK + TOKEN + TOKEN + END) as url:
        load = Load(Shape("m", 4, 4, is_counted=True), seed=1)
        load.set_targets(Target("one", url))
        load.start_closed(1)
        await until(lambda: len(load.requests) >= 3 and load.requests[1].error is not None)
        await load.stop()
    cut, good = load.requests[:2]
    assert (cut.error, len(cut.arrivals)) == (CUT_OFF, 1)
    assert (good.error, good.tokens, len(good.arrivals), good.target) == ("", 2, 2, "one")
    assert cut.asked <= cut.sent <= cut.arrivals[0] <= cut.ended <= good.asked


async def test_a_client_that_is_turned_away_comes_back_and_finds_the_new_target() -> None:
    async with server(b"HTTP/1.1 503 Service Unavailable\r\n\r\n") as busy, server(OK + TOKEN + TOKEN + END) as url:
        load = Load(SHAPE, seed=1)
        load.set_targets(Target("busy", busy))
        load.start_closed(1)
        await until(lambda: load.requests[0].refusals > 0 if load.requests else False)
        assert load.running_on("busy") == 1
        load.set_targets(Target("new", url))
        await until(lambda: load.requests[0].error == "")
        await load.stop()
    assert load.requests[0].target == "new"
    assert load.running_on("busy") == 0


async def test_an_attempt_that_is_taken_and_cut_off_is_not_the_refusal_before_it() -> None:
    async with server(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"") as url:
        load = Load(SHAPE, seed=1)
        load.set_targets(Target("one", url))
        load.start_closed(1)
        await until(lambda: len(load.requests) >= 2)
        await load.stop()
    assert (load.requests[0].refusals, load.requests[0].status, load.requests[0].error) == (1, 0, CUT_OFF)


async def test_a_client_waits_for_a_server_that_is_not_there() -> None:
    async with server(OK + TOKEN + END) as url:
        pass  # its port is free again
    load = Load(SHAPE, seed=1)
    load.set_targets(Target("gone", url))
    load.start_open(200.0)
    await until(lambda: len(load.requests) > 3 and load.requests[0].refusals > 1)
    await load.stop()
    assert all(item.error is None and item.sent == 0 for item in load.requests)


async def test_both_loads_follow_the_seed() -> None:
    async def prompts(seed: int) -> list[int]:
        load = Load(Shape("m", 4, 64), seed=seed)
        lengths: list[int] = []

        async def note(_: Any, length: int) -> None:
            lengths.append(length)

        load._serve = note  # type: ignore[method-assign]
        load.start_open(2000.0)
        await until(lambda: len(lengths) >= 20)
        await load.stop()
        return lengths[:20]

    first, again, other = await prompts(1), await prompts(1), await prompts(2)
    assert first == again
    assert first != other
    assert all(32 <= length <= 96 for length in first)


async def test_an_error_in_a_client_is_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(client, "complete", fail)
    load = Load(SHAPE, seed=1)
    load.set_targets(Target("one", "http://127.0.0.1:1"))
    load.start_closed(1)
    await until(lambda: load._error is not None)
    with pytest.raises(ValueError, match="a mistake of ours"):
        await load.stop()
    await load.stop()


async def test_clients_send_a_number_of_requests() -> None:
    async with server(OK + TOKEN + END) as url:
        samples = await run_clients(url, SHAPE, 3, 7, seed=1)
    assert [sample.error for sample in samples] == [""] * 7
    with pytest.raises(OSError):  # which one is the system's to say
        await run_clients(url, SHAPE, 1, 1, seed=1)


# ---- one answer ------------------------------------------------------------------------------------------------------


async def answered(*parts: bytes, silence_s: float | None = 10.0, is_left_open: bool = False) -> tuple[Sample, str]:
    """What one request makes of an answer that comes in these parts: the sample, and the text."""
    texts: list[str] = []
    sample = Sample()
    is_read, is_gone = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # the client has seen enough
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)  # parts arrive as parts
            if is_left_open:
                await is_read.wait()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        is_gone.set()

    running = await asyncio.start_server(handle, "127.0.0.1", 0)
    endpoint = endpoint_of(f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}")
    try:
        async with asyncio.timeout(60):
            await complete(
                endpoint,
                endpoint.request(SHAPE, [1, 2]),
                sample,
                silence_s=silence_s,
                on_text=lambda _, text: texts.append(text),
            )
    finally:
        is_read.set()
        async with asyncio.timeout(60):
            await is_gone.wait()
        running.close()
        await running.wait_closed()
    assert sample.ended >= sample.sent > 0
    return sample, "".join(texts)


def chunked(*bodies: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


FINISH = b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n'


@pytest.mark.parametrize("size", [1, 2, 7, 40, 10_000])
async def test_the_borders_of_what_arrives_mean_nothing(size: int) -> None:
    """Events may be cut anywhere by chunks and segments: proxies cut them anew."""
    raw = chunked((TOKEN + TOKEN)[:30], (TOKEN + TOKEN)[30:] + FINISH[:5], FINISH[5:] + END)
    parts = [raw[begin : begin + size] for begin in range(0, len(raw), size)]
    sample, text = await answered(*parts, is_left_open=True)  # its end is in it
    assert (sample.error, sample.status, sample.tokens, len(sample.arrivals)) == ("", 200, 2, 3)
    assert text == "aab"
    assert sample.arrivals == sorted(sample.arrivals)


@pytest.mark.parametrize(
    ("raw", "error", "tokens"),
    [
        (chunked(TOKEN, FINISH), "", 2),  # without usage: events are counted
        (OK + TOKEN + FINISH, "", 2),  # without a length: until the connection ends
        (chunked(TOKEN), CUT_OFF, 1),
        (chunked(TOKEN)[:-9], CUT_OFF, 0),
        (OK + TOKEN, CUT_OFF, 1),
        (chunked((TOKEN + FINISH).replace(b"data: ", b"data:").replace(b"\n", b"\r\n")), "", 2),  # as others write it
        (chunked(b": wait\n\n" + TOKEN.replace(b",", b",\ndata:") + FINISH), "", 2),  # comments; data of two lines
        (b"", CUT_OFF, 0),
        (b"SSH-2.0-OpenSSH\r\n", BAD_STREAM, 0),
        (chunked(TOKEN, b"data: {nonsense\n\n"), BAD_STREAM, 1),
        (chunked(b"data: {" + b"x" * (1 << 21)), BAD_STREAM, 0),
        (chunked(TOKEN, b'data: {"error":{"code":"rank_lost","message":"m"}}\n\n', TOKEN), "rank_lost", 1),
        (chunked(b'data: {"error":{}}\n\n'), "stream_error", 0),
    ],
)
async def test_what_came_of_a_request_is_told_by_a_code(raw: bytes, error: str, tokens: int) -> None:
    sample, _ = await answered(raw)
    assert (sample.error, sample.tokens) == (error, tokens)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error":{"code":"queue_full","message":"m"}}', "queue_full"),
        (b'{"error":{"code":429,"message":"m"}}', "429"),
        (b'{"error":{"code":null,"message":"m"}}', "http_429"),
        (b"<html>busy</html>", "http_429"),
        (b"", "http_429"),
    ],
)
async def test_a_refusal_has_its_own_code(body: bytes, error: str) -> None:
    head = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n" % len(body)
    sample, _ = await answered(head + body, is_left_open=True)
    assert (sample.status, sample.error, sample.arrivals) == (429, error, [])


async def test_a_server_that_falls_silent_has_failed() -> None:
    sample, text = await answered(OK + TOKEN, silence_s=10.0, is_left_open=True)
    assert (sample.error, text, len(sample.arrivals)) == (TIMED_OUT, "a", 1)


async def test_an_answer_that_only_announces_another_is_none() -> None:
    sample, _ = await answered(b"HTTP/1.1 103 Early Hints\r\n\r\n" + chunked(TOKEN, END))
    assert (sample.error, sample.status, sample.tokens) == ("", 200, 2)


async def test_a_cancelled_request_lets_its_connection_go() -> None:
    gone = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        gone.set()

    running = await asyncio.start_server(handle, "127.0.0.1", 0)
    endpoint, sample = endpoint_of(f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"), Sample()
    task = asyncio.create_task(complete(endpoint, endpoint.request(SHAPE, [1]), sample))
    await until(lambda: sample.sent > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(60):
        await gone.wait()
    assert sample.error is None
    running.close()
    await running.wait_closed()


def test_what_is_sent() -> None:
    raw = endpoint_of("http://[::1]:8000/base/", api_key="k").request(Shape("m", 2, 7, is_counted=True), [1, 2])
    head, body = raw.split(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: [::1]:8000\r\n")
    assert b"Authorization: Bearer k\r\n" in head
    assert b"Content-Length: %d" % len(body) in head
    fields = json.loads(body)
    assert (fields["prompt"], fields["max_tokens"], fields["ignore_eos"]) == ([1, 2], 7, True)
    assert fields["logprobs"] == 0
    assert endpoint_of("http://a").port == 80
    assert (endpoint_of("https://a").port, endpoint_of("https://a").tls is not None) == (443, True)
    with pytest.raises(ConfigError):
        endpoint_of("ftp://a")
