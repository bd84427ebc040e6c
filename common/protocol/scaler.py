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
    """One device's memory in bytes; `weights + kv + other + free == budget`. `attached`: incarnation of its rank.
    `pages`: real memory behind it, whoever made it. `progress`: what that rank has counted on the bus. `is_waiting`: it
    says there that it waits for this device, in a call in which it counts nothing. `total`: what the device has, as its
    driver says; 0 where its memory is the machine's."""

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


class MemoryFacts(msgspec.Struct, frozen=True):
    """What a planner must know of the devices' memory, in bytes. `footprint`: of weights and KV of one device at the
    load: what experts leave becomes KV, up to it. `ledger`, `mailbox` (0: none): of one rank. `kv_handles_min`: KV
    handles that one sequence of full length needs; `kv_handles_load`: those that a device had at the load."""

    granularity: int
    kv: KvGeometry
    footprint: int
    ledger: int
    kv_handles_min: int
    kv_handles_load: int
    mailbox: int = 0


class TransitionStatus(msgspec.Struct, frozen=True):
    """The HMM's part of a transition, the latest one also when it is over.

    `phase`: `vacating` (ranks clear KV that has to go) · `copying` · `staged` (all is there; ranks map it) ·
    `committed` (in force; ranks are about to flip) · `flipped` · `releasing` · `released` · `aborting` · `aborted` ·
    `failed` (could not be staged: `error`; to be aborted). `prepared`: slots whose rank has mapped all that was sent to
    it. `bytes_done` of `bytes_total` are copied. `peak_pages`: the most real bytes, by device, since it began.
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
    """`phase`: empty (nothing loaded), loading, ready, failed. Bytes count what was read from the checkpoint.
    `num_fenced`: commands that this HMM refused because their sender's fencing epoch was superseded."""

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
    """A rank has attached and can step. Costs in milliseconds."""

    rank: RankId
    slot: int
    incarnation: str
    attach_ms: float
    build_ms: float


class RankExited(Message, frozen=True):
    """A rank's process ended, wanted or not. `exit_code` is negative for a signal, None where nobody knows it."""

    rank: RankId
    slot: int
    incarnation: str
    exit_code: int | None
    reason: str


class PoolRank(msgspec.Struct, frozen=True):
    """A living rank of a pool. `pid`: in the pool's pid namespace, 0 while it is started from nothing. `attach_ms`:
    what mapping its memory took; 0 until it is ready. `is_asleep`: just now it neither ran nor waited for a processor:
    it was stopped, or slept in a call."""

    rank: RankId
    slot: int
    device: str
    incarnation: str
    pid: int
    ready: bool
    attach_ms: float = 0.0
    is_asleep: bool = False


class PoolStatus(Message, frozen=True):
    """`standby`: processes that wait for a seat. `is_cold`: none are kept, ranks are started from nothing."""

    standby: int
    ranks: tuple[PoolRank, ...]
    is_cold: bool = False

    @property
    def num_startable(self) -> int:
        """Ranks that can be started now."""
        return RANKS_MAX if self.is_cold else self.standby


class RankLoad(Message, frozen=True):
    """Answer to rank.GetRankLoad. `moving`: sequences on their way to another rank; `handed_over` and `taken_over`:
    counts since the rank began; `command`: the RankCommand in force, None before the first. `routers`: that watch it
    now. `epoch`: of the layout that it computes by, 0 before its first step."""

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
