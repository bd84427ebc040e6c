"""Streaming clients of a deployment for tests: what each received, token by token."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from tests.oracle import Oracle


@dataclass
class Stream:
    """One request as its client saw it. `text` is what arrived; `finish` None for one that was left or failed."""

    prompt: list[int]
    max_tokens: int
    text: str = ""
    finish: str | None = None
    error: str | None = None
    chunks: list[str] = field(default_factory=list)


async def stream_completion(
    client: httpx.AsyncClient,
    model: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    leave_after: int | None = None,
    on_chunk: Callable[[], None] | None = None,
    **fields: Any,
) -> Stream:
    """Stream one greedy completion. `leave_after`: disconnect after so many chunks; `on_chunk`: called for each."""
    stream = Stream(list(prompt), max_tokens)
    body = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, **fields}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            stream.error = msgspec.json.decode(await answer.aread())["error"]["code"]
            return stream
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                stream.error = event["error"]["code"]
                return stream
            if on_chunk is not None:
                on_chunk()
            for choice in event["choices"]:
                stream.text += choice["text"]
                stream.chunks.append(choice["text"])
                stream.finish = choice["finish_reason"] or stream.finish
            if leave_after is not None and len(stream.chunks) >= leave_after:
                return stream
    return stream


async def closed_loop(
    base_url: str,
    *,
    clients: int,
    requests: int,
    seed: int,
    leavers: float = 0.0,
    prompt_tokens: Sequence[int] = (1, 3, 17, 40, 90),
    vocab: int = 256,
) -> list[Stream]:
    """`requests` random requests by `clients` clients; the part `leavers` of them disconnects half-way."""
    rng = random.Random(seed)
    work = [
        (
            [rng.randrange(vocab) for _ in range(rng.choice(prompt_tokens))],
            rng.randint(1, 40),
            rng.randint(1, 5) if rng.random() < leavers else None,
        )
        for _ in range(requests)
    ]
    done: list[Stream] = []
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=limits, trust_env=False) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]

        async def client() -> None:
            while work:
                prompt, max_tokens, leave_after = work.pop()
                done.append(await stream_completion(http, model, prompt, max_tokens, leave_after=leave_after))

        await asyncio.gather(*(client() for _ in range(clients)))
    return done


class Load:
    """Clients that go on until they are told to stop: each sends one request after the other, drawn from a fixed set
    of prompts, so that a reference need not be computed for each. For `async with`; `streams` are those that ended.
    """

    def __init__(
        self,
        base_url: str,
        *,
        clients: int,
        seed: int,
        prompts: int = 24,
        shortest: int = 1,
        longest: int = 160,
        vocab: int = 256,
    ) -> None:
        rng = random.Random(seed)
        self.streams: list[Stream] = []
        self._prompts = [[rng.randrange(vocab) for _ in range(rng.choice((1, 3, 17, 40, 90)))] for _ in range(prompts)]
        self._rng = rng
        self._lengths = shortest, longest
        self._stopping = False
        self._clients = clients
        self._http = httpx.AsyncClient(
            base_url=base_url, timeout=120, limits=httpx.Limits(max_connections=clients), trust_env=False
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._last: dict[int, float] = {}  # of requests that have begun to stream: their last chunk
        self._next_id = 0

    async def __aenter__(self) -> Load:
        self._model = (await self._http.get("/v1/models")).json()["data"][0]["id"]
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self._clients)]
        return self

    async def _client(self) -> None:
        while not self._stopping:
            prompt, max_tokens = self._rng.choice(self._prompts), self._rng.randint(*self._lengths)
            self.streams.append(await self._stream(prompt, max_tokens))

    async def _stream(self, prompt: Sequence[int], max_tokens: int, chunk_at: list[float] | None = None) -> Stream:
        """One request of a client. `chunk_at` receives the time of each chunk, in seconds of the monotonic clock."""
        self._next_id += 1
        number = self._next_id

        def note() -> None:
            self._note(number)
            if chunk_at is not None:
                chunk_at.append(self._last[number])

        try:
            return await stream_completion(self._http, self._model, prompt, max_tokens, on_chunk=note)
        finally:
            self._last.pop(number, None)

    def _note(self, number: int) -> None:
        self._last[number] = time.monotonic()

    async def wait_begun(self, count: int, timeout_s: float = 30.0) -> None:
        """Wait until `count` streams at once have had a chunk, and have not ended."""
        deadline = time.monotonic() + timeout_s
        while len(self._last) < count:
            assert time.monotonic() < deadline, f"{len(self._last)} of {count} streams have begun"
            await asyncio.sleep(0.001)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let all requests end. Where the test has failed already, leave them, so that its failure is what shows."""
        self._stopping = True
        try:
            if kind is None:
                await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._http.aclose()


def check_load_against_oracle(streams: Sequence[Stream], model: Path) -> int:
    """As check_against_oracle, with each prompt computed once. Returns the tokens compared."""
    oracle = Oracle(model)
    longest: dict[tuple[int, ...], int] = {}
    for stream in streams:
        assert stream.error is None, f"a request failed with {stream.error}"
        key = tuple(stream.prompt)
        longest[key] = max(longest.get(key, 0), stream.max_tokens)
    expected = {key: bytes(oracle.generate(key, count)).decode("latin-1") for key, count in longest.items()}
    for stream in streams:
        assert (stream.text, stream.finish) == (expected[tuple(stream.prompt)][: stream.max_tokens], "length")
    return sum(len(stream.text) for stream in streams)


def check_against_oracle(streams: Sequence[Stream], model: Path) -> int:
    """Every stream's text is what the oracle says (its beginning, for those who left). Returns the tokens compared."""
    oracle = Oracle(model)
    num_tokens = 0
    for stream in streams:
        assert stream.error is None, f"a request failed with {stream.error}"
        expected = bytes(oracle.generate(stream.prompt, stream.max_tokens)).decode("latin-1")
        if stream.finish is None:
            assert expected.startswith(stream.text), f"{stream.text!r} does not begin {expected!r}"
        else:
            assert (stream.text, stream.finish) == (expected, "length")
        num_tokens += len(stream.text)
    return num_tokens


def check_against_undisturbed(base_url: str, model: str, streams: Sequence[Stream]) -> None:
    """Greedy `streams` of one length have what the same prompts are answered with, one at a time."""
    (length,) = {stream.max_tokens for stream in streams}
    reference: dict[tuple[int, ...], str] = {}
    with httpx.Client(base_url=base_url, timeout=60, trust_env=False) as client:
        for key in {tuple(stream.prompt) for stream in streams}:
            body = {"model": model, "prompt": key, "max_tokens": length, "temperature": 0, "ignore_eos": True}
            reference[key] = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    for stream in streams:
        assert (stream.error, stream.finish, stream.text) == (None, "length", reference[tuple(stream.prompt)])
