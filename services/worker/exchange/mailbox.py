"""The exchange between devices of one host: rows travel from memory to memory of devices, and never through the host's.

Each seat has a mailbox in its device's memory, which the HMM owns and every rank of the host maps (ADR 34). It has two
parts: the rank's own rows, which it writes and others fetch, and the rows that others return to it.

There are two waits for the device in a layer and no more: before the own rows are announced, and before the answers
are. What comes after a meeting is queued: it copies what others have finished, as they have said. A rank that is the
only one waits once, for the ids, and uses no mailbox.

Copies from another device or to it are the device's affair (Device.queue_copy): some let no kernel do that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.exchange.planned import PlannedExchange


class Mailbox(NamedTuple):
    """A seat's, as this process has mapped it; float32. P: max_tokens x K."""

    x_NH: torch.Tensor
    returned_PH: torch.Tensor


class MailboxExchange(PlannedExchange):
    """See PlannedExchange. `mailboxes`: of all slots that may be members, this rank's own `bus.slot` among them; they
    stay the caller's, and may come and go between steps. `queue_copy(target, source)`: as the rank's device has it."""

    def __init__(
        self,
        bus: Bus,
        num_experts: Sequence[int],
        backend: ComputeBackend,
        mailboxes: Mapping[int, Mailbox],
        replica: Sequence[int] = (),
        queue_copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_,
    ) -> None:
        super().__init__(bus, num_experts, backend, replica)
        self._mailboxes = mailboxes
        self._queue_copy = queue_copy

    def _announce(self, x_NH: Mirror, ids_NK: Mirror, n: int) -> None:
        """See PlannedExchange."""
        if self._is_alone:
            self._backend.download(ids_NK)(n)
            return
        own_NH = self._mailboxes[self._bus.slot].x_NH
        self._backend.download(Mirror(x_NH.device, own_NH), ids_NK)(n)

    def _fetch(self, layer: int, x_NH: Mirror, n: int) -> None:
        """See PlannedExchange."""
        del layer, x_NH, n
        at = 0
        for share in self._shares:
            if share.num_rows:
                target_TH = self._tokens_TH[at : at + share.num_tokens]
                self._queue_copy(target_TH, self._mailboxes[share.slot].x_NH[: share.num_tokens])
            at += share.num_tokens

    def _answer(self, answers_RH: torch.Tensor, n: int) -> None:
        """See PlannedExchange."""
        del n
        at = 0
        for share in self._shares:
            if share.num_rows:
                end = share.returned_at + share.num_rows
                target_PH = self._mailboxes[share.slot].returned_PH[share.returned_at : end]
                self._queue_copy(target_PH, answers_RH[at : at + share.num_rows])
            at += share.num_rows

    @property
    def _returned_PH(self) -> torch.Tensor:
        """See PlannedExchange."""
        return self._mailboxes[self._bus.slot].returned_PH
