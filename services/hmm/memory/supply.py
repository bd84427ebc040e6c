"""Memory on its way in or out: handles that are claimed, made by threads, and those that are given back.

None of them is in the catalog: `settle` puts in what is complete, and only what the catalog has lost may be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from elasticmoe.common.capacity import size_ledger
from elasticmoe.common.devices.base import Handle, Space
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory.catalog import Loaded, Transition, record_bytes
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.ledgers import claim_ledger
from elasticmoe.services.hmm.memory.memory import DeviceMemory
from elasticmoe.services.hmm.memory.transfer import LedgerPart, Peaks, Transfer, TransferOp, reclaim

Then = Callable[[ElasticMoEError | None], None]
Parts = dict[str, list[TransferOp | LedgerPart]]


class Supply:
    """One transfer at a time, and any number of releases. Belongs to the service's loop."""

    def __init__(self, holdings: Holdings, background: Background) -> None:
        self._holdings = holdings
        self._background = background
        self._transfer: Transfer | None = None  # at work
        self._num_running = 0  # of its threads
        self._failure: ElasticMoEError | None = None
        self._claims: list[tuple[DeviceMemory, RecordKey | None, Handle | HostShared]] = []
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

    def claim_stage(self, transition: Transition, loaded: Loaded) -> Parts:
        """What `transition` needs beside what is there: ledger and KV of new seats, and the records to be copied.

        Raises DoesNotFit; `drop_claims` takes back what was claimed by then.
        """
        failpoint("hmm.claim")
        memories, request = self._holdings.memories, transition.request
        parts: Parts = {}
        ledger = size_ledger(loaded.load, self._holdings.granularity)
        for seat in transition.after.seats:
            if transition.before.seat_on(seat.device) is not None:
                continue
            memory = memories[seat.device]
            shared = claim_ledger(seat.device, ledger)
            self._claims.append((memory, None, shared))
            parts[seat.device] = [LedgerPart(shared, ledger)]
            parts[seat.device] += self.claim_kv(memory, request.kv_handles[seat.device], loaded)
        sizes = record_bytes(loaded, self._holdings.granularity)
        for copy in request.copies:
            memory = memories[copy.target]
            handle = self._claim(memory, copy.key, sizes[copy.key], "weights")
            source = memories[copy.source] if copy.source else None
            address = source.address(source.records[copy.key]) if source is not None else 0
            key = None if source is not None else copy.key
            part = TransferOp(memory.device, handle, memory.address(handle), address, key)
            parts.setdefault(copy.target, []).append(part)
        return parts

    def claim_kv(self, memory: DeviceMemory, count: int, loaded: Loaded) -> list[TransferOp | LedgerPart]:
        """`count` more KV handles. Raises DoesNotFit."""
        handles = [self._claim(memory, None, loaded.kv.handle_bytes, "kv") for _ in range(count)]
        return [TransferOp(memory.device, handle, memory.address(handle)) for handle in handles]

    def _claim(self, memory: DeviceMemory, key: RecordKey | None, nbytes: int, space: Space) -> Handle:
        handle = memory.claim(nbytes, space)
        self._claims.append((memory, key, handle))
        return handle

    def start(self, parts: Parts, bytes_per_s_max: int, loaded: Loaded, then: Then) -> None:
        """Let threads make `parts`; `then` is called in the loop's thread when all have ended."""
        transfer = Transfer(parts, bytes_per_s_max, self.peaks, loaded.spec, loaded.load.model_path)
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
        """Let the transfer's threads end soon."""
        if self._transfer is not None:
            self._transfer.stop()

    def settle(self) -> None:
        """All that was claimed is complete: it belongs to the catalog from now on."""
        for memory, key, claim in self._claims:
            if isinstance(claim, HostShared):
                memory.ledger = claim
                continue
            memory.device.settle(claim)
            if key is not None:
                memory.records[key] = claim
            else:
                memory.kv.append(claim)
        self._claims.clear()

    # ---- Out

    def drop_claims(self) -> None:
        """Give back what was claimed and is not settled; no thread may be at work on it."""
        gone = [(memory, handle) for memory, _, handle in self._claims]
        self._claims.clear()
        if gone:
            self.give_back(gone)

    def give_back(self, gone: Sequence[tuple[DeviceMemory, Handle | HostShared]]) -> None:
        """Release what no catalog names and nobody uses: their pages in a thread, the rest afterwards."""

        def over(_: ElasticMoEError | None) -> None:
            for memory, one in gone:
                memory.release(one)
            self._num_releasing -= 1

        for device in {memory.device.name: memory.device for memory, _ in gone}.values():
            self.peaks.sample(device)
        handles = [(memory.device, one) for memory, one in gone if isinstance(one, Handle)]
        for device, handle in handles:
            device.retire(handle)
        self._num_releasing += 1
        self._background.start("release", lambda: reclaim(handles), over)
