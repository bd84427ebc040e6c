"""The handle channel: a Unix stream socket between the HMM and each rank, the only way by which memory is shared.

Each message is a 4-byte little-endian length and that many bytes of MessagePack; file descriptors accompany a message's
first byte. The connection stays open as long as the rank lives: its end is how the HMM sees a rank's death.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from elasticmoe.common.layout import ExchangeKind, RankId
from elasticmoe.common.model_spec import KvGeometry, ModelSpec, RecordKey
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.limits import NAME_CHARS_MAX
from elasticmoe.common.protocol.replies import Refused


class Attach(Message, frozen=True):
    """Rank -> HMM: hand me the memory of my seat.

    rank, slot, device: the seat
    incarnation: of the rank's process
    resume: only watch this connection, I already hold the mappings; sent by a living rank to a restarted HMM, or after
        it has ended the connection itself
    importer: the number by which the owner of its device admits this process; 0 where its driver asks for none
    """

    rank: RankId
    slot: Annotated[int, Meta(ge=0, le=63)]
    device: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    incarnation: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    resume: bool = False
    importer: Annotated[int, Meta(ge=0)] = 0


class SharedFd(Message, frozen=True, tag="fd"):
    """A handle is the part from `offset` of what a descriptor names; `fd` is its index among those of the message.
    `key`: as FdToken has it."""

    fd: int
    offset: int
    key: Annotated[int, Meta(ge=0)] = 0


class SharedKey(Message, frozen=True, tag="key"):
    """A handle is known to the driver by a number."""

    key: Annotated[int, Meta(ge=0)]


class SharedHandle(Message, frozen=True, tag=False):
    """A page handle of `nbytes` as the other process needs it. `id`: its name among those of the device, for as long as
    it is there, also after a restart of the HMM."""

    id: int
    nbytes: int
    token: SharedFd | SharedKey


class ShareHandles(Message, frozen=True):
    """HMM -> rank: handles that a SeatMemory is about to name. There are as many of these messages as are needed: each
    has descriptors within a message's limit, and the rank can close those of one message before it takes the next one.
    A rank passes over a handle that it has already; it drops those that the next SeatMemory does not name.
    """

    handles: tuple[SharedHandle, ...]


class Segment(Message, frozen=True, tag=False):
    """Memory of the host that several processes share, whole: `fd` is an index into the descriptors of the message."""

    fd: int
    nbytes: int


class RecordHandle(Message, frozen=True, tag=False):
    """A weight record, and the id of its handle."""

    key: RecordKey
    handle: int


class Routing(Message, frozen=True, tag=False):
    """`owners[layer][expert]`: the slot that computes the expert in the layout of `epoch`."""

    epoch: int
    owners: tuple[tuple[int, ...], ...]


class SharedMailbox(Message, frozen=True, tag=False):
    """The mailbox of the seat in `slot`, on another device or on the rank's own. Its id is one of that device."""

    slot: int
    handle: SharedHandle


class SeatMemory(Message, frozen=True):
    """HMM -> rank: all that a rank has mapped from now on, beside bus and ledger. The rank unmaps what is not named
    here and maps what it lacks. Answered by Applied when that is done, perhaps after many steps.

    Handles are named by ids that ShareHandles has told before.

    revision: grows with each that the HMM sends, across its restarts too
    records: the seat's weight records
    kv: handles in order of their blocks; where they are fewer than before, the blocks behind them are vacated first
    routings: by epoch, of every layout that a generation of the bus may name
    slots: of the seats of these layouts, ascending
    doorbells: `doorbells[i]` is the fd index of the eventfd of `slots[i]`; a rank sleeps on its own and rings the
        others'
    mailboxes: of those of `slots` that have one, where the exchange needs any
    replica: slots of the ranks of the seat's replica, by tp index; the same for as long as the seat is there
    """

    revision: int
    records: tuple[RecordHandle, ...]
    kv: tuple[int, ...]
    routings: tuple[Routing, ...]
    slots: tuple[int, ...]
    doorbells: tuple[int, ...]
    mailboxes: tuple[SharedMailbox, ...] = ()
    replica: tuple[int, ...] = ()


class AttachReply(Message, frozen=True):
    """HMM -> rank: yes; what it is handed follows, as ShareHandles and SeatMemory. Weights are shared read-only.

    A rank that attached anew has applied the first SeatMemory when it says RankReady; it answers Applied too.

    memory_id: names this memory's creation; a rank that resumes leaves where it is another one than it has mapped
    spec: of the model that is loaded
    fingerprint: of `spec`, made by the HMM that loaded it; a rank that would read records or KV in another way maps
        nothing
    granularity: of the device's memory, bytes
    kv_geometry: how KV blocks lie in KV handles
    kv_bytes_reserved: address space for all KV that the device could ever hold, a multiple of a KV handle's bytes
    bus, ledger: memory of the host: all ranks share the one, the seat has the other
    exchange: how its ranks exchange tokens
    identity: what the HMM's driver calls the hardware of the seat's device; a rank whose driver calls it otherwise maps
        nothing. Empty where the driver tells none
    """

    memory_id: str
    spec: ModelSpec
    fingerprint: str
    granularity: int
    kv_geometry: KvGeometry
    kv_bytes_reserved: int
    bus: Segment
    ledger: Segment
    exchange: ExchangeKind = "shm"
    identity: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""


class Applied(Message, frozen=True):
    """Rank -> HMM: I have mapped exactly what the SeatMemory of this revision says."""

    revision: int


FromRank = Attach | Applied
FromHmm = AttachReply | ShareHandles | SeatMemory | Refused
FROM_RANK: Codec[FromRank] = Codec(FromRank)
TO_RANK: Codec[FromHmm] = Codec(FromHmm)
