"""One replica: continuous batching with chunked prefill, in virtual time. Pure.

A step computes one token of each sequence that decodes, and prompt tokens in the order of admission. It takes what the
step model says. While nothing is to be prefilled, steps that follow one another alike are computed as one leap: the
time that a replica's simulation takes is that of its requests, not of its tokens.

What a step does is told with the step's end, when the step begins: a look at a replica sees at most one step ahead.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from elasticmoe.cli.replay.model import DeploymentModel
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.common.protocol.limits import STEP_SAMPLES_MAX
from elasticmoe.common.protocol.signals import StepSample


class Stream:
    """A request on its way. `left`: tokens that it still gets, as of when it began to decode; `prefill`: that are to be
    computed before the next one; `finish_step`: of its replica, with which it has all."""

    __slots__ = ("arrival", "at_s", "ended_s", "finish_step", "first_s", "left", "number", "prefill")

    def __init__(self, number: int, arrival: Arrival) -> None:
        self.number = number
        self.arrival = arrival
        self.at_s = arrival.at_s
        self.left = arrival.output_tokens
        self.prefill = arrival.input_tokens
        self.finish_step = 0
        self.first_s = self.ended_s = math.nan

    @property
    def tokens(self) -> int:
        """Prompt and output so far: what its KV holds, or has to hold again."""
        return self.arrival.input_tokens + self.arrival.output_tokens - self.left

    @property
    def ttft_s(self) -> float:
        """Not a number before the first token."""
        return self.first_s - self.at_s

    @property
    def gap_s(self) -> float:
        """Mean time between its tokens, 0 of a single one; not a number before its end."""
        return (self.ended_s - self.first_s) / max(1, self.arrival.output_tokens - 1)


class Told(NamedTuple):
    """What a replica did since it told last: prompt tokens, new tokens, steps, some of them in full."""

    prefilled: int
    generated: int
    num_steps: int
    samples: tuple[StepSample, ...]


class Replica:
    """Not thread-safe. `first`, `ended` are called with a stream that has got its first or its last token, `gaps` with
    a time between tokens and how many streams had it how often."""

    def __init__(
        self,
        number: int,
        model: DeploymentModel,
        kv_total: int,
        now: float,
        first: Callable[[Stream], None],
        ended: Callable[[Stream], None],
        gaps: Callable[[float, int], None],
    ) -> None:
        self.number = number
        self.kv_total = kv_total
        self.kv_used = 0
        self.queued_prefill = 0  # tokens that are to be computed before all streams decode
        self.busy_until_s = now  # the end of the last step
        self.waiting: deque[Stream] = deque()
        self.prefilling: deque[Stream] = deque()
        self.decoding: dict[int, Stream] = {}  # by number, in the order of their admission
        self.num_steps = 0
        self.cutover_step = 0  # the first of the layout in force
        self._samples: list[StepSample] = []
        self._prefilled = self._generated = self._told_step = self._next_sample = 0
        self._stride = 1
        self._model = model
        self._first, self._ended, self._gaps = first, ended, gaps
        self._finishing: list[tuple[int, int]] = []  # (step, stream); some are gone

    @property
    def num_open(self) -> int:
        """Streams that it has."""
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    @property
    def num_running(self) -> int:
        """Those that hold KV."""
        return len(self.prefilling) + len(self.decoding)

    def tell(self) -> Told:
        """What it did since the last call."""
        told = Told(self._prefilled, self._generated, self.num_steps - self._told_step, tuple(self._samples))
        self._prefilled = self._generated = 0
        self._told_step = self._next_sample = self.num_steps
        self._stride = 1
        self._samples.clear()
        return told

    def offer(self, stream: Stream, now: float) -> None:
        """Take a stream that has just come."""
        self.busy_until_s = max(self.busy_until_s, now)
        self.waiting.append(stream)
        self.queued_prefill += stream.prefill

    def take_waiting(self) -> list[Stream]:
        """Those that hold no KV, oldest first; it has them no longer."""
        waiting = list(self.waiting)
        self.waiting.clear()
        self.queued_prefill -= sum(one.prefill for one in waiting)
        return waiting

    def adopt(self, stream: Stream, now: float) -> None:
        """Take one that another replica gave up, with its KV where it has any and there is room; else it is computed
        anew, before those that wait."""
        self.busy_until_s = max(self.busy_until_s, now)
        if stream.prefill == 0 and self.kv_used + stream.tokens <= self.kv_total:
            self.kv_used += stream.tokens
            self._decode(stream)
            return
        stream.prefill = stream.tokens
        self.queued_prefill += stream.prefill
        if math.isnan(stream.first_s):
            self.waiting.append(stream)
        else:
            self.waiting.appendleft(stream)

    def give_up(self) -> list[Stream]:
        """All streams, in the order of their admission; it has none left. Those that decode keep their KV."""
        decoding = list(self.decoding.values())
        for stream in decoding:
            self._settle(stream)
        given = [*decoding, *self.prefilling, *self.waiting]
        for stream in self.prefilling:
            stream.prefill = stream.tokens
        self.decoding, self.kv_used, self.queued_prefill = {}, 0, 0
        self.prefilling.clear()
        self.waiting.clear()
        self._finishing.clear()
        return given

    def resize(self, kv_total: int) -> None:
        """Go on with more or less KV; the newest streams are computed anew where it is too little."""
        self.kv_total = kv_total
        self.cutover_step = self.num_steps
        while self.kv_used > self.kv_total and self._preempt():
            pass

    def advance(self, until: float) -> None:
        """Begin every step that begins before `until`."""
        while self.busy_until_s < until:
            self._admit()
            if self.prefilling:
                self._mixed_step()
            elif self.decoding:
                self._leap(until)
            else:
                return

    def _admit(self) -> None:
        while self.waiting and self.num_running < self._model.sequences_max:
            need = self.waiting[0].tokens
            if self.kv_used + need > self.kv_total:
                return
            self.kv_used += need
            self.prefilling.append(self.waiting.popleft())

    def _mixed_step(self) -> None:
        """A step with prompt tokens."""
        room, computed, done = self._model.step_tokens_max, 0, 0
        for stream in self.prefilling:
            part = min(stream.prefill, room - computed)
            stream.prefill -= part
            computed += part
            if stream.prefill > 0:
                break
            done += 1
            if computed == room:
                break
        self.queued_prefill -= computed
        self._make_room()
        seconds = self._model.step.seconds(computed, self.kv_used, len(self.decoding))
        self._tell(1, seconds, 0.0, computed)
        self._prefilled += computed
        self._step(1, seconds)
        for _ in range(done):
            stream = self.prefilling.popleft()
            if math.isnan(stream.first_s):
                stream.first_s = self.busy_until_s
                self._first(stream)
            stream.left -= 1
            self.kv_used += 1
            self._generated += 1
            if stream.left == 0:
                self._end(stream)
            else:
                self._decode(stream)

    def _leap(self, until: float) -> None:
        """Steps without prompt tokens, until one ends, KV runs out, or `until`."""
        self._make_room()
        num, model = len(self.decoding), self._model.step
        base = model.seconds(0, self.kv_used, num)
        growth = model.c * num
        while self._finishing[0][1] not in self.decoding:  # moved, or computed anew
            heapq.heappop(self._finishing)
        most = min(self._finishing[0][0] - self.num_steps, max(1, (self.kv_total - self.kv_used) // num))
        steps = max(1, min(most, steps_before(until - self.busy_until_s, base, growth)))
        seconds = steps * base + growth * steps * (steps - 1) / 2
        self._tell(steps, base, growth, 0)
        self._step(steps, seconds)

    def _step(self, steps: int, seconds: float) -> None:
        """`steps` steps in `seconds` are over: every stream that decodes has so many tokens more."""
        num = len(self.decoding)
        self.busy_until_s += seconds
        self.num_steps += steps
        if num == 0:
            return
        self._gaps(seconds / steps, steps * num)
        self.kv_used += steps * num
        self._generated += steps * num
        while self._finishing and self._finishing[0][0] <= self.num_steps:
            step, number = heapq.heappop(self._finishing)
            stream = self.decoding.get(number)
            if stream is not None and stream.finish_step == step:
                del self.decoding[number]
                stream.left = 0
                self._end(stream)

    def _decode(self, stream: Stream) -> None:
        stream.finish_step = self.num_steps + stream.left
        self.decoding[stream.number] = stream
        heapq.heappush(self._finishing, (stream.finish_step, stream.number))

    def _settle(self, stream: Stream) -> None:
        """Write down how far a stream that decodes has come."""
        stream.left = stream.finish_step - self.num_steps

    def _end(self, stream: Stream) -> None:
        self.kv_used -= stream.tokens
        stream.ended_s = self.busy_until_s
        self._ended(stream)

    def _make_room(self) -> None:
        """For a token of each stream that decodes: else the newest one is computed anew, later."""
        while self.kv_used + len(self.decoding) > self.kv_total and len(self.decoding) > 1:
            self._preempt()

    def _preempt(self) -> bool:
        if not self.decoding:
            return False
        _, stream = self.decoding.popitem()
        self._settle(stream)
        self.kv_used -= stream.tokens
        stream.prefill = stream.tokens
        self.queued_prefill += stream.prefill
        self.waiting.appendleft(stream)
        return True

    def _tell(self, steps: int, base: float, growth: float, prefill: int) -> None:
        """Keep some of the steps that come, evenly: each so manieth, as a rank does. Step i takes base + growth·i."""
        num = len(self.decoding)
        while self._next_sample < self.num_steps + steps:
            at = self._next_sample - self.num_steps
            if len(self._samples) == STEP_SAMPLES_MAX:
                del self._samples[1::2]
                self._stride *= 2
            if (self._next_sample - self._told_step) % self._stride == 0:
                since = self.num_steps + at - self.cutover_step
                self._samples.append(StepSample(base + growth * at, prefill, self.kv_used + at * num, num, since))
            passed = self._next_sample - self._told_step
            self._next_sample = self._told_step + (passed // self._stride + 1) * self._stride


def steps_before(seconds: float, base: float, growth: float) -> int:
    """How many steps begin in the next `seconds`, where the first takes `base` and each later one `growth` more."""
    if growth <= 0.0:
        return math.ceil(seconds / base)
    # m·base + growth·m·(m-1)/2 = seconds
    half = base - growth / 2
    return math.ceil((math.sqrt(half * half + 2 * growth * seconds) - half) / growth)
