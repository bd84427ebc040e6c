"""What the exchanges between ranks of one host share: they meet on the shared-memory bus, by its generations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from elasticmoe.common.failpoint import failpoint
from elasticmoe.native.bus import Bus, BusAborted, BusTimeout, Routing, make_routing
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.exchange.base import Exchange, ExchangeTimes, StepAborted, StepTimedOut
from elasticmoe.services.worker.exchange.expert_rows import ExpertRowCounter, ExpertRows

_FLOAT_BYTES = 4
WAIT_MS = 500.0  # a rank that waits for others in a step says that often that it is not the one that is stuck


T = TypeVar("T")


class BusExchange(Exchange):
    """One rank's end of the bus. `num_experts[layer]` is the model's (0: dense); `bus` and `backend` stay the caller's;
    `device`: where received rows are to lie; `replica`: slots of the own replica's ranks by tp index, where it has
    several.

    Others see this rank's progress on the bus, also while it waits for them.
    """

    def __init__(
        self,
        bus: Bus,
        num_experts: Sequence[int],
        backend: ComputeBackend,
        device: torch.device,
        replica: Sequence[int] = (),
    ) -> None:
        self._bus = bus
        self._num_replica = len(replica)
        if replica:
            bus.set_replica(replica)
        self._backend = backend
        self._device = device
        self._top_k = bus.top_k
        self._generation = 0
        self._routings: list[Routing | None] = [None] * len(num_experts)
        self._num_experts = tuple(num_experts)
        self._deadline_ms = 0.0
        self._num_left = 0  # layers that this step has still to exchange, and the replica's end of it
        self._hear: Callable[[], None] = lambda: None
        self._expert_rows = ExpertRowCounter(num_experts)
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

    def listen(self, hear: Callable[[], None]) -> None:
        """See Exchange."""
        self._hear = hear

    def begin_step(self, total_tokens: int, deadline_ms: float) -> None:
        """See Exchange. Buffers grow to the largest step seen; their pages become real when they are used."""
        self._deadline_ms = deadline_ms
        self._expert_rows.begin_step()
        self._num_left = sum(count > 0 for count in self._num_experts) + (self._num_replica > 0)
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

        One that times out is repeated: the arrival stands. Raises StepAborted, StepTimedOut when the step's deadline
        has passed, and what `listen` was given raises.
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
                self._hear()

    def reduce(self, x_NW: Mirror | None, rows_NW: Mirror | None, out_NW: Mirror, n: int) -> None:
        """See Exchange. Through memory of the host, wherever the backend computes."""
        self._backend.download(*(mirror for mirror in (x_NW, rows_NW) if mirror is not None))(n)
        x, rows, out, width = _address(x_NW), _address(rows_NW), _address(out_NW), out_NW.host.shape[1]
        self._patiently(lambda wait_ms: self._bus.reduce(self._generation, x, rows, out, n, width, wait_ms))
        self._backend.upload(out_NW)(n)

    def gather(self, x_MW: Mirror, out_MV: Mirror | None, n: int, total: int) -> None:
        """See Exchange. In as many pieces as the bus's room asks for."""
        self._backend.download(x_MW)(n)
        x, out, width = _address(x_MW), _address(out_MV), x_MW.host.shape[1]
        most = max(1, self._bus.half_elements // -(-total // self._num_replica))
        for begin in range(0, n, most):
            count = min(most, n - begin)
            source, target = x + begin * width * _FLOAT_BYTES, out and out + begin * total * _FLOAT_BYTES
            self._patiently(partial(self._bus.gather, self._generation, source, target, count, total))
        if out_MV is not None:
            self._backend.upload(out_MV)(n)
        self._num_left -= 1

    def take_expert_rows(self) -> ExpertRows:
        """See Exchange."""
        return self._expert_rows.take()

    def take_times(self) -> ExchangeTimes:
        """See Exchange. Includes the bus's `step` calls since the last call."""
        return ExchangeTimes(self._bus.take_exchange_ns(), self._bus.take_wait_ns())

    def _routing(self, layer: int) -> Routing:
        routing = self._routings[layer]
        if routing is None:
            raise ValueError(f"layer {layer} has no routing")
        return routing


def rows_from(mirror: Mirror, first: int) -> Mirror:
    """The rows of a mirror from number `first` on."""
    if not first:
        return mirror
    device = mirror.device[first:]
    return Mirror(device, device if mirror.host is mirror.device else mirror.host[first:])


def _address(mirror: Mirror | None) -> int:
    return 0 if mirror is None else mirror.host.data_ptr()
