"""The board of a replica whose ranks share a host: slots of the shared-memory bus."""

from __future__ import annotations

from collections.abc import Sequence

from elasticmoe.native.bus import Bus, BusAborted
from elasticmoe.services.worker.exchange.base import StepAborted
from elasticmoe.services.worker.exchange.board import BLOCKS_MAX, ReplicaBoard, ReplicaPlan


class ShmBoard(ReplicaBoard):
    """`bus` stays the caller's; `replica`: slots of the replica's ranks by tp index, the own one among them."""

    def __init__(self, bus: Bus, replica: Sequence[int]) -> None:
        self._bus = bus
        self.leader = replica[0]
        self._followers = tuple(replica[1:])

    def write(self, plan: ReplicaPlan) -> None:
        """See ReplicaBoard."""
        self._bus.write_plan(plan.encode())

    def read(self, generation: int) -> ReplicaPlan:
        """See ReplicaBoard."""
        try:
            return ReplicaPlan.decode(self._bus.read_plan(generation))
        except BusAborted as aborted:
            raise StepAborted(aborted.generation) from None

    def tell_blocks(self, num_blocks: int) -> None:
        """See ReplicaBoard."""
        self._bus.set_kv_blocks(num_blocks)

    @property
    def blocks_of_leader(self) -> int:
        """See ReplicaBoard."""
        return self._bus.kv_blocks(self.leader)

    @property
    def blocks_of_followers(self) -> int:
        """See ReplicaBoard."""
        told = [blocks for slot in self._followers if (blocks := self._bus.kv_blocks(slot))]
        return min(told, default=BLOCKS_MAX)
