"""The HMM's own view of its memory: the handles of each device, where it maps them itself, ledgers and the bus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import product

from elasticmoe.common.devices.base import Device, Handle, Range, Space
from elasticmoe.common.devices.rules import HandleOrigin
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError
from elasticmoe.common.seat_sizes import BusSizes
from elasticmoe.common.telemetry import get_logger
from elasticmoe.native.bus import Bus, format_bus
from elasticmoe.services.hmm.memory.catalog import DeviceEntry, Placed, Span

log = get_logger("hmm")
_Window = tuple[Space, HandleOrigin, int]


class DeviceMemory:
    """All handles of one device, mapped here as long as they live, each at its own offset of a window of its space, so
    that addresses are stable. `records`, `kv`, `mailbox` and `ledger` are what the catalog names; the last two are of
    the rank on this device, the ledger memory of the host.

    Belongs to the load's thread during a load, else to the service's loop.
    """

    def __init__(self, device: Device, *, has_large: bool = True) -> None:
        """`has_large`: whether large pages are wanted where the device's own are small."""
        self.device = device
        self._large_bytes = device.large_page_bytes if has_large else 0
        self.records: dict[RecordKey, Handle] = {}
        self.kv: list[Handle] = []
        self.mailbox: Handle | None = None
        self.ledger: HostShared | None = None
        self._windows: dict[_Window, Range] = {}

    def claim_record(self, key: RecordKey, nbytes: int) -> Handle:
        """Claim and map the handle of a weight record, which the catalog names from now on. Raises as `claim`."""
        handle = self.records[key] = self.claim(nbytes, "weights", key.range_offset(nbytes))
        return handle

    def claim_kv(self, nbytes: int) -> Handle:
        """Claim and map one more KV handle, which the catalog names from now on. Raises as `claim`."""
        self.kv.append(self.claim(nbytes, "kv", len(self.kv) * nbytes))
        return self.kv[-1]

    def create_mailbox(self, nbytes: int) -> None:
        """Create, map and export the mailbox of the rank on this device. Raises DoesNotFit, DeviceError; Unavailable at
        the limit of open files."""
        self.mailbox = self.device.create(nbytes, "mailbox")
        self._map(self.mailbox)
        self.device.export(self.mailbox)  # every rank is told of it: a refusal must not come only then

    def claim(self, nbytes: int, space: Space, at: int = 0) -> Handle:
        """A mapped handle without pages that the catalog does not name yet (Device.claim). Raises DoesNotFit,
        DeviceError."""
        handle = self.device.claim(nbytes, space, at)
        try:
            self._map(handle)
        except BaseException:
            self.device.release(handle)
            raise
        return handle

    def _map(self, handle: Handle) -> None:
        name, offset = self._window_of(handle)
        window = self._windows.get(name)
        if window is None:
            window = self._windows[name] = self.device.reserve(self.device.window_bytes)
        self.device.map(window, offset, handle, writable=True)

    def _window_of(self, handle: Handle) -> tuple[_Window, int]:
        """Which window a handle is in, and its offset there. A predecessor's handles have windows of their own."""
        assert handle.space is not None, "the HMM maps no imported handles"
        number, offset = divmod(handle.place, self.device.window_bytes)
        return (handle.space, handle.origin, number), offset

    def where(self, handle: Handle) -> tuple[Range, int]:
        """Where a handle is mapped, as a range and the offset there. Raises DeviceError where it is not, because the
        device failed before."""
        name, offset = self._window_of(handle)
        if name not in self._windows:
            self.device.check_usable()
        return self._windows[name], offset

    def address(self, handle: Handle) -> int:
        """`where`, as an address."""
        range_, offset = self.where(handle)
        return range_.address(offset)

    def large_parts(self, handles: Iterable[Handle] | None = None) -> list[tuple[Range, int, int]]:
        """What of mapped `handles` could lie in large pages, as (range, offset, bytes): of those that lie one behind
        the other, all but the ends; nothing where large pages are not wanted. None: of the records and the KV that the
        catalog names."""
        large = self._large_bytes
        if not large:
            return []
        spans: dict[Range, list[tuple[int, int]]] = {}
        for handle in (*self.records.values(), *self.kv) if handles is None else handles:
            range_, offset = self.where(handle)
            spans.setdefault(range_, []).append((offset, offset + handle.nbytes))
        parts = []
        for range_, some in spans.items():
            for begin, end in _joined(sorted(some)):
                first, last = -(-begin // large) * large, end // large * large
                if first < last:
                    parts.append((range_, first, last - first))
        return parts

    def clear(self) -> None:
        """Unmap and release every handle."""
        self.let_go(*self.take_all())

    def take_all(self) -> list[Handle | HostShared]:
        """All that the catalog names, which it does no more: it is the caller's, to `release`."""
        single = [one for one in (self.mailbox, self.ledger) if one is not None]
        taken: list[Handle | HostShared] = [*self.records.values(), *self.kv, *single]
        self.records.clear()
        self.kv.clear()
        self.mailbox = self.ledger = None
        return taken

    def release(self, memory: Handle | HostShared) -> None:
        """Unmap and give back what the catalog does not name."""
        if isinstance(memory, HostShared):
            memory.close()
            return
        if memory.num_mappings:
            name, offset = self._window_of(memory)
            self.device.unmap(self._windows[name], offset)
        self.device.release(memory)

    def let_go(self, *memory: Handle | HostShared) -> None:
        """`release`, where a driver's refusal must hold up nothing else: it is logged, and that memory stays counted
        until this process ends. The device is waited for once."""
        mapped = [one for one in memory if isinstance(one, Handle) and one.num_mappings]
        with suppress(ElasticMoEError):  # what is refused is asked for again, one by one
            self.device.unmap_many([self.where(handle) for handle in mapped])
        for one in memory:
            try:
                self.release(one)
            except ElasticMoEError as error:
                log.error("memory is not given back", device=self.device.name, code=error.code, reason=error.message)

    def entry(self) -> DeviceEntry:
        """The catalog's entry of this device."""
        records = tuple(Placed(key, _span(handle)) for key, handle in self.records.items())
        kv = tuple(_span(handle) for handle in self.kv)
        ledger_bytes = self.ledger.nbytes if self.ledger else 0
        mailbox = _span(self.mailbox) if self.mailbox is not None else None
        return DeviceEntry(self.device.name, self.device.budget, records, kv, ledger_bytes, mailbox)

    def restore(self, entry: DeviceEntry, ledger: HostShared | None) -> None:
        """Take over what a predecessor created, and give back what it did not record. What was on a device that has
        failed is taken over by name, for the catalog. Raises DeviceError."""
        self.ledger = ledger
        for placed in entry.records:
            self.records[placed.key] = self._take_over("weights", placed.span)
        for span in entry.kv:
            self.kv.append(self._take_over("kv", span))
        if entry.mailbox is not None:
            self.mailbox = self._take_over("mailbox", entry.mailbox)
        self.device.trim()

    def _take_over(self, space: Space, span: Span) -> Handle:
        handle = self.device.restore(space, span.offset, span.nbytes, span.key)
        try:
            self._map(handle)
        except DeviceError:
            if not self.device.failure:
                raise
        return handle

    def check_integrity(self) -> list[str]:
        """Findings of the device, and whether all of the ledger's memory is there. None: all is well."""
        findings = self.device.check_integrity()
        if self.ledger is not None and self.ledger.pages < self.ledger.nbytes:
            text = f"{self.ledger.pages} bytes are present, it has {self.ledger.nbytes}"
            findings.append(f"{self.device.name}: of the ledger, {text}")
        return findings

    def close(self) -> None:
        """Give back this process's part of everything. Idempotent."""
        if self.ledger is not None:
            self.ledger.close()
            self.ledger = None
        try:
            self.device.close()
        except ElasticMoEError as error:
            log.error("memory is not given back", device=self.device.name, code=error.code, reason=error.message)


def _joined(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans that ascend, those that touch as one."""
    begin, end = spans[0]
    for first, last in spans[1:]:
        if first > end:
            yield begin, end
            begin = first
        end = last
    yield begin, end


def _span(handle: Handle) -> Span:
    return Span(handle.place, handle.nbytes, handle.key)


class BusSegment:
    """The bus's memory. It is working memory like activations, outside the devices' budgets: its exchange areas take
    pages only when they are touched. Owns it."""

    def __init__(self, shared: HostShared) -> None:
        self.shared = shared
        self.bus: Bus | None = None

    def format(self, sizes: BusSizes) -> None:
        """Give an empty segment its size and header, and open it. Raises DoesNotFit."""
        self.shared.resize(sizes.nbytes)
        shape = (sizes.max_ranks, sizes.max_tokens, sizes.hidden, sizes.top_k, sizes.half_elements, sizes.plan_bytes)
        format_bus(self.shared.address, sizes.nbytes, *shape)
        self.bus = Bus(self.shared.address, sizes.nbytes)

    @classmethod
    def open(cls, fd: int, nbytes: int) -> BusSegment:
        """A segment that a predecessor formatted; `fd` is taken over. Raises DeviceError invalid_extent."""
        segment = cls(HostShared.open(fd, nbytes))
        try:
            segment.bus = Bus(segment.shared.address, nbytes)
        except ValueError as error:
            segment.close()
            raise DeviceError(f"the bus of {nbytes} bytes cannot be opened: {error}", code="invalid_extent") from None
        return segment

    def clear(self, slot: int) -> None:
        """Forget what the ranks of an earlier replica have said in a slot of their KV. While no seat is there."""
        if self.bus is not None:
            Bus(self.shared.address, self.shared.nbytes, slot).set_kv_blocks(0)

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        self.bus = None
        self.shared.close()


def check_exchange(joining: Sequence[Device], staying: Sequence[Device] = ()) -> None:
    """Whether ranks that join on these devices, and those that stay, can map one another's mailboxes.

    Raises DeviceError no_peer_access.
    """
    pairs = [*product(joining, (*joining, *staying)), *product(staying, joining)]
    for one, other in pairs:
        if not one.reaches(other.name):
            text = f"{one.name} cannot access the memory of {other.name}, which ranks need to exchange tokens from "
            raise DeviceError(f"{text}device to device: {one.unreached}", code="no_peer_access")
