"""Closed-loop clients that know what each answer must be: each prompt was answered once while nothing was disturbed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from elasticmoe.cli.load.endpoint import Shape, endpoint_of
from elasticmoe.cli.load.prompts import random_prompt
from elasticmoe.cli.load.sample import CUT_OFF, TIMED_OUT, Sample
from elasticmoe.cli.load.stream import complete

PROMPTS = 24
LEARN_AT_ONCE = 6  # a text does not hang on what else is computed
PROMPT_TOKENS = (1, 3, 17, 40, 90)
OUTPUT_TOKENS = (8, 160)
PAUSE_S = 0.1  # of a client after an error, or while it is not to begin any request
SILENCE_S_MAX = 60.0  # a request that says nothing for so long hangs
BROKEN = "connection_broken"
HUNG = "hung"
_CODES = {CUT_OFF: BROKEN, TIMED_OUT: HUNG}


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


class Clients:
    """`count` clients, each with one request under way. Call `learn` before faults begin, then `run` until `stop`.

    `output_tokens`: the least and the most that a request asks for. `is_counted`: a pause is one between two tokens,
    also where a token makes no text."""

    def __init__(
        self,
        url: str,
        model: str,
        count: int,
        seed: int,
        *,
        num_prompts: int = PROMPTS,
        output_tokens: tuple[int, int] = OUTPUT_TOKENS,
        is_counted: bool = False,
    ) -> None:
        rng = random.Random(f"{seed}/load")
        self.tally = Tally()
        self.model = model
        self._count = count
        self._rng = rng
        self._endpoint = endpoint_of(url)
        self._prompts = [
            (random_prompt(rng, rng.choice(PROMPT_TOKENS)), rng.randint(*output_tokens)) for _ in range(num_prompts)
        ]
        self._is_counted = is_counted
        self._texts: list[str] = []
        self._stopping = False
        self._let = count

    async def learn(self, at_once: int = LEARN_AT_ONCE) -> Tally:
        """Take each prompt's text from a deployment at rest, `at_once` at a time; what was seen meanwhile. Raises
        ValueError where it fails."""
        tally = Tally()
        for first in range(0, len(self._prompts), at_once):
            numbers = range(first, min(len(self._prompts), first + at_once))
            for text, error in await asyncio.gather(*(self._request(number, tally) for number in numbers)):
                if error:
                    raise ValueError(f"the undisturbed run failed: {error}")
                self._texts.append(text)
        return tally

    async def run(self) -> None:
        """Requests without end; returns when `stop` was called and all that were under way have ended."""
        await asyncio.gather(*(self._client(number) for number in range(self._count)))

    def let(self, count: int) -> None:
        """Let only so many clients begin requests from now on."""
        self._let = count

    def stop(self) -> None:
        """Begin no further request."""
        self._stopping = True

    async def _client(self, number: int) -> None:
        while not self._stopping:
            if number >= self._let:
                await asyncio.sleep(PAUSE_S)
                continue
            prompt = self._rng.randrange(len(self._prompts))
            text, error = await self._request(prompt, self.tally)
            if error:
                self.tally.errors.append((time.monotonic(), error))
                await asyncio.sleep(PAUSE_S)
                continue
            is_right = text == self._texts[prompt]
            self.tally.good += is_right
            self.tally.wrong += not is_right
            self.tally.tokens += self._prompts[prompt][1]

    async def _request(self, number: int, tally: Tally) -> tuple[str, str]:
        """Stream one completion; its text, and the code of the error that ended it, empty for none."""
        prompt, max_tokens = self._prompts[number]
        shape = Shape(self.model, len(prompt), max_tokens, is_counted=self._is_counted)
        request = self._endpoint.request(shape, prompt)
        stream, sample, parts = tally.begin(), Sample(), list[str]()

        def on_text(now: float, text: str) -> None:
            tally.note(stream, now)
            parts.append(text)

        try:
            await complete(self._endpoint, request, sample, silence_s=SILENCE_S_MAX, on_text=on_text)
        except TimeoutError:
            sample.error = HUNG
        except OSError:
            sample.error = BROKEN
        finally:
            tally.end(stream, time.monotonic(), is_whole=sample.error == "")
        error = sample.error or ""
        return "".join(parts), _CODES.get(error, error)
