"""What the scaler can be told: answers and events of the HMM and the pools."""

from __future__ import annotations

from typing import Literal

import msgspec

from common.layout import Layout, RankId
from common.protocol.codec import Codec, Message
from common.protocol.replies import Ack, Refused


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device's memory in bytes; `weights + kv + other + free == budget`. `attached`: incarnation of its rank."""

    device: str
    budget: int
    weights: int
    kv: int
    other: int
    free: int
    num_experts: int
    kv_blocks: int
    attached: str | None


class HmmStatus(Message, frozen=True):
    """`phase`: empty (nothing loaded), loading, ready, failed. Bytes count what was read from the checkpoint."""

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


class RankStarted(Message, frozen=True):
    """A standby took the seat; `pid` is in the pool's pid namespace."""

    rank: RankId
    incarnation: str
    pid: int


class RankReady(Message, frozen=True):
    """A rank has attached and can step. Costs in milliseconds."""

    rank: RankId
    slot: int
    incarnation: str
    attach_ms: float
    build_ms: float


class RankExited(Message, frozen=True):
    """A rank's process ended, wanted or not. `exit_code` is negative for a signal."""

    rank: RankId
    slot: int
    incarnation: str
    exit_code: int
    reason: str


class PoolRank(msgspec.Struct, frozen=True):
    """A living rank of a pool. `attach_ms`: what mapping its memory took; 0 until it is ready."""

    rank: RankId
    slot: int
    device: str
    incarnation: str
    pid: int
    ready: bool
    attach_ms: float = 0.0


class PoolStatus(Message, frozen=True):
    """`standby`: processes that wait for a seat."""

    standby: int
    ranks: tuple[PoolRank, ...]


class Integrity(Message, frozen=True):
    """Findings of check_integrity(); empty when all is well. `checksums`: record name -> hash, where asked for."""

    findings: tuple[str, ...]
    checksums: dict[str, int]


ToScaler = HmmStatus | RankStarted | RankReady | RankExited | PoolStatus | Integrity | Ack | Refused
CODEC: Codec[ToScaler] = Codec(ToScaler)
