"""What comes of a step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.router import Delta, Failed, Logprob, Suspected
from elasticmoe.services.worker.model.base import StepTimes


class Choice(NamedTuple):
    """What a step made of one chunk: its next token, where it had one to choose, or its end. `is_over`: its grammar has
    it end, without a token. `is_late`: what may follow is not known yet; the chunk does not count."""

    token: int | None = None
    logprob: Logprob | None = None
    error: ElasticMoEError | None = None
    is_over: bool = False
    is_late: bool = False

    @property
    def counts(self) -> bool:
        """Whether the sequence goes on behind the chunk."""
        return self.error is None and not self.is_over and not self.is_late


class Outcome(NamedTuple):
    """What a step made, by router: new tokens, and requests that failed; `suspected` is to be told first."""

    deltas: dict[bytes, list[Delta]]
    failures: list[tuple[bytes, Failed]]
    suspected: Seq[tuple[bytes, Suspected]] = ()


class StepCost(NamedTuple):
    """Nanoseconds of one step: `math` in the model without the exchange, `exchange` without waiting, `wait`."""

    math_ns: int
    exchange_ns: int
    wait_ns: int

    @classmethod
    def of(cls, times: StepTimes) -> StepCost:
        """Of a forward pass."""
        return cls(times.total_ns - times.exchange_ns, times.exchange_ns - times.wait_ns, times.wait_ns)
