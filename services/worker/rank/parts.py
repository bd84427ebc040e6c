"""What a rank is made of: interfaces of what has more than one kind, and what all ranks have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from elasticmoe.common.clock import Clock
from elasticmoe.common.endpoints import ServerEnd, Transport
from elasticmoe.common.fence import Fence
from elasticmoe.common.model_spec import ModelSpec
from elasticmoe.common.protocol.handles import Routing, SeatMemory, ShareHandles
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.rank import ToRank
from elasticmoe.native.ledger import Ledger
from elasticmoe.services.worker.exchange.barrier import StepBarrier
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.hmm.link import HmmLink


class Mapped(Protocol):
    """A seat's memory in this process, and how it follows what the HMM says: memory.py."""

    @property
    def spec(self) -> ModelSpec:
        """The model whose weights are mapped."""

    @property
    def ledger(self) -> Ledger:
        """The seat's rows."""

    @property
    def routings(self) -> Mapping[int, Routing]:
        """Owners of the experts by epoch, as the HMM has told them so far."""

    @property
    def doorbells(self) -> Mapping[int, int]:
        """Descriptors by slot: the rank sleeps on its own."""

    @property
    def is_changing(self) -> bool:
        """Whether a goal is being worked at."""

    def take(self, message: ShareHandles | SeatMemory, fds: list[int]) -> None:
        """Import handles, or take a new goal. Closes `fds`. Raises ProtocolError, DeviceError."""

    def advance(self, resize_kv: Callable[[int], bool]) -> int:
        """Work at the goal for a while: the revision that is now reached, else 0. Raises DeviceError, ProtocolError."""

    def close(self) -> None:
        """Give everything back. Idempotent."""


class SeatParts(NamedTuple):
    """What every rank has, whether it leads or follows; its thread's from then on.

    `seat`: who it is.
    `clock`: what it waits and measures by.
    `transport`: leads to the HMM and to other ranks.
    `server`: where others reach it.
    `hmm`: the connection by which the memory came.
    `fence`: refuses commands of superseded scalers.
    `memory`: what is mapped; `revision`: of the SeatMemory that it was made by.
    `barrier`, `exchange`: its ends of what all ranks share.
    `attach_ms`, `build_ms`: how long it took until all of this was there.
    `computes_by`: see ComputeBackend.
    `use_cores`: divides the machine's cores by so many ranks that step together, from the next step on.
    """

    seat: StartRank
    clock: Clock
    transport: Transport
    server: ServerEnd[ToRank]
    hmm: HmmLink
    fence: Fence
    memory: Mapped
    revision: int
    barrier: StepBarrier
    exchange: Exchange
    attach_ms: float
    build_ms: float
    computes_by: str
    use_cores: Callable[[int], None]
