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


class RecordExtent(Message, frozen=True, tag=False):
    """A weight record's handle."""

    key: RecordKey
    extent: Extent


class AttachReply(Message, frozen=True):
    """HMM -> rank: everything that the seat maps. Weights' descriptors are read-only.

    `doorbells[i]` is the fd index of the eventfd of `slots[i]`: a rank sleeps on its own and rings the others'.
    """

    spec: ModelSpec
    layout_epoch: int
    granularity: int
    records: tuple[RecordExtent, ...]
    kv: tuple[Extent, ...]
    kv_geometry: KvGeometry
    kv_bytes_reserved: int
    bus: Extent
    ledger: Extent
    slots: tuple[int, ...]
    doorbells: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]


TO_HMM: Codec[Attach] = Codec(Attach)
TO_RANK: Codec[AttachReply | Refused] = Codec(AttachReply | Refused)
