"""What the HMM can be told: control messages on its ZeroMQ socket. (Handles travel on another socket: handles.py.)"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from elasticmoe.common.layout import ExchangeKind, Layout
from elasticmoe.common.model_spec import Dtype, RecordKey
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.common.protocol.limits import BLOCKS_PER_COPY_MAX, NAME_CHARS_MAX

OpId = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
Slot = Annotated[int, Meta(ge=0, le=63)]
Incarnation = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]


class LoadModel(Message, frozen=True):
    """Create all page handles of `layout` and fill them from the checkpoint; answered at once by Ack or Refused, then
    watched with GetHmmStatus. Idempotent for the same `op_id`.

    op_id: name of the load
    model_path: folder of the checkpoint
    dtype: of weights and KV
    layout: which record is to lie on which device
    block_size: tokens of a KV block
    kv_bytes_max: bytes of KV on each device at the most; the device's budget may allow less
    max_tokens: most tokens of one rank in one step
    max_sequences: ledger rows of one rank
    max_model_len: tokens of the longest sequence, prompt and output together
    exchange: how ranks exchange tokens, for as long as they live; it decides which memory is made for that
    """

    op_id: OpId
    model_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    dtype: Dtype
    layout: Layout
    block_size: Annotated[int, Meta(ge=1, le=1024)]
    kv_bytes_max: Annotated[int, Meta(ge=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=65_536)]
    max_sequences: Annotated[int, Meta(ge=1, le=65_536)]
    max_model_len: Annotated[int, Meta(ge=2, le=1_048_576)]
    exchange: ExchangeKind = "shm"


class GetHmmStatus(Message, frozen=True):
    """Answered by scaler.HmmStatus."""


class SetMembership(Message, frozen=True):
    """Publish on the bus which slots take part from now on. `running=False` parks the ranks. Answered by Ack."""

    slots: tuple[Slot, ...]
    running: bool


class CheckIntegrity(Message, frozen=True):
    """Verify the catalog against the devices: free + owned = total, every expert has a home, no owner is dead.
    `checksums`: also hash every weight record. Answered by scaler.Integrity."""

    checksums: bool = False


class RecordCopy(msgspec.Struct, frozen=True, array_like=True):
    """One weight record that has to come to the device `target`, from the device `source` that holds it; an empty
    `source` stands for the checkpoint on disk, for a tensor that no device holds."""

    key: RecordKey
    source: str
    target: str


class StageLayout(Message, frozen=True):
    """Make everything that `layout` needs beside what the layout in force uses: PREPARE. Answered at once by Ack or
    Refused, then watched with GetHmmStatus (`HmmStatus.transition`). Idempotent for the same `id`.

    id: operation, leg and attempt
    layout: the new one; `layout.epoch` is one above the epoch in force
    copies: exactly the records that devices of `layout` lack, each named once for each device
    kv_handles: KV handles by device of both layouts, from now until the release; a device that is in use gets no more
        than it has, and where it gets fewer, its rank vacates them first
    kv_handles_after: KV handles by device of `layout`, from the release on; never fewer than `kv_handles`
    bytes_per_s_max: limit of all copies together, 0 for none
    """

    id: TransitionId
    layout: Layout
    copies: tuple[RecordCopy, ...]
    kv_handles: dict[str, int]
    kv_handles_after: dict[str, int]
    bytes_per_s_max: Annotated[int, Meta(ge=0)] = 0


class CommitLayout(Message, frozen=True):
    """Let the staged layout come into force: the ranks flip to it at a step that they agree on. Refused
    (`not_prepared`) unless each of its slots has a rank that has mapped everything. From here on there is only forward.
    Answered by Ack; idempotent for the same `id`."""

    id: TransitionId


class ReleaseLayout(Message, frozen=True):
    """The ranks have flipped: give back what only the old layout used, and make KV of it. Refused (`not_flipped`)
    before. `gone`: slots whose devices are lost, and in which no rank lives or will: an HMM that has restarted does not
    wait for theirs to resume. Answered by Ack at once, then watched with GetHmmStatus; idempotent."""

    id: TransitionId
    gone: tuple[Slot, ...] = ()


class AbortLayout(Message, frozen=True):
    """Give up a layout that was staged, or could not be, and is not committed: give back all that only it uses, and
    make the KV that was vacated for it again. Refused (`still_attached`) while a rank of a new seat is attached,
    (`committed`) after the commit. `gone`: as of ReleaseLayout. Answered by Ack at once, then watched with
    GetHmmStatus; idempotent."""

    id: TransitionId
    gone: tuple[Slot, ...] = ()


class CopyBlocks(Message, frozen=True):
    """Rank -> HMM: copy KV blocks of my device (`source`) to blocks that another rank keeps for me (`target`).

    Answered by Ack when the copy is complete, or Refused: `stale_incarnation` where one of the two ranks is not the one
    attached to its slot, `stale_copy` where `number` or `until` forbids the copy. Not fenced by an epoch: the
    incarnations fence it. Between replicas of several ranks their first ones are named, and the others' blocks of the
    same numbers are copied too. Copies from one rank to another are done one after the other.

    source_slot, source_incarnation: the rank that asks
    target_slot, target_incarnation: the rank that keeps the blocks
    number: of a rank's copies, from 1 on; a copy whose number has come before is not done again: the target may write
        to these blocks by then
    until: seconds of the host's monotonic clock after which the rank waits no more and the target may give the blocks
        to others: nothing is copied then
    pairs: (source block, target block)
    """

    source_slot: Slot
    source_incarnation: Incarnation
    target_slot: Slot
    target_incarnation: Incarnation
    number: Annotated[int, Meta(ge=1)]
    until: Annotated[float, Meta(ge=0)]
    pairs: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]], ...], Meta(max_length=BLOCKS_PER_COPY_MAX)
    ]


ToHmm = (
    LoadModel
    | GetHmmStatus
    | SetMembership
    | CheckIntegrity
    | StageLayout
    | CommitLayout
    | ReleaseLayout
    | AbortLayout
    | CopyBlocks
)
CODEC: Codec[ToHmm] = Codec(ToHmm)
