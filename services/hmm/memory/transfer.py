"""Memory on its way in or out: handles that are claimed, made by threads, and those that are given back.

None of them is in the catalog: `settle` puts in what is complete, and only what the catalog has lost may be given back.
Threads make pages and fill them in small pieces. A thread touches the handles that it was given, and no catalog.
Between two pieces it may be stopped, and it sleeps as the limit asks, so that serving keeps its throughput.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.devices.base import Device, Handle
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.families import record
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.layout import Layout
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.errors import DeviceError, ElasticMoEError, Unavailable
from elasticmoe.common.seat_sizes import LedgerSizes, size_mailbox
from elasticmoe.services.hmm.background import Background, Then
from elasticmoe.services.hmm.loading.reader import Reader
from elasticmoe.services.hmm.memory.catalog import Loaded, Transition
from elasticmoe.services.hmm.memory.claims import ClaimedPart, HandlePart, LedgerPart, kv_parts, stage_parts
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.ledgers import claim_ledger, format_pages
from elasticmoe.services.hmm.memory.memory import DeviceMemory, check_exchange
from elasticmoe.services.hmm.memory.new_pages import NewPages

CLAIMS_MAX: Final = 128  # in one call: where a driver takes 0.13 ms for each, 16 ms, and 10,000 would be 1.3 s
_THREADS: Final = 2  # while there is no limit; a joining replica waits for one device only
_PIECE_BYTES: Final = 4 << 20
_PIECE_BYTES_MIN: Final = 64 << 10  # a multiple of every page size
_PIECES_PER_S: Final = 20  # at the least, where the limit allows pieces of the smallest size


class Peaks:
    """The most real bytes of each device since `begin`. Any thread may sample."""

    def __init__(self, by_device: Mapping[str, int] | None = None) -> None:
        self.by_device: dict[str, int] = dict(by_device or {})
        self._lock = threading.Lock()

    def sample(self, device: Device) -> None:
        """Look at the device now: after pages were made, and before some are given back."""
        pages = device.pages
        with self._lock:
            self.by_device[device.name] = max(self.by_device.get(device.name, 0), pages)


class Transfer:
    """Parts to be made. `run` is called by as many threads as `num_threads` says, `stop` by anybody."""

    def __init__(
        self,
        parts: Sequence[ClaimedPart],
        bytes_per_s_max: int,
        peaks: Peaks,
        spec: ModelSpec,
        model_path: str,
    ) -> None:
        self.bytes_done = 0
        self.bytes_total = sum(part.nbytes for part in parts if isinstance(part, HandlePart) and part.copy is not None)
        by_device: dict[str, list[ClaimedPart]] = {}
        for part in parts:
            by_device.setdefault(part.memory.device.name, []).append(part)
        self._shares = deque(share for some in by_device.values() for share in _shares(some))
        self.num_threads = max(1, min(1 if bytes_per_s_max else _THREADS, len(self._shares)))
        self._pages = NewPages((part.memory, part.handle) for part in parts if isinstance(part, HandlePart))
        self._peaks = peaks
        self._spec = spec
        self._model_path = model_path
        self._limit = bytes_per_s_max
        self._due = time.monotonic()
        pieces = bytes_per_s_max // _PIECES_PER_S // _PIECE_BYTES_MIN * _PIECE_BYTES_MIN
        self._piece_bytes = min(_PIECE_BYTES, max(_PIECE_BYTES_MIN, pieces)) if bytes_per_s_max else _PIECE_BYTES
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of bytes_done

    def stop(self) -> None:
        """Let `run` end soon, with Unavailable `aborted`."""
        self._stop.set()

    def run(self) -> None:
        """Make shares until none are left. Blocks. Raises DoesNotFit, CheckpointError, Unavailable."""
        try:
            while True:
                try:
                    parts = self._shares.popleft()
                except IndexError:
                    return
                self._make(parts)
        except BaseException:
            self.stop()  # the others' work would be in vain
            raise

    def _make(self, parts: Sequence[ClaimedPart]) -> None:
        for part in parts:
            if isinstance(part, HandlePart):
                self._fill(part)
                continue
            for done, nbytes in self._pieces(part):
                part.shared.populate(done, nbytes)
                self._pause(nbytes)
            format_pages(part.shared, part.sizes)
        self._read([part for part in parts if isinstance(part, HandlePart) and part.is_read])

    def _pieces(self, part: ClaimedPart) -> Iterable[tuple[int, int]]:
        """(offset, bytes) of each."""
        step = self._piece_bytes
        return ((done, min(step, part.nbytes - done)) for done in range(0, part.nbytes, step))

    def _fill(self, part: HandlePart) -> None:
        device, source = part.memory.device, part.source
        address = source[0].address(source[1]) if source is not None else 0
        for done, nbytes in self._pieces(part):
            self._pages.make(part.handle, done, nbytes)
            if source is not None:
                device.write(part.handle, done, address + done, nbytes)
                failpoint("hmm.copy")
                self._count(nbytes)
            else:
                device.populate(part.handle, done, nbytes)
            self._peaks.sample(device)
            self._pause(nbytes)

    def _read(self, parts: Sequence[HandlePart]) -> None:
        if not parts:
            return
        spec = self._spec
        with Checkpoint(Path(self._model_path), spec) as checkpoint:
            reader = Reader(checkpoint, self._pause, chunk_bytes=self._piece_bytes)
            for part in parts:
                assert part.copy is not None, "only records are read"
                reader.add(record(spec, part.copy.key), part.memory.device, part.memory.address(part.handle))
            reader.read()
        self._count(sum(part.handle.nbytes for part in parts))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_done += nbytes

    def _pause(self, nbytes: int) -> None:
        """Sleep as the limit asks after `nbytes`; what was not used of it before is not saved up."""
        now = time.monotonic()
        if self._limit:  # then there is one thread
            self._due = max(self._due, now) + nbytes / self._limit
        if self._stop.wait(max(0.0, self._due - now)) if self._limit else self._stop.is_set():
            raise Unavailable("the transition was given up", code="aborted")


def _shares(parts: Sequence[ClaimedPart]) -> list[list[ClaimedPart]]:
    """One device's parts in as many shares of about the same size as there are threads; what is read from the
    checkpoint stays together, because files are read from their beginning to their end."""
    read: list[ClaimedPart] = [part for part in parts if isinstance(part, HandlePart) and part.is_read]
    shares: list[list[ClaimedPart]] = [[] for _ in range(_THREADS)]
    sizes = [0] * _THREADS
    made = [part for part in parts if isinstance(part, LedgerPart) or not part.is_read]
    for part in sorted(made, key=lambda part: -part.nbytes):
        least = sizes.index(min(sizes))
        shares[least].append(part)
        sizes[least] += part.nbytes
    return [share for share in (read, *shares) if share]


class Supply:
    """One transfer at a time, and any number of releases. Belongs to the service's loop.

    `ledger`: what claims memory for one; `transfer`: what makes that which is claimed.
    """

    def __init__(
        self,
        holdings: Holdings,
        background: Background,
        *,
        ledger: Callable[[str, LedgerSizes], HostShared] = claim_ledger,
        transfer: Callable[[Sequence[ClaimedPart], int, Peaks, ModelSpec, str], Transfer] = Transfer,
    ) -> None:
        self._holdings = holdings
        self._background = background
        self._claim_ledger = ledger
        self._make_transfer = transfer
        self._transfer: Transfer | None = None  # at work
        self._num_running = 0  # of its threads
        self._failure: ElasticMoEError | None = None
        self._claims: list[ClaimedPart] = []  # not settled yet
        self._claiming: Iterator[ClaimedPart] | None = None  # those that are still to be claimed
        self._num_releasing = 0
        self.peaks = Peaks()
        self.bytes_done = 0  # of the latest transfer that is over

    @property
    def is_transferring(self) -> bool:
        """Whether threads make memory."""
        return self._transfer is not None

    @property
    def is_releasing(self) -> bool:
        """Whether threads give memory back."""
        return self._num_releasing > 0

    @property
    def bytes_copied(self) -> int:
        """Of the latest transfer, so far."""
        return self._transfer.bytes_done if self._transfer is not None else self.bytes_done

    def begin(self, peaks: Mapping[str, int] | None = None) -> None:
        """Watch real memory from now on, or go on from a predecessor's `peaks`."""
        self.peaks = Peaks(peaks)
        for memory in self._holdings.memories.values():
            self.peaks.sample(memory.device)

    # ---- In

    def lacking_access(self, after: Layout, loaded: Loaded) -> ElasticMoEError | None:
        """Why no ranks can compute on the devices that join in `after`, or those of `after` cannot exchange tokens;
        None where they can. Devices that leave, as they do when they are lost, are not asked."""
        joining, staying = list[Device](), list[Device]()
        for seat in after.seats:
            found = joining if loaded.layout.seat_on(seat.device) is None else staying
            found.append(self._holdings.memories[seat.device].device)
        try:
            for device in joining:
                device.check_usable()
            if size_mailbox(loaded.load, loaded.spec, self._holdings.granularity):
                check_exchange(joining, staying)
        except DeviceError as error:
            return error
        return None

    @property
    def is_claiming(self) -> bool:
        """Whether something is still to be claimed of what was asked for."""
        return self._claiming is not None

    def claim_stage(self, transition: Transition, loaded: Loaded) -> bool:
        """Claim what `transition` needs beside what is there (claims.py), some in each call; whether it is all.

        Raises DoesNotFit; `drop_claims` takes back what was claimed by then, then and whenever no more is wanted.
        """
        if self._claiming is None:
            failpoint("hmm.claim")
            holdings = self._holdings
            self._claiming = stage_parts(
                transition, loaded, holdings.memories, holdings.granularity, self._claim_ledger
            )
        return self._claim_some(self._claiming)

    def claim_kv(self, counts: Iterable[tuple[DeviceMemory, int]], loaded: Loaded) -> bool:
        """Claim so many more KV handles of each of these memories, as `claim_stage` does."""
        if self._claiming is None:
            self._claiming = chain.from_iterable(
                [kv_parts(memory, self._num_kv(memory), count, loaded) for memory, count in counts]
            )
        return self._claim_some(self._claiming)

    def _num_kv(self, memory: DeviceMemory) -> int:
        claimed = [part.handle for part in self._claims if isinstance(part, HandlePart) and part.memory is memory]
        return len(memory.kv) + sum(handle.space == "kv" for handle in claimed)

    def _claim_some(self, parts: Iterator[ClaimedPart]) -> bool:
        for _ in range(CLAIMS_MAX):
            part = next(parts, None)
            if part is None:
                self._claiming = None
                return True
            self._claims.append(part)
        return False

    def start(self, bytes_per_s_max: int, loaded: Loaded, then: Then) -> None:
        """Let threads make what is claimed; `then` is called in the loop's thread when all have ended."""
        parts, path = tuple(self._claims), loaded.load.model_path
        transfer = self._make_transfer(parts, bytes_per_s_max, self.peaks, loaded.spec, path)
        self._transfer, self._num_running, self._failure = transfer, transfer.num_threads, None

        def over(result: ElasticMoEError | None) -> None:
            if result is not None and (self._failure is None or self._failure.code == "aborted"):
                self._failure = result
            self._num_running -= 1
            if not self._num_running:
                self.bytes_done, self._transfer = transfer.bytes_done, None
                then(self._failure)

        for _ in range(transfer.num_threads):
            self._background.start("transfer", transfer.run, over)

    def stop(self) -> None:
        """Let the transfer's threads end soon, and claim no more."""
        self._claiming = None
        if self._transfer is not None:
            self._transfer.stop()

    def settle(self) -> ElasticMoEError | None:
        """All that was claimed is complete: it belongs to the catalog from now on. Or why it does not: where there is
        no descriptor for a successor's sake, or a device has failed meanwhile, all is still claimed."""
        devices = dict[str, Device]()
        try:
            for part in self._claims:
                if isinstance(part, HandlePart):
                    part.memory.device.settle(part.handle)
                    devices[part.memory.device.name] = part.memory.device
                    if part.handle.space == "mailbox":  # every rank is told of it: a refusal must not come only then
                        part.memory.device.export(part.handle)
            for device in devices.values():
                device.check_usable()
                device.descriptors()  # which makes those that the catalog is about to need
        except (DeviceError, Unavailable) as error:
            return error
        for part in self._claims:
            if isinstance(part, LedgerPart):
                part.memory.ledger = part.shared
                continue
            if part.copy is not None:
                part.memory.records[part.copy.key] = part.handle
            elif part.handle.space == "mailbox":
                part.memory.mailbox = part.handle
            else:
                part.memory.kv.append(part.handle)
        self._claims.clear()
        return None

    # ---- Out

    def drop_claims(self) -> None:
        """Give back what was claimed and is not settled; no thread may be at work on it."""
        gone: list[tuple[DeviceMemory, Handle | HostShared]] = [
            (part.memory, part.handle if isinstance(part, HandlePart) else part.shared) for part in self._claims
        ]
        self._claims.clear()
        self._claiming = None
        if gone:
            self.give_back(gone)

    def give_back(self, gone: Sequence[tuple[DeviceMemory, Handle | HostShared]]) -> None:
        """Release what no catalog names and nobody uses: their pages in a thread, the rest afterwards."""
        by_memory: dict[DeviceMemory, list[Handle | HostShared]] = {}
        for memory, one in gone:
            by_memory.setdefault(memory, []).append(one)

        def over(_: ElasticMoEError | None) -> None:
            for memory, some in by_memory.items():
                memory.let_go(*some)
            self._num_releasing -= 1

        for device in {memory.device.name: memory.device for memory, _ in gone}.values():
            self.peaks.sample(device)
        handles = [(memory.device, one) for memory, one in gone if isinstance(one, Handle)]
        for device, handle in handles:
            device.retire(handle)
        self._num_releasing += 1
        self._background.start("release", lambda: reclaim(handles), over)

    def give_back_leftovers(self) -> None:
        """Try again where the kernel has kept something of what was released. Quick; no load may be at work."""
        for memory in self._holdings.memories.values():
            if memory.device.has_leftovers:
                memory.device.trim()


def reclaim(parts: Sequence[tuple[Device, Handle]]) -> None:
    """Give back the pages of handles that nobody uses any more, in pieces. Blocks; releasing them is quick then."""
    for device, handle in parts:
        for done in range(0, handle.nbytes, _PIECE_BYTES):
            device.reclaim(handle, done, min(_PIECE_BYTES, handle.nbytes - done))
