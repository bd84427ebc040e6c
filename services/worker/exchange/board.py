"""What the ranks of one replica tell each other beside their collectives (ADR 37): the leader's plan for the step that
it is about to meet the others for, and how many KV blocks each has.

**KV blocks.** A block has one number on all ranks of a replica, so the leader gives out blocks that all of them have
mapped, and a follower unmaps those that the leader gives out no more. Each side says in its slot what it is about to
do, and then looks at the other's: of two that cross at least one sees it, and takes its word back.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from elasticmoe.native.bus import Bus, BusAborted
from elasticmoe.services.worker.exchange.base import StepAborted
from elasticmoe.services.worker.model.batch import Batch

Moves = tuple[tuple[int, int], ...]
"""KV blocks that get another place: (old, new)."""


class ReplicaPlan(NamedTuple):
    """What all ranks of a replica do in a step: copy the blocks of `moves`, then compute `batch`."""

    moves: Moves
    batch: Batch


class ReplicaBoard:
    """One rank's view. `bus` stays the caller's; `replica`: slots of the replica's ranks by tp index, the own one among
    them. For the rank's thread. Nothing blocks."""

    def __init__(self, bus: Bus, replica: Sequence[int]) -> None:
        self._bus = bus
        self.leader = replica[0]
        self._followers = tuple(replica[1:])

    def write(self, plan: ReplicaPlan) -> None:
        """As the leader: put the plan where the followers look once all have met. Before this rank says that it has
        come to the step, and not again until that step has ended. Raises ValueError for one beyond the bus's room."""
        numbers = array("i", [len(plan.moves), *(block for move in plan.moves for block in move)])
        self._bus.write_plan(numbers.tobytes() + plan.batch.encode())

    def read(self, generation: int) -> ReplicaPlan:
        """As a follower: the plan of the step that all have met for, before its first collective. Raises StepAborted
        where the generation is over: then it may be another step's, or half of it; ValueError for no plan."""
        try:
            data = self._bus.read_plan(generation)
        except BusAborted as aborted:
            raise StepAborted(aborted.generation) from None
        numbers = array("i", data[: len(data) // 4 * 4])
        num_moves = numbers[0] if numbers else -1
        if not 0 <= num_moves <= len(numbers) // 2:
            raise ValueError(f"a plan of {len(data)} bytes, with {num_moves} moves")
        end = 1 + 2 * num_moves
        moves = tuple(zip(numbers[1:end:2], numbers[2:end:2], strict=True))
        return ReplicaPlan(moves, Batch.decode(data[4 * end :]))

    def tell_blocks(self, num_blocks: int) -> None:
        """As the leader: blocks from this number on are not given out. As a follower: nor are they mapped here."""
        self._bus.set_kv_blocks(num_blocks)

    @property
    def blocks_of_leader(self) -> int:
        """How many the leader gives out."""
        return self._bus.kv_blocks(self.leader)

    @property
    def blocks_of_followers(self) -> int:
        """How many all followers have mapped, as far as they have said. Who has not said anything has not come yet:
        without it there is no step."""
        told = [blocks for slot in self._followers if (blocks := self._bus.kv_blocks(slot))]
        return min(told, default=1 << 30)
