"""All that outlives the HMM: devices' memory, the bus, doorbells and the catalog, and their way through the keeper.

At any instant the keeper holds what the snapshot names: descriptors are parked before the catalog that needs them is
written. So a start finds either everything, and adopts it without touching the data, or nothing of use.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from elasticmoe.common.capacity import budgets_of
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.devices.base import Device
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.devices.factory import give_up, granularity_of, memory_of, open_device
from elasticmoe.common.devices.names import DeviceCount
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.fdchannel import close_all
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout
from elasticmoe.common.machine import available_bytes
from elasticmoe.common.protocol.errors import ConfigError, DeviceError, ElasticMoEError, Unavailable
from elasticmoe.common.telemetry import Logger
from elasticmoe.services.hmm.memory.catalog import (
    Catalog,
    DeviceEntry,
    Loaded,
    Transition,
    check_integrity,
    decode,
    encode,
    slots_of,
)
from elasticmoe.services.hmm.memory.memory import BusSegment, DeviceMemory
from elasticmoe.services.hmm.memory.snapshot import Snapshot
from elasticmoe.services.hmm.sessions.parking import CATALOG, Parking

_BUS: Final = "bus"
_KEEPER_MS: Final = 10_000  # for all that it holds: one that has just started, or a busy machine, is waited for


class Holdings:
    """Made by `start`; `prepare` before a load and `commit` or `discard` after it. `memories` belong to the load's
    thread in between."""

    def __init__(self, config: HmmConfig, parking: Parking, log: Logger) -> None:
        self._config = config
        self._parking = parking
        self._log = log
        self._snapshot: Snapshot | None = None
        self.granularity = granularity_of(DeviceCount.parse(config.devices), config.granularity)
        self.memories: dict[str, DeviceMemory] = {}
        self.told: dict[str, MemoryInfo] = {}  # by drivers, at the start, of devices that have any
        self._failed: frozenset[str] = frozenset()  # devices that could not be opened at the start
        self.segment: BusSegment | None = None
        self.doorbells: dict[int, int] = {}
        self.loaded: Loaded | None = None
        self.transition: Transition | None = None
        self.num_readers = 0  # threads that read records: none may be given back meanwhile

    # ---- Start

    def start(self) -> None:
        """Adopt what the keeper holds, or begin afresh where it holds nothing valid. A device that cannot be opened is
        kept, and not used, as long as there is another one.

        Raises ConfigError where what it holds does not match the configuration; DeviceError; DoesNotFit where no device
        has memory for its driver; ElasticMoEError of the keeper channel.
        """
        self._look()
        kept = self._parking.fetch(deadline_ms=_KEEPER_MS)
        names = list(kept)
        try:
            is_adopted = self._adopt(kept)
        finally:
            close_all(kept.values())  # _adopt takes out what it keeps
        self._parking.forget(kept if is_adopted else names)
        if not is_adopted:
            self._begin()
        self._park()

    def _look(self) -> None:
        """Ask for what drivers say of the memory of each device. One that has no memory for that is as one that has
        failed."""
        names, failed = self._names(), dict[str, ElasticMoEError]()
        for name in names:
            try:
                self.told |= memory_of([name])
            except ElasticMoEError as error:
                failed[name] = error
        if len(failed) == len(names):
            raise failed[names[0]]
        for name, refusal in failed.items():
            give_up(name, refusal.message)
        self._failed = frozenset(failed)

    def _adopt(self, kept: dict[str, int]) -> bool:
        fd = kept.pop(CATALOG, None)
        if fd is None:
            return False
        self._snapshot = Snapshot(fd)
        raw = self._snapshot.read()
        try:
            if raw is None:
                raise ValueError("there is none")
            catalog = decode(raw)
            self._check_config(catalog)
            if catalog.loaded is not None and catalog.loaded.records != fingerprint(catalog.loaded.spec):
                raise ValueError("another version laid its records out in another way")
            for entry in catalog.devices:
                self._adopt_device(entry, kept)
            if catalog.loaded is not None:
                self._adopt_model(catalog.loaded, catalog.transition, kept)
        except (KeyError, ValueError, DeviceError) as error:
            self._log.warning("no valid catalog, so what was kept is dropped", reason=str(error))
            self.close()
            return False
        return True

    def _check_config(self, catalog: Catalog) -> None:
        kept = (catalog.granularity, [entry.device for entry in catalog.devices])
        if kept != (self.granularity, self._names()):
            raise ConfigError(
                f"the keeper holds the memory of {len(kept[1])} devices with granularity {kept[0]}; the configuration "
                f"says {self._config.devices} and {self.granularity}: stop the keeper to start afresh",
                code="keeper_mismatch",
            )

    def _adopt_device(self, entry: DeviceEntry, kept: dict[str, int]) -> None:
        prefix = f"device.{entry.device}."
        names = [name for name in kept if name.startswith(prefix)]
        descriptors = {name.removeprefix(prefix): kept.pop(name) for name in names}
        device = open_device(entry.device, self.granularity, entry.budget, descriptors=descriptors)
        memory = DeviceMemory(device, has_large=self._config.large_pages)
        self.memories[entry.device] = memory  # at once: whatever fails from here on, `close` ends it
        ledger = kept.pop(_ledger(entry.device)) if entry.ledger_bytes else None
        memory.restore(entry, HostShared.open(ledger, entry.ledger_bytes) if ledger is not None else None)

    def _adopt_model(self, loaded: Loaded, transition: Transition | None, kept: dict[str, int]) -> None:
        self.segment = BusSegment.open(kept.pop(_BUS), loaded.bus_bytes)
        for slot in _slots_in_use(loaded, transition):
            self.doorbells[slot] = kept.pop(_doorbell(slot))
        self.loaded, self.transition = loaded, transition

    def _begin(self) -> None:
        names = self._names()
        budgets = budgets_of(self._config, available_bytes(), self.told)
        usable = {name: budget for name, budget in budgets.items() if name not in self._failed}
        small = next((name for name, budget in usable.items() if not budget), None)
        if small is not None:
            given = self._config.device_bytes
            has = f"{given} bytes" if given else f"less than {self.granularity} bytes"
            raise ConfigError(
                f"{small} would have {has}, and the granularity is {self.granularity}: raise device_bytes "
                f"(--device-memory), or take fewer devices"
            )
        for name in names:
            # A driver that does not answer does not say what its device has: it is planned with as one of the others.
            device = open_device(name, self.granularity, usable.get(name, min(usable.values())))
            device.trim()  # where handles outlive whoever made them, those of a lost catalog are still there
            self.memories[name] = DeviceMemory(device, has_large=self._config.large_pages)
        self._snapshot = Snapshot.create()
        self.write()

    def _names(self) -> list[str]:
        return list(DeviceCount.parse(self._config.devices).names())

    # ---- A model's way in

    def prepare(self, layout: Layout) -> BusSegment:
        """Make the descriptors that a load of `layout` will fill.

        Raises Unavailable at the limit of open files.
        """
        try:
            self.segment = BusSegment(HostShared.create("bus"))
            self.open_layout(layout)
        except OSError as error:
            raise Unavailable(f"no descriptor for the bus: {error.strerror}") from None
        except Unavailable:
            self.discard()
            raise
        return self.segment

    def commit(self, loaded: Loaded) -> None:
        """A load is complete: from now on a restart finds it."""
        self.loaded = loaded
        self.write()

    def discard(self) -> None:
        """End what `prepare` made: a load failed and has released its handles, or all is closed."""
        if self.segment is not None:
            self.segment.close()
            self.segment = None
        close_all(self.doorbells.values())
        self.doorbells.clear()

    # ---- Another layout's way in and out

    def open_layout(self, layout: Layout) -> None:
        """Make the descriptors that `layout` needs beside those that are there, and clear its new slots.

        Raises Unavailable at the limit of open files; nothing stays made then.
        """
        slots = sorted(set(layout.slots) - set(self.doorbells))
        try:
            for slot in slots:
                self.doorbells[slot] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                if self.segment is not None:
                    self.segment.clear(slot)
            for seat in layout.seats:
                self.memories[seat.device].device.prepare()
        except OSError as error:
            self.close_slots(slots)
            raise Unavailable(f"no descriptors for {len(layout.seats)} seats: {error.strerror}") from None

    def close_slots(self, slots: Iterable[int]) -> None:
        """End the doorbells of slots that no layout has any more, and that the catalog does not name."""
        for slot in slots:
            fd = self.doorbells.pop(slot, None)
            if fd is not None:
                self._parking.forget((_doorbell(slot),))
                os.close(fd)

    def ring(self) -> None:
        """Ring every doorbell."""
        for fd in self.doorbells.values():
            try:
                os.eventfd_write(fd, 1)
            except BlockingIOError:
                pass  # the counter is full: it is ringing already

    # ---- The catalog

    def catalog(self) -> Catalog:
        """What there is now."""
        entries = tuple(memory.entry() for memory in self.memories.values())
        return Catalog(granularity=self.granularity, devices=entries, loaded=self.loaded, transition=self.transition)

    def write(self) -> None:
        """Make what there is now durable: the handles of the catalog are complete, and no others are in it."""
        assert self._snapshot is not None, "there is a snapshot from start on"
        wanted = self._park()
        self._snapshot.write(encode(self.catalog()))
        self._parking.forget(self._parking.names - set(wanted))

    def _park(self) -> dict[str, int]:
        """Let the keeper hold all that the catalog may name, by name, before it does."""
        wanted = {_doorbell(slot): fd for slot, fd in self.doorbells.items()}
        for name, memory in self.memories.items():
            wanted |= {f"device.{name}.{part}": fd for part, fd in memory.device.descriptors().items()}
            if memory.ledger is not None:
                wanted[_ledger(name)] = memory.ledger.fd
        if self.segment is not None:
            wanted[_BUS] = self.segment.shared.fd
        if self._snapshot is not None:
            wanted[CATALOG] = self._snapshot.fd
        self._parking.keep(wanted)
        return wanted

    def check_integrity(self) -> list[str]:
        """Findings about the catalog and the devices; empty when all is well."""
        findings = check_integrity(self.catalog())
        for memory in self.memories.values():
            findings += memory.check_integrity()
        return findings

    def checksum_jobs(self) -> list[tuple[str, Device, int, int]]:
        """(name, device, address, bytes) of each weight record on each device that has not failed."""
        return [
            (f"{name}/{key}", memory.device, memory.address(handle), handle.nbytes)
            for name, memory in self.memories.items()
            if not memory.device.failure
            for key, handle in memory.records.items()
        ]

    def close(self) -> None:
        """Close this process's descriptors and mappings; what the keeper holds lives on. Idempotent."""
        for memory in self.memories.values():
            memory.close()
        self.memories.clear()
        self.discard()
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None
        self.loaded = self.transition = None


def _slots_in_use(loaded: Loaded, transition: Transition | None) -> tuple[int, ...]:
    if transition is None or transition.is_over:
        return loaded.layout.slots
    return slots_of((transition.before, transition.after))


def _ledger(device: str) -> str:
    return f"ledger.{device}"


def _doorbell(slot: int) -> str:
    return f"doorbell.{slot}"
