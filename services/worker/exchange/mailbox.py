"""The exchange between devices of one host: rows travel from memory to memory of devices, and never through the host's.

Each seat has a mailbox in its device's memory, which the HMM owns and every rank of the host maps (ADR 34). It has two
parts, as a rank's area of the bus has, with the same lives (native/src/bus/exchange.h): the rank's own rows, which it
writes and others fetch, and the rows that others return to it. Ids, counts and arrivals travel on the bus.

There are two waits for the device in a layer and no more: before the own rows are announced, and before the answers
are. What comes after a meeting is queued: it copies what others have finished, as they have said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from elasticmoe.common.failpoint import failpoint
from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.exchange.base import ExchangeTimes
from elasticmoe.services.worker.exchange.bus import BusExchange, rows_from


class Mailbox(NamedTuple):
    """A seat's, as this process has mapped it; float32. P: max_tokens x K."""

    x_NH: torch.Tensor
    returned_PH: torch.Tensor


class _Share(NamedTuple):
    """What a member has brought: see Bus.plan."""

    slot: int
    num_tokens: int
    num_rows: int
    returned_at: int


class MailboxExchange(BusExchange):
    """See BusExchange. `mailboxes`: of all slots that may be members, this rank's own `bus.slot` among them; they stay
    the caller's, and may come and go between steps. Rows are received where the backend computes."""

    def __init__(
        self,
        bus: Bus,
        num_experts: Sequence[int],
        backend: ComputeBackend,
        mailboxes: Mapping[int, Mailbox],
        replica: Sequence[int] = (),
    ) -> None:
        super().__init__(bus, num_experts, backend, backend.device, replica)
        self._mailboxes = mailboxes
        self._moved_ns = 0
        self._tokens_TH = self._answers_RH = self.rows_RH
        self._fetched_R = self._answered_R = torch.empty(0, dtype=torch.int64)
        self._returned_P = torch.empty(bus.max_tokens * bus.top_k, dtype=torch.int64)
        self._shares: list[_Share] = []  # of the layer between dispatch and combine
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
        own_NH = self._mailboxes[self._bus.slot].x_NH
        self._backend.download(Mirror(x_NH.device, own_NH), ids_NK)(n)
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
        started = time.perf_counter_ns()
        self._shares, self._chosen = [_Share(*share) for share in shares], (ids_NK, weights_NK)
        num_rows = self._fetch()
        self._moved_ns += time.perf_counter_ns() - started
        return num_rows

    def _fetch(self) -> int:
        """Queue copies of what members have for the own experts, each member's tokens at once, and sort the rows."""
        total, room = sum(share.num_tokens for share in self._shares), self._tokens_TH.shape[0]
        if total > room:
            raise ValueError(f"the members have brought {total} tokens to a step of {room}")
        at = 0
        for share in self._shares:
            if share.num_rows:
                target_TH = self._tokens_TH[at : at + share.num_tokens]
                target_TH.copy_(self._mailboxes[share.slot].x_NH[: share.num_tokens])
            at += share.num_tokens
        num_rows = sum(share.num_rows for share in self._shares)
        fetched_R = self._fetched_R[:num_rows].to(self._device)
        torch.index_select(self._tokens_TH, 0, fetched_R, out=self.rows_RH[:num_rows])
        return num_rows

    def combine(self, layer: int, y_RH: torch.Tensor, out_NH: Mirror, n: int, *, first: int = 0) -> None:
        """See Exchange. Raises ValueError without a dispatch before it."""
        routing, chosen = self._routing(layer), self._chosen
        if chosen is None:
            raise ValueError("combine without a dispatch before it")
        failpoint("rank.combine")
        started = time.perf_counter_ns()
        self._answer(y_RH)
        self._moved_ns += time.perf_counter_ns() - started
        self._backend.fence()
        self._patiently(lambda wait_ms: self._bus.meet_combined(routing, self._generation, n, wait_ms))
        started = time.perf_counter_ns()
        self._chosen = None
        self._sum(*chosen, out_NH.device[first:], n)
        self._moved_ns += time.perf_counter_ns() - started
        self._num_left -= 1

    def _answer(self, y_RH: torch.Tensor) -> None:
        """Queue the answers' way to the members' mailboxes, each member's at once."""
        num_rows = sum(share.num_rows for share in self._shares)
        answers_RH = self._answers_RH[:num_rows]
        torch.index_select(y_RH, 0, self._answered_R[:num_rows].to(self._device), out=answers_RH)
        at = 0
        for share in self._shares:
            if share.num_rows:
                end = share.returned_at + share.num_rows
                target_PH = self._mailboxes[share.slot].returned_PH[share.returned_at : end]
                target_PH.copy_(answers_RH[at : at + share.num_rows])
            at += share.num_rows

    def _sum(self, ids_NK: Mirror, weights_NK: Mirror, out_NH: torch.Tensor, n: int) -> None:
        """Queue out[t] = sum over k of weight * answer. As the bus does it: products that are rounded, then added to 0
        in the order of k."""
        if not n:
            return
        at_P = self._returned_P[: n * self._top_k]
        is_whole = bool((at_P >= 0).all())
        rows_PH = self._mailboxes[self._bus.slot].returned_PH.index_select(0, at_P.clamp(min=0).to(self._device))
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
