"""What the exchanges share whose rows travel outside of the bus: ids, counts and arrivals on it, and the rows in an
order that all work out from these.

A rank's part of a layer has two lives, as its area of the bus has (native/src/bus/exchange.h): its own rows, which go
to the experts' owners, and the answers that come back. By what means they travel is a subclass's affair.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from elasticmoe.common.failpoint import failpoint
from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
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
        self._tokens_TH = self._answers_RH = self.rows_RH
        self._fetched_R = self._answered_R = torch.empty(0, dtype=torch.int64)
        self._returned_P = torch.empty(bus.max_tokens * bus.top_k, dtype=torch.int64)
        self._shares: list[Share] = []  # of the layer between dispatch and combine
        self._chosen: tuple[Mirror, Mirror] | None = None  # its ids and weights

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
        self._fetch(layer, x_NH, n)
        num_rows = self._num_rows
        fetched_R = self._fetched_R[:num_rows].to(self._device)
        torch.index_select(self._tokens_TH, 0, fetched_R, out=self.rows_RH[:num_rows])
        self._moved_ns += time.perf_counter_ns() - started
        return num_rows

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
        answers_RH = self._answers_RH[: self._num_rows]
        torch.index_select(y_RH, 0, self._answered_R[: self._num_rows].to(self._device), out=answers_RH)
        self._answer(answers_RH, n)
        self._moved_ns += time.perf_counter_ns() - started
        self._backend.fence()
        self._patiently(lambda wait_ms: self._bus.meet_combined(routing, self._generation, n, wait_ms))
        started = time.perf_counter_ns()
        self._chosen = None
        self._sum(*chosen, out_NH.device[first:], n)
        self._moved_ns += time.perf_counter_ns() - started
        self._num_left -= 1

    def _sum(self, ids_NK: Mirror, weights_NK: Mirror, out_NH: torch.Tensor, n: int) -> None:
        """Queue out[t] = sum over k of weight * answer. As the bus does it: products that are rounded, then added to 0
        in the order of k."""
        if not n:
            return
        at_P = self._returned_P[: n * self._top_k]
        is_whole = bool((at_P >= 0).all())
        rows_PH = self._returned_PH.index_select(0, at_P.clamp(min=0).to(self._device))
        products_NKH = rows_PH.view(n, self._top_k, -1).mul_(weights_NK.device[:n, :, None])
        if not is_whole:  # what an unused choice points at may be anything
            products_NKH.masked_fill_((ids_NK.device[:n] < 0)[:, :, None], 0.0)
        torch.add(products_NKH[:, 0], 0.0, out=out_NH[:n])
        for k in range(1, self._top_k):
            out_NH[:n].add_(products_NKH[:, k])

    def take_times(self) -> ExchangeTimes:
        """See Exchange. What is queued counts with the time that queueing takes."""
        exchange_ns, wait_ns = super().take_times()
        moved_ns, self._moved_ns = self._moved_ns, 0
        return ExchangeTimes(exchange_ns + moved_ns, wait_ns)

    @abstractmethod
    def _announce(self, x_NH: Mirror, ids_NK: Mirror, n: int) -> None:
        """Bring the ids to the host, and whatever others fetch without asking to where they do; blocks until it is
        there."""

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
