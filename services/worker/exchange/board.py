"""Interface of what the ranks of one replica tell each other beside their collectives (ADR 37): the leader's plan for
the step that it is about to meet the others for, and how many KV blocks each has.

**KV blocks.** A block has one number on all ranks of a replica, so the leader gives out blocks that all of them have
mapped, and a follower unmaps those that the leader gives out no more. Each side says what it is about to do, and then
looks at what the other has said: of two that cross at least one sees it, and takes its word back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import Final, NamedTuple

from elasticmoe.services.worker.model.batch import Batch

BLOCKS_MAX: Final = 1 << 30
"""More than any cache has."""

Moves = tuple[tuple[int, int], ...]
"""KV blocks that get another place: (old, new)."""


class ReplicaPlan(NamedTuple):
    """What all ranks of a replica do in a step: copy the blocks of `moves`, then compute `batch`."""

    moves: Moves
    batch: Batch

    def encode(self) -> bytes:
        """For `decode`."""
        numbers = array("i", [len(self.moves), *(block for move in self.moves for block in move)])
        return numbers.tobytes() + self.batch.encode()

    @classmethod
    def decode(cls, data: bytes) -> ReplicaPlan:
        """What was encoded. Raises ValueError for no plan."""
        numbers = array("i", data[: len(data) // 4 * 4])
        num_moves = numbers[0] if numbers else -1
        if not 0 <= num_moves <= len(numbers) // 2:
            raise ValueError(f"a plan of {len(data)} bytes, with {num_moves} moves")
        end = 1 + 2 * num_moves
        moves = tuple(zip(numbers[1:end:2], numbers[2:end:2], strict=True))
        return cls(moves, Batch.decode(data[4 * end :]))


class ReplicaBoard(ABC):
    """One rank's end. One thread. Nothing blocks. All ranks see what is told of blocks in one and the same order.

    `leader`: the slot of the replica's first rank.
    """

    leader: int

    @abstractmethod
    def write(self, plan: ReplicaPlan) -> None:
        """As the leader: put the plan where the followers look once all have met. Before this rank says that it has
        come to the step, and not again until that step has ended. Raises ValueError for one beyond the room."""

    @abstractmethod
    def read(self, generation: int) -> ReplicaPlan:
        """As a follower: the plan of the step that all have met for, before its first collective. Raises StepAborted
        where the generation is over: then it may be another step's, or half of it; ValueError for no plan."""

    @abstractmethod
    def tell_blocks(self, num_blocks: int) -> None:
        """As the leader: blocks from this number on are not given out. As a follower: nor are they mapped here. What
        was said outlives the rank, as KV does, until the HMM gives its slot to another seat."""

    @property
    @abstractmethod
    def blocks_of_leader(self) -> int:
        """How many the leader gives out; 0 before it has said anything."""

    @property
    @abstractmethod
    def blocks_of_followers(self) -> int:
        """How many all followers have mapped, as far as they have said; BLOCKS_MAX where none has. Who has not said
        anything has not come yet: without it there is no step."""
