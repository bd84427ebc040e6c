"""The mailboxes of a host's seats, as one rank has them mapped: each in a range of its own on the rank's device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from elasticmoe.common.devices.base import Device, Handle, Range
from elasticmoe.common.devices.rules import Token
from elasticmoe.native.bus import Bus
from elasticmoe.services.worker.exchange.mailbox import Mailbox


class _Mapped(NamedTuple):
    """A mailbox in its place."""

    range_: Range
    handle: Handle
    mailbox: Mailbox


class Mailboxes(Mapping[int, Mailbox]):
    """By slot, those of all seats that the rank may exchange tokens with, its own among them. Owned by the rank's
    thread; `device` is the caller's, whose end is theirs."""

    def __init__(self, device: Device, bus: Bus) -> None:
        self._device = device
        self._bus = bus
        self._mapped: dict[int, _Mapped] = {}

    def __getitem__(self, slot: int) -> Mailbox:
        return self._mapped[slot].mailbox

    def __iter__(self) -> Iterator[int]:
        return iter(self._mapped)

    def __len__(self) -> int:
        return len(self._mapped)

    def follow(self, named: Mapping[int, Token]) -> None:
        """Map what is named, and unmap what is not, or what was another seat's in that slot. At once: who goes is in no
        generation any more, and mapping is quick. Raises DeviceError."""
        for slot, (range_, handle, _) in list(self._mapped.items()):
            if slot not in named or not self._device.is_named(handle, named[slot]):
                del self._mapped[slot]
                self._device.unmap(range_, 0)
                self._device.unreserve(range_)
                self._device.release(handle)
        for slot, token in named.items():
            if slot not in self._mapped:
                self._mapped[slot] = self._map(token)

    def _map(self, token: Token) -> _Mapped:
        handle = self._device.import_(token)
        range_ = self._device.reserve(handle.nbytes)
        self._device.map(range_, 0, handle, True)
        hidden, num_tokens, num_rows = self._bus.hidden, self._bus.max_tokens, self._bus.max_tokens * self._bus.top_k
        x_NH = self._device.wrap(range_, 0, (num_tokens, hidden), None, "float32")
        returned_PH = self._device.wrap(range_, x_NH.nbytes, (num_rows, hidden), None, "float32")
        return _Mapped(range_, handle, Mailbox(x_NH, returned_PH))
