"""What is claimed for a transition: handles and ledgers whose memory is still to be made (transfer.py).

They are claimed one by one, as they are asked for, because a driver takes its time for each: whoever claims thousands
can do something else in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from elasticmoe.common.capacity import sizes_of
from elasticmoe.common.devices.base import Handle
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.protocol.hmm import RecordCopy
from elasticmoe.common.seat_sizes import LedgerSizes, size_ledger, size_mailbox
from elasticmoe.services.hmm.memory.catalog import Loaded, Transition
from elasticmoe.services.hmm.memory.memory import DeviceMemory


class HandlePart(NamedTuple):
    """A claimed handle of `memory` to be made: KV or a mailbox, which are zeros, or the record of `copy`, which comes
    from the handle `source` of the device that the copy names, or from the checkpoint where it names none."""

    memory: DeviceMemory
    handle: Handle
    copy: RecordCopy | None = None
    source: tuple[DeviceMemory, Handle] | None = None

    @property
    def nbytes(self) -> int:
        """Of the handle."""
        return self.handle.nbytes

    @property
    def is_read(self) -> bool:
        """Whether it comes from the checkpoint."""
        return self.copy is not None and self.source is None


class LedgerPart(NamedTuple):
    """An empty ledger to be made in `shared`, which has its size, for the rank on the device of `memory`."""

    memory: DeviceMemory
    shared: HostShared
    sizes: LedgerSizes

    @property
    def nbytes(self) -> int:
        """Of the ledger."""
        return self.sizes.nbytes


ClaimedPart = HandlePart | LedgerPart


def stage_parts(
    transition: Transition,
    loaded: Loaded,
    memories: Mapping[str, DeviceMemory],
    granularity: int,
    claim_ledger: Callable[[str, LedgerSizes], HostShared],
) -> Iterator[ClaimedPart]:
    """Claim what `transition` needs beside what is there: ledger, mailbox and KV of new seats, and the records to be
    copied. Raises DoesNotFit, DeviceError."""
    ledger = size_ledger(loaded.load, granularity)
    mailbox_bytes = size_mailbox(loaded.load, loaded.spec, granularity)
    for seat in transition.after.seats:
        if transition.before.seat_on(seat.device) is not None:
            continue
        memory = memories[seat.device]
        yield LedgerPart(memory, claim_ledger(seat.device, ledger), ledger)
        if mailbox_bytes:
            yield HandlePart(memory, memory.claim(mailbox_bytes, "mailbox"))
        yield from kv_parts(memory, len(memory.kv), transition.request.kv_handles[seat.device], loaded)
    sizes = sizes_of(loaded.spec, granularity)
    for copy in transition.request.copies:
        memory, holder = memories[copy.target], memories[copy.source] if copy.source else None
        source = (holder, holder.records[copy.key]) if holder is not None else None
        nbytes = sizes.of(copy.key)
        handle = memory.claim(nbytes, "weights", copy.key.range_offset(nbytes))
        yield HandlePart(memory, handle, copy, source)


def kv_parts(memory: DeviceMemory, first: int, count: int, loaded: Loaded) -> Iterator[HandlePart]:
    """Claim `count` more KV handles, of which the first comes behind `first` others. Raises DoesNotFit, DeviceError."""
    nbytes = loaded.kv.handle_bytes
    for number in range(first, first + count):
        yield HandlePart(memory, memory.claim(nbytes, "kv", number * nbytes))
