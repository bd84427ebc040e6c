"""Ranks that exchange tokens by a kind of exchange, in threads of one process, over a real bus."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from elasticmoe.common.layout import ExchangeKind
from elasticmoe.native.bus import Bus, bus_bytes, format_bus
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.groups import Groups
from elasticmoe.services.worker.exchange.mailbox import Mailbox, MailboxExchange
from elasticmoe.services.worker.exchange.shm import ShmExchange
from elasticmoe.services.worker.exchange.torch_dist import TorchDistExchange

KINDS: Final[tuple[ExchangeKind, ...]] = ("shm", "mailbox", "torch_dist")


class Host:
    """A bus of `shape` (ranks, tokens, hidden, top_k), and a mailbox for each slot, full of NaN."""

    def __init__(self, shape: tuple[int, int, int, int], half_elements: int = 0, plan_bytes: int = 0) -> None:
        num_ranks, max_tokens, hidden, top_k = shape
        self._nbytes = bus_bytes(*shape, half_elements, plan_bytes)
        self._temporary = TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        self._groups: list[Groups] = []
        weakref.finalize(self, _close, self._groups, self._temporary)
        self._memory = mmap.mmap(-1, self._nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        format_bus(self._address, self._nbytes, *shape, half_elements, plan_bytes)
        self.observer = Bus(self._address, self._nbytes)
        self.mailboxes = {
            slot: Mailbox(*(torch.full((count, hidden), float("nan")) for count in (max_tokens, max_tokens * top_k)))
            for slot in range(num_ranks)
        }

    def join(self, slot: int, incarnation: int = 1) -> Bus:
        """The bus, as the rank in `slot` has it."""
        bus = Bus(self._address, self._nbytes, slot)
        bus.join(incarnation)
        return bus

    def bytes(self) -> bytes:
        """All that is in the bus."""
        return self._memory[:]

    def open(
        self,
        kind: ExchangeKind,
        bus: Bus,
        num_experts: Sequence[int],
        backend: ComputeBackend,
        replica: Sequence[int] = (),
    ) -> Exchange:
        """A rank's end of an exchange; `replica`: slots of its replica where that has several ranks."""
        if kind == "mailbox":
            return MailboxExchange(bus, num_experts, backend, self.mailboxes, replica)
        if kind == "torch_dist":
            groups = Groups(self._folder / "rendezvous", "memory", bus, backend.device)
            self._groups.append(groups)
            return TorchDistExchange(bus, num_experts, backend, groups, replica)
        return ShmExchange(bus, num_experts, backend, replica)


def _close(groups: list[Groups], folder: TemporaryDirectory[str]) -> None:
    """Nobody uses them any more. All are given up before one is waited for: they may wait for one another."""
    for each in groups:
        each.keep(sys.maxsize)
    for each in groups:
        each.close()
    folder.cleanup()
