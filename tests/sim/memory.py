"""Memory of the HMM: the product's handles of each device over pages that are only counted, real KV, real ledgers.

KV and ledgers outlive every process; handles are restored by a new one. What is in a weight record is not simulated.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from elasticmoe.common.devices.base import Device, Handle, KeyToken, ProcessRules, Space, Token
from elasticmoe.common.devices.rules import DONE, Completion
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.errors import DeviceError, Unavailable
from elasticmoe.native.ledger import Ledger, format_ledger
from elasticmoe.native.ledger import ledger_bytes as native_ledger_bytes
from elasticmoe.services.hmm.memory.catalog import DeviceEntry
from elasticmoe.services.hmm.memory.claims import ClaimedPart, HandlePart, LedgerPart
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.memory.transfer import Peaks, Transfer

PAGE = 4096
BLOCK_SIZE, BLOCKS_PER_HANDLE = 4, 4
GEOMETRY = KvGeometry(BLOCK_SIZE, 4 * BLOCK_SIZE, 4 * BLOCK_SIZE, BLOCKS_PER_HANDLE, PAGE)
MAX_TOKENS, MAX_SEQUENCES, MAX_MODEL_LEN = 16, 4, 48
BLOB_BYTES = 4096
LEDGER_SIZES = (MAX_SEQUENCES, MAX_MODEL_LEN, MAX_MODEL_LEN // BLOCK_SIZE + 4, BLOB_BYTES)


class RealBytes:
    """What one device really has: KV, as tokens, and the rows of a ledger, which is memory of its host."""

    def __init__(self, budget: int) -> None:
        self.buffer = ctypes.create_string_buffer(budget // PAGE * BLOCKS_PER_HANDLE * GEOMETRY.block_bytes)
        self.values = memoryview(self.buffer).cast("B").cast("i")
        self.poison = memoryview(b"\xff" * self.values.nbytes).cast("i")  # what is read where it is lost
        self._row_bytes = native_ledger_bytes(*LEDGER_SIZES)
        self._rows = ctypes.create_string_buffer(self._row_bytes + 64)
        self.format()

    def format(self) -> None:
        """A new ledger."""
        address = (ctypes.addressof(self._rows) + 63) // 64 * 64
        ctypes.memset(address, 0, self._row_bytes)
        format_ledger(address, self._row_bytes, *LEDGER_SIZES)
        self.rows = Ledger(address, self._row_bytes)


class SimLedger(HostShared):
    """Stands for a ledger's descriptor and mapping: its rows are the device's RealBytes. `living`: those of the device
    that were not closed."""

    def __init__(self, nbytes: int, living: set[SimLedger]) -> None:
        super().__init__(0)
        self.nbytes = nbytes
        self._living = living
        living.add(self)

    @property
    def pages(self) -> int:
        """See HostShared."""
        return self.nbytes

    def close(self) -> None:
        """See HostShared."""
        self._living.discard(self)


class SimDevice(Device):
    """A device whose pages are there as soon as they are asked for. `is_lost`: whether the memory at an address is.
    `check_unused` is told of each handle that is about to be given back."""

    token_kind = KeyToken
    granularity_min = PAGE
    kv_handle_bytes_min = PAGE
    range_bytes_max = 1 << 40

    def __init__(self, name: str, budget: int) -> None:
        super().__init__(name, PAGE, budget, rules=ProcessRules())
        self.is_lost: Callable[[int], bool] = lambda _address: False
        self.check_unused: Callable[[Handle], None] = lambda _handle: None
        self._next_base = PAGE

    @classmethod
    def check(cls, index: int) -> None:
        """See Device."""

    def retire(self, handle: Handle) -> None:
        """See Device. Nobody may have it mapped."""
        self.check_unused(handle)
        super().retire(handle)

    def copy_async(self, parts: Sequence[tuple[int, int, int]]) -> Completion:
        """See Device. Done at once; between addresses of RealBytes."""
        for target, source, nbytes in parts:
            if self.is_lost(target) or self.is_lost(source):
                raise DeviceError("a device is gone")
            ctypes.memmove(target, source, nbytes)
        return DONE

    def descriptors(self) -> Mapping[str, int]:
        """See Device."""
        return {}

    def prepare(self) -> None:
        """See Device."""

    def fence(self) -> None:
        """See Device."""

    def _reserve(self, nbytes: int) -> tuple[int, Any]:
        base, self._next_base = self._next_base, self._next_base + nbytes
        return base, None

    def _create(self, nbytes: int, space: Space, place: int) -> tuple[Any, int]:
        return None, 0

    def _claim(self, nbytes: int, space: Space, place: int) -> tuple[Any, int]:
        return None, 0

    def _export(self, handle: Handle) -> Token:
        return KeyToken(self.id_of(handle), handle.nbytes)

    def _present(self, space: Space) -> int:
        return sum(
            one.num_filled if one.state == "claimed" else one.nbytes for one in self._local if one.space == space
        )

    def _nothing(self, *_: Any) -> None:
        """Pages and mappings are not simulated."""

    _restore = _populate = _write = _reclaim = _release = _trim = _nothing
    _unreserve = _map_many = _unmap = _close = _nothing

    def _never(self, *_: Any) -> Any:
        raise NotImplementedError("the HMM imports nothing, and what weights are is not simulated")

    _storage = _copy_async = _read_into = _read_bytes = _write_bytes = _checksum = _never

    def _identity(self, token: Token) -> Hashable:
        return self._never(token)

    def _import(self, token: Token) -> tuple[Any, bool]:
        return self._never(token)


class Memory(DeviceMemory):
    """The product's, of one life of the HMM, with KV where ranks look for it: by its place among the handles."""

    def __init__(self, name: str, budget: int, real: RealBytes) -> None:
        self.sim_device = SimDevice(name, budget)
        super().__init__(self.sim_device)
        self.real = real
        self._ledgers: set[SimLedger] = set()

    @property
    def num_out(self) -> int:
        """Bytes that are in use or about to be, or not given back yet, be they named by the catalog or not."""
        return sum(self.device.used.values()) + sum(ledger.nbytes for ledger in self._ledgers)

    def claim_ledger(self, nbytes: int) -> SimLedger:
        """Memory for one."""
        return SimLedger(nbytes, self._ledgers)

    def address(self, handle: Handle) -> int:
        """See DeviceMemory."""
        assert handle.space == "kv", "only KV is read and written"
        return ctypes.addressof(self.real.buffer) + self.kv.index(handle) * BLOCKS_PER_HANDLE * GEOMETRY.block_bytes

    def fill(self, entry: DeviceEntry) -> None:
        """Take over what the life before has left."""
        self.restore(entry, self.claim_ledger(entry.ledger_bytes) if entry.ledger_bytes else None)


class SimTransfer(Transfer):
    """All parts at once, at the end of the time that its thread takes, at most `longest_s`; it may fail.
    `is_gone(device)`: whether that device's memory is lost."""

    num_threads = 1

    def __init__(
        self,
        parts: Sequence[ClaimedPart],
        rate: int,
        peaks: Peaks,
        rng: random.Random,
        failure_rate: float,
        is_gone: Callable[[str], bool],
    ) -> None:
        self._parts = parts
        self._peaks = peaks
        self.longest_s = 1.5 if rate else 0.3
        self._is_gone = is_gone
        self._fails = rng.random() < failure_rate
        self._is_stopped = False
        self.bytes_done = self.bytes_total = 0

    def stop(self) -> None:
        """See Transfer."""
        self._is_stopped = True

    def run(self) -> None:
        """See Transfer."""
        if self._is_stopped:
            raise Unavailable("the transition was given up", code="aborted")
        devices = {part.memory.device.name for part in self._parts}
        devices |= {part.source[0].device.name for part in self._parts if isinstance(part, HandlePart) and part.source}
        if any(map(self._is_gone, devices)):
            raise Unavailable("a device is gone", code="device_error")
        if self._fails:
            raise Unavailable("the disk is full", code="storage_full")
        for part in self._parts:
            if isinstance(part, HandlePart) and part.source is not None:
                source = part.source[1]
                is_there = source.is_live and source.state == "settled"
                assert is_there, f"{part.copy} is copied from what is given back"
            if isinstance(part, LedgerPart):
                assert isinstance(part.memory, Memory), "the simulation's"
                part.memory.real.format()
            else:
                part.memory.device.populate(part.handle, 0, part.nbytes)
            self._peaks.sample(part.memory.device)
