"""What only a rank knows of a request's time: how long it waited here for a place in a step, and how long its prompt
took. Told to routers that trace the request, once for each time that it gets a place; nothing is noted of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, TypeVar

from elasticmoe.common.clock import Clock
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.common.protocol.router import RankTimes
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.sequence import RequestKey, Sequence

T = TypeVar("T")

NOTED_MAX: Final = 4_096  # requests; of older ones nothing is told


class _Begun(NamedTuple):
    at: float
    waited_s: float
    num_cached: int
    num_stops: int


class RequestTimes:
    """Owned by the rank's thread; times are of the monotonic clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._arrived: dict[RequestKey, float] = {}
        self._begun: dict[RequestKey, _Begun] = {}

    @property
    def has_begun(self) -> bool:
        """Whether `tell` may have something."""
        return bool(self._begun)

    def arrived(self, request: Submit, peer: bytes, now: float) -> None:
        """A request has come."""
        if request.origin is not None and request.origin.traceparent:
            _put(self._arrived, (peer, request.request_id), now)

    def admitted(self, sequences: Iterable[Sequence], now: float) -> None:
        """They run from now on. Of one that runs again, because its blocks were taken, the wait is not known."""
        for sequence in sequences:
            request = sequence.request
            if request.origin is None or not request.origin.traceparent:
                continue
            key = sequence.peer, request.request_id
            waited_s = max(0.0, now - self._arrived.pop(key, now))
            _put(self._begun, key, _Begun(now, waited_s, sequence.kv_len, sequence.stops))

    def forget(self, peer: bytes, request_id: str) -> None:
        """Its router wants nothing more of it."""
        self._arrived.pop((peer, request_id), None)
        self._begun.pop((peer, request_id), None)

    def tell(self, outcome: Outcome) -> list[tuple[bytes, RankTimes]]:
        """What routers are to be told before `outcome`, in which some of the prompts have their next token."""
        now, told = self._clock.monotonic(), []
        for router, deltas in outcome.deltas.items():
            for delta in deltas:
                begun = self._begun.pop((router, delta.request_id), None)
                if begun is not None:
                    computed_s = max(0.0, now - begun.at)
                    times = RankTimes(delta.request_id, begun.waited_s, computed_s, begun.num_cached, begun.num_stops)
                    told.append((router, times))
        for router, failed in outcome.failures:
            self.forget(router, failed.request_id)
        return told


def _put(table: dict[RequestKey, T], key: RequestKey, value: T) -> None:
    if len(table) >= NOTED_MAX:
        del table[next(iter(table))]
    table[key] = value
