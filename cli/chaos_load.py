"""Closed-loop clients that know what each answer must be: each prompt was answered once while nothing was disturbed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import msgspec

from elasticmoe.cli.http import async_client, async_lines_of

PROMPTS = 24
PROMPT_TOKENS = (1, 3, 17, 40, 90)
TOKEN_IDS = 256  # every model's vocabulary has these
OUTPUT_TOKENS = (8, 160)
PAUSE_S = 0.1  # of a client after an error
SILENCE_S_MAX = 60.0  # a request that says nothing for so long hangs
BROKEN = "connection_broken"
HUNG = "hung"


@dataclass
class Tally:
    """What the clients saw. `errors`: (when, code), seconds of the monotonic clock. `wrong`: texts that differ from the
    undisturbed one. `gaps`: (when it ended, seconds) of each pause between two pieces of a stream's text, or from its
    last piece to an error. `latest`: when each stream that is under way had its last piece, by a number."""

    good: int = 0
    tokens: int = 0
    errors: list[tuple[float, str]] = field(default_factory=list)
    wrong: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)
    latest: dict[int, float] = field(default_factory=dict)
    num_streams: int = 0

    def longest_gap(self, begin: float, end: float, now: float) -> float:
        """The longest pause that lasted at some moment between `begin` and `end`, whole, in seconds: also one that
        ended later, or lasts at `now`."""
        over = [gap for at, gap in self.gaps if begin <= at and at - gap <= end]
        return max(over + [now - at for at in self.latest.values() if at <= end], default=0.0)

    def lasts(self, moment: float) -> bool:
        """Whether a pause that had begun by `moment` has not ended."""
        return any(at <= moment for at in self.latest.values())

    def begin(self) -> int:
        """The number of one more stream."""
        self.num_streams += 1
        return self.num_streams

    def note(self, stream: int, now: float) -> None:
        """A piece of it has come."""
        if stream in self.latest:
            self.gaps.append((now, now - self.latest[stream]))
        self.latest[stream] = now

    def end(self, stream: int, now: float, *, is_whole: bool) -> None:
        """Nothing more comes of it. A pause that an error ended was one."""
        at = self.latest.pop(stream, None)
        if at is not None and not is_whole:
            self.gaps.append((now, now - at))

    def percentile_gap(self, percent: float) -> float:
        """A percentile of all pauses, in seconds."""
        ordered = sorted(gap for _, gap in self.gaps)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0

    def by_code(self) -> Counter[str]:
        """Errors by code."""
        return Counter(code for _, code in self.errors)


class _Failed(Exception):
    """A request was answered with an error; the text is its code."""


class Clients:
    """`count` clients, each with one request under way. Call `learn` before faults begin, then `run` until `stop`."""

    def __init__(self, url: str, model: str, count: int, seed: int) -> None:
        rng = random.Random(f"{seed}/load")
        self.tally = Tally()
        self.model = model
        self._count = count
        self._rng = rng
        self._prompts = [
            ([rng.randrange(TOKEN_IDS) for _ in range(rng.choice(PROMPT_TOKENS))], rng.randint(*OUTPUT_TOKENS))
            for _ in range(PROMPTS)
        ]
        self._texts: list[str] = []
        self._stopping = False
        limits = httpx.Limits(max_connections=count)
        timeout = httpx.Timeout(SILENCE_S_MAX)
        self._http = async_client(url, timeout=timeout, limits=limits)

    async def learn(self) -> None:
        """Take each prompt's text from a deployment at rest. Raises ValueError where it fails."""
        for number in range(len(self._prompts)):
            try:
                self._texts.append(await self._request(number, Tally()))
            except (_Failed, httpx.HTTPError) as error:
                raise ValueError(f"the undisturbed run failed: {type(error).__name__} {error}") from None

    async def run(self) -> None:
        """Requests without end; returns when `stop` was called and all that were under way have ended."""
        try:
            await asyncio.gather(*(self._client() for _ in range(self._count)))
        finally:
            await self._http.aclose()

    def stop(self) -> None:
        """Begin no further request."""
        self._stopping = True

    async def _client(self) -> None:
        while not self._stopping:
            number = self._rng.randrange(len(self._prompts))
            try:
                text = await self._request(number, self.tally)
            except _Failed as error:
                self._fail(str(error))
            except httpx.TimeoutException:
                self._fail(HUNG)
            except httpx.HTTPError:
                self._fail(BROKEN)
            else:
                is_right = text == self._texts[number]
                self.tally.good += is_right
                self.tally.wrong += not is_right
                self.tally.tokens += self._prompts[number][1]
                continue
            await asyncio.sleep(PAUSE_S)

    def _fail(self, code: str) -> None:
        self.tally.errors.append((time.monotonic(), code))

    async def _request(self, number: int, tally: Tally) -> str:
        """Stream one completion; its text. Raises _Failed, httpx.HTTPError."""
        prompt, max_tokens = self._prompts[number]
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        stream = tally.begin()
        is_whole = False
        try:
            text = await self._stream(body, stream, tally)
            is_whole = True
        finally:
            tally.end(stream, time.monotonic(), is_whole=is_whole)
        return text

    async def _stream(self, body: dict[str, object], stream: int, tally: Tally) -> str:
        text, finish = "", None
        async with self._http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as answer:
            if answer.status_code != 200:
                raise _Failed(_code_of(await answer.aread()))
            async for line in async_lines_of(answer.aiter_bytes()):
                if not line.startswith("data: {"):
                    continue
                event = msgspec.json.decode(line[6:])
                if "error" in event:
                    raise _Failed(str(event["error"].get("code")))
                tally.note(stream, time.monotonic())
                for choice in event["choices"]:
                    text += choice["text"]
                    finish = choice["finish_reason"] or finish
        if finish is None:
            raise _Failed(BROKEN)
        return text


def _code_of(raw: bytes) -> str:
    try:
        return str(msgspec.json.decode(raw)["error"]["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "no_error_body"
