"""The HMM's own view of its memory: the handles of each device, where it maps them itself, and the bus segment."""

from __future__ import annotations

import os

from common.capacity import BusSizes
from common.devices.base import Device, Handle, Range, Space
from common.model_spec import RecordKey
from common.protocol.errors import DeviceError
from native.bus import Bus, format_bus
from native.host import Reservation
from services.hmm.catalog import DeviceEntry, Placed, Span


class DeviceMemory:
    """All handles of one device, mapped here as long as they live, each at its own offset of one window per space, so
    that addresses are stable. `records`, `kv` and `ledger` are what the catalog names.

    Belongs to the load's thread during a load, else to the service's loop.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.records: dict[RecordKey, Handle] = {}
        self.kv: list[Handle] = []
        self.ledger: Handle | None = None
        self._windows: dict[Space, Range] = {}

    def create_record(self, key: RecordKey, nbytes: int) -> None:
        """Create and map the handle of a weight record. Raises DoesNotFit."""
        handle = self.device.create(nbytes, "weights")
        self.records[key] = handle
        self._map(handle)

    def create_ledger(self, nbytes: int) -> None:
        """Create and map the ledger's handle. Raises DoesNotFit."""
        self.ledger = self.device.create(nbytes, "shared")
        self._map(self.ledger)

    def create_kv(self, nbytes: int) -> None:
        """Create and map one more KV handle. Raises DoesNotFit."""
        self.kv.append(self.device.create(nbytes, "kv"))
        self._map(self.kv[-1])

    def claim(self, nbytes: int, space: Space) -> Handle:
        """A mapped handle without pages that the catalog does not name yet (Device.claim). Raises DoesNotFit."""
        handle = self.device.claim(nbytes, space)
        self._map(handle)
        return handle

    def _map(self, handle: Handle) -> None:
        assert handle.space is not None, "the HMM maps local handles only"
        window = self._windows.get(handle.space)
        if window is None:
            window = self._windows[handle.space] = self.device.reserve(self.device.reach)
        self.device.map(window, handle.place, handle, writable=True)

    def address(self, handle: Handle) -> int:
        """Where a handle is mapped."""
        assert handle.space is not None, "the HMM maps local handles only"
        return self._windows[handle.space].address(handle.place)

    def clear(self) -> None:
        """Unmap and release every handle."""
        for handle in self.take_all():
            self.release(handle)

    def take_all(self) -> list[Handle]:
        """Every handle that the catalog names, which it does no more: they are the caller's, to `release`."""
        handles = [*self.records.values(), *self.kv, *([self.ledger] if self.ledger else [])]
        self.records.clear()
        self.kv.clear()
        self.ledger = None
        return handles

    def release(self, handle: Handle) -> None:
        """Unmap and release a handle that the catalog does not name."""
        if handle.num_mappings and handle.space is not None:
            self.device.unmap(self._windows[handle.space], handle.place)
        self.device.release(handle)

    def entry(self) -> DeviceEntry:
        """The catalog's entry of this device."""
        records = tuple(Placed(key, _span(handle)) for key, handle in self.records.items())
        kv = tuple(_span(handle) for handle in self.kv)
        ledger = _span(self.ledger) if self.ledger else None
        return DeviceEntry(self.device.name, self.device.budget, records, kv, ledger)

    def restore(self, entry: DeviceEntry) -> None:
        """Take over what a predecessor created, and give back what it did not record. Raises DeviceError."""
        for placed in entry.records:
            handle = self.device.restore("weights", placed.span.offset, placed.span.nbytes)
            self.records[placed.key] = handle
            self._map(handle)
        for span in entry.kv:
            self.kv.append(self.device.restore("kv", span.offset, span.nbytes))
            self._map(self.kv[-1])
        if entry.ledger:
            self.ledger = self.device.restore("shared", entry.ledger.offset, entry.ledger.nbytes)
            self._map(self.ledger)
        self.device.trim()


def _span(handle: Handle) -> Span:
    return Span(handle.place, handle.nbytes)


class BusSegment:
    """The bus's memfd. It is working memory like activations, outside the devices' budgets: its exchange areas take
    pages only when they are touched. Owns the descriptor and the mapping."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.nbytes = 0
        self.bus: Bus | None = None
        self._mapping: Reservation | None = None

    def format(self, sizes: BusSizes) -> None:
        """Give an empty segment its size and header, and open it."""
        os.ftruncate(self.fd, sizes.nbytes)
        base = self._map(sizes.nbytes)
        format_bus(base, sizes.nbytes, sizes.max_ranks, sizes.max_tokens, sizes.hidden, sizes.top_k)
        self.bus = Bus(base, sizes.nbytes)

    def open(self, nbytes: int) -> None:
        """Open a segment that a predecessor formatted. Raises DeviceError."""
        try:
            self.bus = Bus(self._map(nbytes), nbytes)
        except OSError as error:
            text = f"the bus of {nbytes} bytes cannot be opened: {error.strerror}"
            raise DeviceError(text, code="invalid_extent") from None
        except ValueError as error:
            raise DeviceError(f"the bus of {nbytes} bytes cannot be opened: {error}", code="invalid_extent") from None

    def _map(self, nbytes: int) -> int:
        self.nbytes = nbytes
        self._mapping = Reservation(nbytes)
        self._mapping.map(0, self.fd, 0, nbytes, True)
        return self._mapping.base

    def close(self) -> None:
        """Unmap and close."""
        self.bus = None
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        os.close(self.fd)
