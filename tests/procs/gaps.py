"""Clients under faults: when each chunk came, so that pauses can be told, and requests whose connection broke."""

from __future__ import annotations

import asyncio
import time

import httpx

from tests.procs.clients import Load

_PAUSE_S = 0.05  # of a client after a refusal or a broken connection


class TimedLoad(Load):
    """As Load; `broken` says of each request whose connection ended before its time how it did. Streams with an error
    are in `streams`."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.broken: list[str] = []
        self._gaps: list[tuple[float, float]] = []  # when it ended, how long it was

    @staticmethod
    def now() -> float:
        """Seconds of the clock that `longest_gap` uses."""
        return time.monotonic()

    async def _client(self) -> None:
        while not self._stopping:
            prompt, max_tokens = self._rng.choice(self._prompts), self._rng.randint(*self._lengths)
            began = time.monotonic()
            chunk_at: list[float] = []
            try:
                stream = await self._stream(prompt, max_tokens, chunk_at)
            except httpx.HTTPError as error:
                now = time.monotonic()
                silent = f", {now - chunk_at[-1]:.2f} s after a chunk" if chunk_at else ""
                self.broken.append(f"{error!r} after {now - began:.2f} s{silent}")
                await asyncio.sleep(_PAUSE_S)
                continue
            self.streams.append(stream)
            if stream.error is not None:
                await asyncio.sleep(_PAUSE_S)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number in self._last:
            self._gaps.append((now, now - self._last[number]))
        self._last[number] = now

    def longest_gap(self, since: float) -> float:
        """The longest pause between two chunks of a stream that ended after `since`, or lasts, in seconds."""
        now = time.monotonic()
        open_now = [now - last for last in self._last.values()]
        return max([gap for end, gap in self._gaps if end >= since] + open_now, default=0.0)

    def p99_gap(self, since: float, until: float) -> float:
        """The 99th percentile of the pauses that ended in between, in seconds."""
        gaps = sorted(gap for end, gap in self._gaps if since <= end <= until)
        return gaps[int(0.99 * (len(gaps) - 1))] if gaps else 0.0

    async def wait_streams(self, count: int, timeout_s: float = 120.0) -> None:
        """Wait until `count` more streams have ended without an error."""
        wanted = self.num_good + count
        deadline = time.monotonic() + timeout_s
        while self.num_good < wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"{wanted - self.num_good} of {count} streams did not end within {timeout_s:g} s")
            await asyncio.sleep(0.01)

    @property
    def num_good(self) -> int:
        """Streams that ended as they should."""
        return sum(stream.error is None for stream in self.streams)

    @property
    def errors(self) -> dict[str, int]:
        """Failed streams by their error's code."""
        codes = [stream.error for stream in self.streams if stream.error is not None]
        return {code: codes.count(code) for code in set(codes)}
