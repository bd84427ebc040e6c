"""The step barrier between ranks of one host: the shared-memory bus, and an eventfd for each rank that sleeps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from elasticmoe.native.bus import Bus, BusAborted, BusTimeout
from elasticmoe.services.worker.exchange.barrier import Arrival, BarrierMembership, StepBarrier
from elasticmoe.services.worker.exchange.base import StepAborted, StepTimedOut

_TOKENS_BITS: Final = 32
_TOKENS_MAX: Final = (1 << _TOKENS_BITS) - 1


class ShmBarrier(StepBarrier):
    """`bus` and `doorbells`, an eventfd by slot, stay the caller's; ranks that come and go change the latter."""

    def __init__(self, bus: Bus, doorbells: Mapping[int, int], slot: int) -> None:
        self._bus = bus
        self._doorbells = doorbells
        self._slot = slot

    def join(self, incarnation: int) -> None:
        """See StepBarrier."""
        self._bus.join(incarnation)

    def leave(self) -> None:
        """See StepBarrier."""
        self._bus.leave()

    def membership(self) -> BarrierMembership:
        """See StepBarrier."""
        return BarrierMembership(*self._bus.membership())

    def staged(self) -> tuple[int, int]:
        """See StepBarrier."""
        generation, _, epoch = self._bus.staged()
        return generation, epoch

    def arrive(self, generation: int, num_tokens: int, flags: int, wait_ms: float) -> list[Arrival]:
        """See StepBarrier."""
        try:
            return [Arrival(*said) for said in self._bus.step(generation, num_tokens, flags, wait_ms)]
        except BusAborted as aborted:
            raise StepAborted(aborted.generation) from None
        except BusTimeout as late:
            raise StepTimedOut(str(late)) from None

    def is_awaited(self, generation: int) -> bool:
        """See StepBarrier."""
        try:
            return self._bus.idle_wait(generation, 0)
        except BusAborted as aborted:
            raise StepAborted(aborted.generation) from None

    def switch(self, generation: int) -> bool:
        """See StepBarrier."""
        return self._bus.flip(generation)

    def count_progress(self) -> None:
        """See StepBarrier."""
        self._bus.bump_progress()

    def tell_waiting(self, is_waiting: bool) -> None:
        """See StepBarrier."""
        self._bus.set_waiting_for_device(is_waiting)

    def tell_shortage(self, generation: int, total_tokens: int) -> None:
        """See StepBarrier. Both are in one word of the bus."""
        self._bus.tell_shortage(generation << _TOKENS_BITS | min(total_tokens, _TOKENS_MAX))

    def shortage(self, slot: int, generation: int) -> int:
        """See StepBarrier."""
        said = self._bus.shortage(slot)
        return said & _TOKENS_MAX if said >> _TOKENS_BITS == generation else 0

    def ring(self) -> None:
        """See StepBarrier."""
        for slot, fd in self._doorbells.items():
            if slot != self._slot:
                try:
                    os.eventfd_write(fd, 1)
                except BlockingIOError:
                    pass  # the counter is full: it is ringing already

    def hear(self) -> None:
        """See StepBarrier."""
        try:
            os.eventfd_read(self._doorbells[self._slot])
        except BlockingIOError:
            pass  # somebody's ring was answered between poll and read
