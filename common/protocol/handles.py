"""The handle channel: a Unix stream socket between the HMM and each rank, the only way by which memory is shared.

Each message is a 4-byte little-endian length and that many bytes of MessagePack; file descriptors accompany the first
byte of an AttachReply. The connection stays open as long as the rank lives: its end is how the HMM sees a rank's death.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from common.layout import RankId
from common.model_spec import KvGeometry, ModelSpec, RecordKey
from common.protocol.codec import Codec, Message
from common.protocol.limits import NAME_CHARS_MAX
from common.protocol.replies import Refused


class Attach(Message, frozen=True):
    """Rank -> HMM: hand me the memory of my seat. `resume`: only watch this connection; I already hold the mappings
    (sent by a living rank to a restarted HMM)."""

    rank: RankId
    slot: Annotated[int, Meta(ge=0, le=63)]
    device: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    incarnation: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    resume: bool = False


class Extent(Message, frozen=True, tag=False):
    """One page handle as the other process needs it: `fd` is an index into the descriptors of the message."""

    fd: int
    offset: int
    nbytes: int


class Segment(Message, frozen=True, tag=False):
    """Memory of the host that several processes share, whole: `fd` is an index into the descriptors of the message."""

    fd: int
    nbytes: int


class RecordExtent(Message, frozen=True, tag=False):
    """A weight record's handle."""

    key: RecordKey
    extent: Extent


class Routing(Message, frozen=True, tag=False):
    """`owners[layer][expert]`: the slot that computes the expert in the layout of `epoch`."""

    epoch: int
    owners: tuple[tuple[int, ...], ...]


class SeatMemory(Message, frozen=True):
    """HMM -> rank: all that a rank has mapped from now on, beside bus and ledger. Whoever has more unmaps it, whoever
    has less maps it. Answered by Applied when that is done, perhaps after many steps.

    `revision` grows with each that the HMM sends. `kv`: handles in order of their blocks; fewer than before: the blocks
    behind them are vacated first. `routings`: by epoch, of every layout that a generation of the bus may name.
    `doorbells[i]` is the fd index of the eventfd of `slots[i]`: a rank sleeps on its own and rings the others'.
    """

    revision: int
    records: tuple[RecordExtent, ...]
    kv: tuple[Extent, ...]
    routings: tuple[Routing, ...]
    slots: tuple[int, ...]
    doorbells: tuple[int, ...]


class AttachReply(Message, frozen=True):
    """HMM -> rank: the seat's memory. Weights' descriptors are read-only.

    `memory_id` names this memory's creation: a rank that resumes leaves where it is another one than it has mapped.
    A rank that attached anew has applied `seat` when it says RankReady; it answers Applied too.
    """

    memory_id: str
    spec: ModelSpec
    granularity: int
    kv_geometry: KvGeometry
    kv_bytes_reserved: int
    bus: Segment
    ledger: Segment
    seat: SeatMemory


class Applied(Message, frozen=True):
    """Rank -> HMM: I have mapped exactly what the SeatMemory of this revision says."""

    revision: int


ToHmm = Attach | Applied
FromHmm = AttachReply | SeatMemory | Refused
TO_HMM: Codec[ToHmm] = Codec(ToHmm)
TO_RANK: Codec[FromHmm] = Codec(FromHmm)
