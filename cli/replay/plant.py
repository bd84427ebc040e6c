"""A deployment in virtual time: replicas, a router that sends each request to the one with the least to do, and changes
of size. Pure.

A growth's replicas are held from the order on, serve after the actuation's delay, and get their share of what waits at
once. A shrink is done at once: the last replicas' streams go on at the others, with their KV where there is room.
"""

from __future__ import annotations

import msgspec

from elasticmoe.cli.replay.model import Actuation, DeploymentModel
from elasticmoe.cli.replay.replica import Replica, Stream
from elasticmoe.cli.traces.arrival import Arrival
from elasticmoe.common.wording import counted

PREFILL_PER_STREAM = 256  # queued tokens that weigh as much as a stream, for the router


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What happened since the last look, and how it is at `at_s`.

    admitted: requests that came; `firsts`: streams that got their first token, `ended`: their last; `gaps`: (seconds
    between tokens, how often); `waiting`: streams without a first token; `oldest_s`: since the oldest of
    them came, `oldest_tokens`: of its prompt;
    `ready`: replicas that serve; `wanted`: with those that come
    """

    at_s: float
    span_s: float
    admitted: tuple[Arrival, ...]
    firsts: tuple[Stream, ...]
    ended: tuple[Stream, ...]
    gaps: tuple[tuple[float, int], ...]
    waiting: int
    oldest_s: float
    oldest_tokens: int
    open: int
    ready: int
    wanted: int


class Plant:
    """`width` replicas at first. Not thread-safe."""

    def __init__(self, model: DeploymentModel, actuation: Actuation, width: int) -> None:
        self.model = model
        self.actuation = actuation
        self.now = 0.0
        self.epoch = 0  # grows by one with each change of the layout in force
        self.device_seconds = 0.0
        self.changes: list[tuple[float, int, int]] = []  # orders that changed something: (when, wanted before, after)
        self.ended: list[Stream] = []
        self.replicas: list[Replica] = []
        self._coming: list[float] = []  # when each replica that is on its way serves, ascending
        self._open: dict[int, Stream] = {}
        self._waiting: dict[int, Stream] = {}  # without a first token, in the order of arrival
        self._num = self._num_replicas = 0
        self._looked_s = 0.0
        self._admitted: list[Arrival] = []
        self._firsts: list[Stream] = []
        self._gaps: list[tuple[float, int]] = []
        self._num_looked = 0
        self._lay_out(width)

    @property
    def width(self) -> int:
        """Replicas that serve."""
        return len(self.replicas)

    @property
    def wanted(self) -> int:
        """With those that come."""
        return self.width + len(self._coming)

    @property
    def num_open(self) -> int:
        """Requests that came and have not ended."""
        return len(self._open)

    def advance(self, until: float) -> None:
        """Let the time pass."""
        while self._coming and self._coming[0] <= until:
            at = self._coming[0]
            self._pass(at)
            arrived = sum(1 for due in self._coming if due <= at)
            del self._coming[:arrived]
            self._lay_out(self.width + arrived)
        self._pass(until)

    def _pass(self, until: float) -> None:
        self.device_seconds += (until - self.now) * self.wanted * self.model.devices
        self.now = until
        for replica in self.replicas:
            replica.advance(until)

    def offer(self, arrival: Arrival) -> None:
        """A request that comes now. Raises ValueError for one that one replica alone has no room for."""
        room = self.model.kv_tokens(1)
        if arrival.input_tokens + arrival.output_tokens > room:
            tokens = arrival.input_tokens + arrival.output_tokens
            raise ValueError(f"the request at {arrival.at_s:g} s has {tokens} tokens, and a replica's KV {room}")
        stream = Stream(self._num, arrival)
        self._num += 1
        self._open[stream.number] = self._waiting[stream.number] = stream
        self._admitted.append(arrival)
        self._least().offer(stream, self.now)

    def order(self, width: int) -> None:
        """From now on, `width` replicas are wanted. Those that come are given up first. Raises ValueError below 1."""
        if width < 1:
            raise ValueError(f"{counted(width, 'replica')}; 1 is the least")
        before = self.wanted
        if width == before:
            return
        self.changes.append((self.now, before, width))
        if width > before:
            self._coming += [self.now + self.actuation.delay_s] * (width - before)
            return
        del self._coming[max(0, width - self.width) :]
        if width < self.width:
            self._lay_out(width)

    def look(self) -> Seen:
        """What happened since the last look."""
        oldest = next(iter(self._waiting.values()), None)
        seen = Seen(
            at_s=self.now,
            span_s=self.now - self._looked_s,
            admitted=tuple(self._admitted),
            firsts=tuple(self._firsts),
            ended=tuple(self.ended[self._num_looked :]),
            gaps=tuple(self._gaps),
            waiting=len(self._waiting),
            oldest_s=self.now - oldest.at_s if oldest else 0.0,
            oldest_tokens=oldest.arrival.input_tokens if oldest else 0,
            open=len(self._open),
            ready=self.width,
            wanted=self.wanted,
        )
        self._looked_s, self._num_looked = self.now, len(self.ended)
        self._admitted, self._firsts, self._gaps = [], [], []
        return seen

    def _least(self) -> Replica:
        return min(self.replicas, key=_load)

    def _lay_out(self, width: int) -> None:
        """`width` replicas from now on."""
        kv_total = self.model.kv_tokens(width)
        self.epoch += 1
        leaving, self.replicas = self.replicas[width:], self.replicas[:width]
        for replica in self.replicas:
            replica.resize(kv_total)
        is_growth = width > len(self.replicas)
        while len(self.replicas) < width:
            number = self._num_replicas
            self._num_replicas += 1
            one = Replica(number, self.model, kv_total, self.now, self._has_first, self._has_ended, self._has_gaps)
            self.replicas.append(one)
        for replica in leaving:
            for stream in replica.give_up():
                self._least().adopt(stream, self.now)
        if is_growth:
            self._share_out()

    def _share_out(self) -> None:
        """What waits goes to who has the least to do."""
        streams = [stream for replica in self.replicas for stream in replica.take_waiting()]
        for stream in sorted(streams, key=lambda one: one.number):
            self._least().offer(stream, self.now)

    def _has_first(self, stream: Stream) -> None:
        del self._waiting[stream.number]
        self._firsts.append(stream)

    def _has_ended(self, stream: Stream) -> None:
        del self._open[stream.number]
        self.ended.append(stream)

    def _has_gaps(self, seconds: float, num: int) -> None:
        self._gaps.append((seconds, num))


def _load(replica: Replica) -> tuple[float, int]:
    return replica.num_open + replica.queued_prefill / PREFILL_PER_STREAM, replica.number
