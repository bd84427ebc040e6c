"""What the exchanges share whose rows travel outside of the bus: ids, counts and arrivals on it, and the rows in an
order that all work out from these.

A rank's part of a layer has two lives, as its area of the bus has (native/src/bus/exchange.h): its own rows, which go
to the experts' owners, and the answers that come back. By what means they travel is a subclass's affair.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from elasticmoe.common.failpoint import failpoint
from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.backends.answers import WeightedSum
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.backends.sent_fields import SentFields
from elasticmoe.services.worker.exchange.base import ExchangeTimes
from elasticmoe.services.worker.exchange.bus import BusExchange, rows_from


class Share(NamedTuple):
    """What a member has brought: see Bus.plan."""

    slot: int
    num_tokens: int
    num_rows: int
    returned_at: int


class PlannedExchange(BusExchange):
    """See BusExchange. Rows are received where the backend computes."""

    def __init__(
        self, bus: Bus, num_experts: Sequence[int], backend: ComputeBackend, replica: Sequence[int] = ()
    ) -> None:
        super().__init__(bus, num_experts, backend, backend.device, replica)
        self._moved_ns = 0
        self._is_alone = False  # the only member in this step: nothing travels
        self._is_whole = True  # each own token of the layer has all its choices
        self._sent_fields = SentFields(backend.device, is_packed=True)
        self._sent: Mapping[str, torch.Tensor] = {}  # of the layer between dispatch and combine
        self._tokens_TH = self._answers_RH = self.rows_RH
        self._fetched_R = self._answered_R = torch.empty(0, dtype=torch.int64)
        self._returned_P = torch.empty(bus.max_tokens * bus.top_k, dtype=torch.int64)
        self._shares: list[Share] = []  # of the layer between dispatch and combine
        self._chosen: tuple[Mirror, Mirror] | None = None  # its ids and weights

    def begin_step(self, total_tokens: int, deadline_ms: float) -> None:
        """See Exchange. A generation that is over ends at the first meeting, whoever its members were."""
        super().begin_step(total_tokens, deadline_ms)
        generation, members, *_ = self._bus.membership()
        self._is_alone = generation == self._generation and members == 1 << self._bus.slot

    def _make_room(self, num_tokens: int, num_rows: int) -> None:
        """See BusExchange."""
        tokens_TH, answers_RH = self._rows(num_tokens), self._rows(num_rows)
        fetched_R, answered_R = (torch.empty(num_rows, dtype=torch.int64) for _ in range(2))
        super()._make_room(num_tokens, num_rows)
        self._tokens_TH, self._answers_RH, self._fetched_R, self._answered_R = (
            tokens_TH,
            answers_RH,
            fetched_R,
            answered_R,
        )

    def dispatch(self, layer: int, x_NH: Mirror, ids_NK: Mirror, weights_NK: Mirror, n: int, *, first: int = 0) -> int:
        """See Exchange. Raises ValueError for an id without a home, and for more tokens than the step has."""
        routing = self._routing(layer)
        x_NH, ids_NK, weights_NK = (rows_from(mirror, first) for mirror in (x_NH, ids_NK, weights_NK))
        self._announce(x_NH, ids_NK, n)
        shares = self._patiently(
            lambda wait_ms: self._bus.plan(
                routing,
                self._generation,
                ids_NK.host.data_ptr(),
                n,
                self._fetched_R.data_ptr(),
                self._answered_R.data_ptr(),
                self._fetched_R.shape[0],
                self._returned_P.data_ptr(),
                self._counts_addr,
                wait_ms,
            )
        )
        self._expert_rows.count(layer, self.counts_E)
        started = time.perf_counter_ns()
        self._shares, self._chosen = [Share(*share) for share in shares], (ids_NK, weights_NK)
        total, room = sum(share.num_tokens for share in self._shares), self._tokens_TH.shape[0]
        if total > room:
            raise ValueError(f"the members have brought {total} tokens to a step of {room}")
        if not self._is_alone:
            self._fetch(layer, x_NH, n)
        num_rows = self._num_rows
        self._sent = self._send_places(num_rows, n)
        tokens_TH = x_NH.device if self._is_alone else self._tokens_TH
        torch.index_select(tokens_TH, 0, self._sent["fetched"], out=self.rows_RH[:num_rows])
        self._moved_ns += time.perf_counter_ns() - started
        return num_rows

    def _send_places(self, num_rows: int, n: int) -> dict[str, torch.Tensor]:
        """Where each row comes from, where its answer stands among those that leave, and where the answers to the own
        tokens will lie. What used those of the layer before is over: the ids have been waited for since."""
        fetched, answered, returned = (
            some[:count].numpy().astype(np.int32)
            for some, count in (
                (self._fetched_R, num_rows),
                (self._answered_R, num_rows),
                (self._returned_P, n * self._top_k),
            )
        )
        self._is_whole = bool((returned >= 0).all())
        if self._is_alone:  # the answers are where they were computed
            if num_rows:
                returned = answered[returned] if self._is_whole else np.where(returned < 0, -1, answered[returned])
            return self._sent_fields.send({"fetched": fetched, "returned": returned})
        return self._sent_fields.send({"fetched": fetched, "answered": answered, "returned": returned})

    @property
    def _num_rows(self) -> int:
        return sum(share.num_rows for share in self._shares)

    def combine(self, layer: int, y_RH: torch.Tensor, out_NH: Mirror, n: int, *, first: int = 0) -> None:
        """See Exchange. Raises ValueError without a dispatch before it."""
        routing, chosen = self._routing(layer), self._chosen
        if chosen is None:
            raise ValueError("combine without a dispatch before it")
        failpoint("rank.combine")
        started = time.perf_counter_ns()
        if not self._is_alone:
            answers_RH = self._answers_RH[: self._num_rows]
            torch.index_select(y_RH, 0, self._sent["answered"], out=answers_RH)
            self._answer(answers_RH, n)
            self._moved_ns += time.perf_counter_ns() - started
            self._backend.fence()
        self._patiently(lambda wait_ms: self._bus.meet_combined(routing, self._generation, n, wait_ms))
        started = time.perf_counter_ns()
        self._chosen = None
        answers_RH = y_RH if self._is_alone else self._returned_PH
        at_P, weights_NK = self._sent["returned"], chosen[1].device
        self._backend.weighted_sum(WeightedSum(answers_RH, at_P, weights_NK, out_NH.device[first:], self._is_whole), n)
        self._moved_ns += time.perf_counter_ns() - started
        self._num_left -= 1

    def take_times(self) -> ExchangeTimes:
        """See Exchange. What is queued counts with the time that queueing takes."""
        exchange_ns, wait_ns = super().take_times()
        moved_ns, self._moved_ns = self._moved_ns, 0
        return ExchangeTimes(exchange_ns + moved_ns, wait_ns)

    @abstractmethod
    def _announce(self, x_NH: Mirror, ids_NK: Mirror, n: int) -> None:
        """Bring the ids to the host, and whatever others fetch without asking to where they do; blocks until it is
        there. Who `is_alone` has nobody who fetches."""

    @abstractmethod
    def _fetch(self, layer: int, x_NH: Mirror, n: int) -> None:
        """Queue the tokens of the members that have rows for the own experts into `_tokens_TH`, each member's at once,
        in the order of the shares, with the place of those that are not fetched left as it is."""

    @abstractmethod
    def _answer(self, answers_RH: torch.Tensor, n: int) -> None:
        """Queue the answers' way to the members, each member's at once, in the order of the shares."""

    @property
    @abstractmethod
    def _returned_PH(self) -> torch.Tensor:
        """Where the answers to the own tokens lie, owner by owner, once all have met."""
