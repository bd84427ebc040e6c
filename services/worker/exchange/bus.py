"""What the exchanges between ranks of one host share: they meet on the shared-memory bus, by its generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from elasticmoe.common.failpoint import failpoint
from elasticmoe.native.bus import Bus, BusAborted, BusTimeout, Routing, make_routing
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.exchange.base import Exchange, ExchangeTimes, StepAborted, StepTimedOut

WAIT_MS = 500.0  # a rank that waits for others in a step says that often that it is not the one that is stuck


T = TypeVar("T")


class BusExchange(Exchange):
    """One rank's end of the bus. `num_experts[layer]` is the model's (0: dense); `bus` and `backend` stay the caller's;
    `device`: where received rows are to lie.

    Others see this rank's progress on the bus, also while it waits for them.
    """

    def __init__(self, bus: Bus, num_experts: Sequence[int], backend: ComputeBackend, device: torch.device) -> None:
        self._bus = bus
        self._backend = backend
        self._device = device
        self._top_k = bus.top_k
        self._generation = 0
        self._routings: list[Routing | None] = [None] * len(num_experts)
        self._num_experts = tuple(num_experts)
        self._deadline_ms = 0.0
        self._num_left = 0  # layers that this step has still to exchange
        self.rows_RH = self._rows(0)
        self.counts_E = torch.zeros(max(self._num_experts, default=0), dtype=torch.int32)
        self._counts_addr = self.counts_E.data_ptr()

    def _rows(self, count: int) -> torch.Tensor:
        return torch.empty((count, self._bus.hidden), dtype=torch.float32, device=self._device)

    def set_routing(self, generation: int, owners: Sequence[Sequence[int]]) -> None:
        """See Exchange."""
        if tuple(len(slots) for slots in owners) != self._num_experts:
            raise ValueError(
                f"routing of {[len(slots) for slots in owners]} experts, the model has {self._num_experts}"
            )
        self._routings = [make_routing(list(slots)) if slots else None for slots in owners]
        self._generation = generation

    def begin_step(self, total_tokens: int, deadline_ms: float) -> None:
        """See Exchange. Buffers grow to the largest step seen; their pages become real when they are used."""
        self._deadline_ms = deadline_ms
        self._num_left = sum(count > 0 for count in self._num_experts)
        failpoint("rank.step.begun")
        capacity = total_tokens * self._top_k
        if capacity > self.rows_RH.shape[0]:
            self._make_room(total_tokens, capacity)

    def _make_room(self, num_tokens: int, num_rows: int) -> None:
        """Room for all tokens of a step, and the rows that they may become. Raises what torch raises where there is no
        memory; the smaller step's room is still there then."""
        del num_tokens
        self.rows_RH = self._rows(num_rows)

    @property
    def is_awaited(self) -> bool:
        """See Exchange."""
        return self._num_left > 0 and self._bus.membership()[1].bit_count() > 1

    def _patiently(self, exchange: Callable[[float], T]) -> T:
        """Make one exchange, counting up the rank's progress before it and while it waits for the others.

        One that times out is repeated: the arrival stands. Raises StepAborted, and StepTimedOut when the step's
        deadline has passed.
        """
        left_ms = self._deadline_ms
        while True:
            self._bus.bump_progress()
            try:
                return exchange(min(left_ms, WAIT_MS))
            except BusAborted as aborted:
                raise StepAborted(aborted.generation) from None
            except BusTimeout as late:
                left_ms -= WAIT_MS
                if left_ms <= 0:
                    raise StepTimedOut(str(late)) from None

    def take_times(self) -> ExchangeTimes:
        """See Exchange. Includes the bus's `step` calls since the last call."""
        return ExchangeTimes(self._bus.take_exchange_ns(), self._bus.take_wait_ns())

    def _routing(self, layer: int) -> Routing:
        routing = self._routings[layer]
        if routing is None:
            raise ValueError(f"layer {layer} has no routing")
        return routing
