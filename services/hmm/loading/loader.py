"""Loading: from a checkpoint to final weights in page handles, ready to be mapped.

Each tensor is read from disk once (reader.py), into the record's handle on its first device. Records that live on
several devices are then copied between them.
Nothing is created before the whole checkpoint and the sizes are verified; on any failure everything is given back.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from elasticmoe.common.capacity import LoadSizes, Sizes, size_load, sizes_of
from elasticmoe.common.checkpoint import Checkpoint
from elasticmoe.common.devices.base import Handle
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.families import load_spec
from elasticmoe.common.families.fingerprint import fingerprint
from elasticmoe.common.model_spec import RecordKey, RecordSpec
from elasticmoe.common.protocol.errors import CheckpointError, Unavailable
from elasticmoe.common.protocol.hmm import LoadModel
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.hmm.loading.read_ahead import read_ahead
from elasticmoe.services.hmm.loading.reader import Reader
from elasticmoe.services.hmm.memory.catalog import Loaded
from elasticmoe.services.hmm.memory.ledgers import make_ledger
from elasticmoe.services.hmm.memory.memory import BusSegment, DeviceMemory, check_exchange
from elasticmoe.services.hmm.memory.new_pages import make_zeros

log = get_logger("hmm")


class ModelLoad:
    """One load, run once, by a thread of its own. `bytes_done` and `bytes_total` count tensor bytes of the checkpoint
    and may be read by other threads; `abort` may be called by them."""

    def __init__(
        self, request: LoadModel, memories: Mapping[str, DeviceMemory], segment: BusSegment, granularity: int
    ) -> None:
        self.request = request
        self.bytes_done = 0
        self.bytes_total = 0
        self.bytes_read: dict[str, int] = {}  # by file; set at the end
        self._memories = memories
        self._segment = segment
        self._granularity = granularity
        self._abort = threading.Event()

    def abort(self) -> None:
        """Let `run` end soon with Unavailable."""
        self._abort.set()

    def _check_abort(self) -> None:
        if self._abort.is_set():
            raise Unavailable("the load was aborted", code="aborted")

    def run(self) -> Loaded:
        """Load. Blocks until all memory is filled. Raises CheckpointError, DeviceError, DoesNotFit, InvalidRequest,
        Unavailable."""
        try:
            return self._run()
        except BaseException:
            for memory in self._memories.values():
                memory.clear()
            raise

    def _run(self) -> Loaded:
        load, granularity = self.request, self._granularity
        directory = _existing(load.model_path)
        spec = load_spec(directory, load.dtype, load.layout.tp)
        budgets = {name: memory.device.budget for name, memory in self._memories.items()}
        sizes = size_load(load, spec, budgets, granularity)
        with Checkpoint(directory, spec) as checkpoint:
            if remarks := checkpoint.remarks():
                log.warning("checkpoint: " + "; ".join(remarks))
            failpoint("hmm.load")
            with read_ahead(checkpoint.files):
                self._create(sizes, sizes_of(spec, granularity))
            self._read(checkpoint, sizes.records)
            self.bytes_read = checkpoint.bytes_read
        self._replicate(sizes.records)
        for name in sizes.devices:  # where one has failed, or no descriptor is left for a successor, so does the load
            self._memories[name].device.check_usable()
            self._memories[name].device.descriptors()
        self._segment.format(sizes.bus)
        memory_id, bus_bytes = uuid.uuid4().hex, sizes.bus.nbytes
        return Loaded(
            load,
            spec,
            sizes.kv,
            bus_bytes,
            load.layout,
            memory_id,
            sizes.footprint,
            sizes.kv_handles,
            fingerprint(spec),
        )

    def _create(self, sizes: LoadSizes, records: Sizes) -> None:
        check_exchange([self._memories[name].device for name, size in sizes.devices.items() if size.mailbox_bytes])
        claimed: list[tuple[DeviceMemory, Handle]] = []
        for name, size in sizes.devices.items():
            memory = self._memories[name]
            memory.ledger = make_ledger(name, sizes.ledger)
            if size.mailbox_bytes:
                memory.create_mailbox(size.mailbox_bytes)
            for key in size.keys:
                self._check_abort()
                claimed.append((memory, memory.claim_record(key, records.of(key))))
            for _ in range(size.num_kv_handles):
                self._check_abort()
                claimed.append((memory, memory.claim_kv(sizes.kv.handle_bytes)))
        make_zeros(claimed, self._check_abort)

    def _holders(self, key: RecordKey) -> list[DeviceMemory]:
        seats = sorted(self.request.layout.seats, key=lambda seat: seat.slot)
        memories = [self._memories[seat.device] for seat in seats]
        return [memory for memory in memories if key in memory.records]

    def _progress(self, nbytes: int) -> None:
        self.bytes_done += nbytes
        if not nbytes:
            self._check_abort()

    def _read(self, checkpoint: Checkpoint, specs: Sequence[RecordSpec]) -> None:
        reader = Reader(checkpoint, self._progress)
        for record in specs:
            memory = self._holders(record.key)[0]
            reader.add(record, memory.device, memory.address(memory.records[record.key]))
        self.bytes_total = reader.nbytes
        reader.read()

    def _replicate(self, specs: Sequence[RecordSpec]) -> None:
        for record in specs:
            first, *others = self._holders(record.key)
            source = first.records[record.key]
            for other in others:
                self._check_abort()
                target = other.records[record.key]
                other.device.copy(other.address(target), first.address(source), source.nbytes)


def _existing(path: str) -> Path:
    directory = Path(path)
    try:
        exists = directory.is_dir()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be entered
        exists = False
    if not exists:
        raise CheckpointError(f"checkpoint {directory.name!r:.200} is not a directory that can be read")
    return directory
