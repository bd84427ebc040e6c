"""What the scaler can be told: answers and events of the HMM and the pools."""

from __future__ import annotations

from typing import Literal

import msgspec

from elasticmoe.common.layout import Layout, RankId
from elasticmoe.common.model_spec import KvGeometry
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.ids import CommandId, TransitionId
from elasticmoe.common.protocol.limits import RANKS_MAX
from elasticmoe.common.protocol.replies import Ack, Refused


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device's memory in bytes, and its rank, as the HMM has them now. `weights + kv + other + free == budget`.

    device: its name
    budget: bytes that the HMM may use of it
    weights, kv: bytes of its weight records and its KV handles, those on their way in or out included
    other: bytes of its rank's ledger and mailbox
    free: bytes of the budget that are left
    num_experts, kv_blocks: expert records and KV blocks that it holds; 0 until a model is ready
    attached: incarnation of its rank; None where none is attached
    pages: bytes of real memory behind it, whichever process made it
    progress: what that rank has counted on the bus; 0 where none is attached
    is_waiting: that rank says on the bus that it waits for this device, in a call in which it counts nothing
    large_pages: bytes of its weights and KV in large pages, where its backend's own are small; 0 elsewhere. As
        far as they have been looked at since the memory changed last
    total: bytes that the device has, as its driver says; 0 where its memory is the machine's
    failure: why the device cannot be used; empty: it can
    """

    device: str
    budget: int
    weights: int
    kv: int
    other: int
    free: int
    num_experts: int
    kv_blocks: int
    attached: str | None
    pages: int = 0
    progress: int = 0
    is_waiting: bool = False
    total: int = 0
    large_pages: int = 0
    failure: str = ""


class MemoryFacts(msgspec.Struct, frozen=True):
    """What a planner must know of the devices' memory; it holds for every device of the loaded model.

    granularity: bytes; sizes of memory are multiples of it
    kv: how KV blocks lie in KV handles
    footprint: the most bytes of weights and KV of one device at the load; what experts leave becomes KV, up to it
    ledger, mailbox: bytes of one rank's; a mailbox of 0 bytes stands for none
    kv_handles_min: KV handles that one sequence of full length needs
    kv_handles_load: the most KV handles that one device had at the load
    """

    granularity: int
    kv: KvGeometry
    footprint: int
    ledger: int
    kv_handles_min: int
    kv_handles_load: int
    mailbox: int = 0


class TransitionStatus(msgspec.Struct, frozen=True):
    """The HMM's part of a transition, the latest one also when it is over.

    id: operation, leg and attempt
    epoch: of the layout that it leads to
    phase: `vacating` (ranks clear KV that has to go) · `copying` · `staged` (all is there; ranks map it) ·
        `committed` (in force; ranks are about to flip) · `flipped` · `releasing` · `released` · `aborting` ·
        `aborted` · `failed` (could not be staged: `error`; to be aborted)
    prepared: slots whose rank has mapped all that was sent to it
    bytes_done, bytes_total: bytes of its copies, those that are copied and all
    peak_pages: by device, the most bytes of real memory since the transition began
    error: why it could not be staged, or why KV did not grow at its end; None otherwise
    """

    id: TransitionId
    epoch: int
    phase: Literal[
        "vacating",
        "copying",
        "staged",
        "committed",
        "flipped",
        "releasing",
        "released",
        "aborting",
        "aborted",
        "failed",
    ]
    prepared: tuple[int, ...]
    bytes_done: int
    bytes_total: int
    peak_pages: dict[str, int]
    error: Refused | None = None


class HmmStatus(Message, frozen=True):
    """What the HMM tells of itself: its load, its devices, the bus's membership, the latest transition.

    phase: `empty` (nothing is loaded) · `loading` · `ready` · `failed`
    bytes_done, bytes_total: bytes of the checkpoint, those that this process's latest load has read and all
    error: why that load failed; None otherwise
    devices: all of the host
    generation, members, running: of the bus: its generation, the slots that take part, and whether they step
    op_id: of that load, or of a predecessor's that is in memory; None where there is neither
    layout, memory: the layout in force, and what a planner must know of its memory; None until a model is ready
    transition: the latest one, also when it is over; None before the first
    num_fenced: commands that this HMM refused because their sender's fencing epoch was superseded
    """

    phase: Literal["empty", "loading", "ready", "failed"]
    bytes_done: int
    bytes_total: int
    error: Refused | None
    devices: tuple[DeviceStatus, ...]
    generation: int
    members: tuple[int, ...]
    running: bool
    op_id: str | None = None
    layout: Layout | None = None
    memory: MemoryFacts | None = None
    transition: TransitionStatus | None = None
    num_fenced: int = 0


class RankStarted(Message, frozen=True):
    """A standby took the seat."""

    rank: RankId
    incarnation: str


class RankReady(Message, frozen=True):
    """A rank has attached and can step.

    rank, slot: its seat
    incarnation: of its process
    attach_ms: milliseconds until its memory was mapped
    build_ms: milliseconds from then until all that it computes with was there
    computes_by: its kernels and threads, for people
    """

    rank: RankId
    slot: int
    incarnation: str
    attach_ms: float
    build_ms: float
    computes_by: str = ""


class RankExited(Message, frozen=True):
    """A rank's process ended, wanted or not.

    rank, slot: its seat
    incarnation: of the process
    exit_code: negative for a signal; None where it cannot be known any more
    reason: what the rank said of its failure, its code first; else how the process ended
    """

    rank: RankId
    slot: int
    incarnation: str
    exit_code: int | None
    reason: str


class PoolRank(msgspec.Struct, frozen=True):
    """A living rank of a pool.

    rank, slot, device: its seat
    incarnation: of its process
    pid: in the pool's pid namespace; 0 while the process is started from nothing
    ready: it has attached and can step
    attach_ms: milliseconds until its memory was mapped; 0 until it is ready
    is_asleep: just now its main thread neither ran nor waited for a processor: it was stopped, or slept in a call
    computes_by: as it said when it was ready; empty until then
    """

    rank: RankId
    slot: int
    device: str
    incarnation: str
    pid: int
    ready: bool
    attach_ms: float = 0.0
    is_asleep: bool = False
    computes_by: str = ""


class PoolStatus(Message, frozen=True):
    """`standby`: processes that wait for a seat. `is_cold`: none are kept, ranks are started from nothing. `cores`:
    that its ranks may share; 0: it does not say. `threads_max`: that a rank computes with."""

    standby: int
    ranks: tuple[PoolRank, ...]
    is_cold: bool = False
    cores: int = 0
    threads_max: int = 64

    @property
    def num_startable(self) -> int:
        """Ranks that can be started now."""
        return RANKS_MAX if self.is_cold else self.standby


class RankLoad(Message, frozen=True):
    """Answer to rank.GetRankLoad. A follower has no sequences: it tells 0 for all counts but `blocks_total`.

    rank: the one that answers; `incarnation`: of its process
    running, waiting: sequences that are computed, and those that wait for it
    moving: sequences on their way to another rank; until they are handed over they also count as running or waiting
    handed_over, taken_over: sequences since the rank began
    blocks_free, blocks_total: KV blocks
    is_leaving: it hands over all its sequences, those that come later too
    command: id of the RankCommand in force; None before the first
    routers: how many watch it now
    epoch: of the layout that it computes by; 0 before its first step
    """

    rank: RankId
    incarnation: str
    running: int
    waiting: int
    moving: int
    handed_over: int
    taken_over: int
    blocks_free: int
    blocks_total: int
    is_leaving: bool
    command: CommandId | None
    routers: int
    epoch: int


class Integrity(Message, frozen=True):
    """Findings of check_integrity(); empty when all is well. `checksums`: record name -> hash, where asked for."""

    findings: tuple[str, ...]
    checksums: dict[str, int]


ToScaler = HmmStatus | RankStarted | RankReady | RankExited | PoolStatus | RankLoad | Integrity | Ack | Refused
CODEC: Codec[ToScaler] = Codec(ToScaler)
