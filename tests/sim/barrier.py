"""The bus: who steps together, and where they meet. Values, which outlive every process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from elasticmoe.services.worker.exchange.barrier import Arrival, BarrierMembership, StepBarrier
from elasticmoe.services.worker.exchange.base import StepAborted, StepTimedOut
from elasticmoe.services.worker.exchange.board import BLOCKS_MAX, ReplicaBoard, ReplicaPlan

if TYPE_CHECKING:
    from tests.sim.rank import RankProcess


class Meeting(NamedTuple):
    """One that all have come to. `fates`: what becomes of the step for each member, once it is drawn. `plans`: what the
    leaders have written, by slot: none writes again before its followers have read that."""

    generation: int
    said: list[Arrival]
    members: dict[int, RankProcess]
    fates: dict[int, str]
    plans: dict[int, bytes]


class Bus:
    """The shared memory of the bus. `num_flips`: to staged generations."""

    def __init__(self) -> None:
        self.now = (0, 0, False, 0)
        self.next = (0, 0, 0)
        self.max_ranks = 8
        self.num_flips = 0
        self.counts: defaultdict[int, int] = defaultdict(int)  # of progress, by slot
        self.blocks: defaultdict[int, int] = defaultdict(int)  # of KV, by slot
        self.plans: dict[int, bytes] = {}
        self._here: dict[int, tuple[Arrival, RankProcess]] = {}
        self._unread: dict[int, Meeting] = {}

    def membership(self) -> tuple[int, int, bool, int]:
        """See elasticmoe.native.bus."""
        return self.now

    def staged(self) -> tuple[int, int, int]:
        """See elasticmoe.native.bus."""
        return self.next if self.next[0] > self.now[0] else (0, 0, 0)

    def set_membership(self, generation: int, members: int, running: bool, epoch: int = 0) -> None:
        """See elasticmoe.native.bus."""
        if generation <= self.now[0]:
            raise ValueError("not greater")
        self._change((generation, members, running, epoch))

    def stage_membership(self, generation: int, members: int, epoch: int) -> None:
        """See elasticmoe.native.bus."""
        self.next = (generation, members, epoch)

    def flip(self, generation: int) -> bool:
        """See elasticmoe.native.bus."""
        staged, members, epoch = self.next
        if self.now[0] == generation:
            return True
        if staged != generation or generation <= self.now[0] or not self.now[2]:
            return False
        self._change((generation, members, True, epoch))
        self.num_flips += 1
        return True

    def _change(self, now: tuple[int, int, bool, int]) -> None:
        self.now, self.next = now, (0, 0, 0)
        waiting, self._here = self._here, {}
        for _, process in waiting.values():
            process.go_on()

    def progress(self, slot: int) -> int:
        """See elasticmoe.native.bus."""
        return self.counts[slot]

    def is_waiting_for_device(self, slot: int) -> bool:
        """Never: what computes here is done at once."""
        return False

    def is_awaited(self, generation: int) -> bool:
        """See StepBarrier."""
        self._check(generation)
        return bool(self._here)

    def _check(self, generation: int) -> None:
        if generation != self.now[0] or not self.now[2]:
            raise StepAborted(self.now[0])

    def arrive(self, process: RankProcess, generation: int, said: Arrival) -> Meeting:
        """See StepBarrier. All leave a meeting at the same instant: who waits there is told to go on. One that is over
        because its members have flipped may look to the slower ones like any other end of a generation."""
        slot = said.slot
        met = self._unread.pop(slot, None)
        if met is not None and met.generation == generation:
            if generation != self.now[0] and process.sim.rng.random() < 0.5:
                raise StepAborted(self.now[0])
            return met
        self._check(generation)
        self._here.setdefault(slot, (said, process))
        if any(slot not in self._here for slot in range(self.max_ranks) if self.now[1] >> slot & 1):
            raise StepTimedOut("not all have come")
        processes = {slot: process for slot, (_, process) in sorted(self._here.items())}
        if any(process.is_paused or not process.is_alive for process in processes.values()):
            raise StepTimedOut("one has come, and does not go on")
        met = Meeting(
            generation, [said for _, (said, _) in sorted(self._here.items())], processes, {}, dict(self.plans)
        )
        self._here = {}
        self._unread = {other: met for other in processes if other != slot}
        for other in self._unread:
            processes[other].go_on()
        return met


class SimBoard(ReplicaBoard):
    """One rank's end of what the ranks of a replica tell each other there. `replica`: their slots."""

    def __init__(self, bus: Bus, process: RankProcess, replica: Sequence[int]) -> None:
        self._bus = bus
        self._process = process
        self.leader = replica[0]
        self._followers = tuple(replica[1:])

    def write(self, plan: ReplicaPlan) -> None:
        """See ReplicaBoard."""
        self._bus.plans[self._process.seat.slot] = plan.encode()

    def read(self, generation: int) -> ReplicaPlan:
        """See ReplicaBoard."""
        if generation != self._bus.now[0] or not self._bus.now[2]:
            raise StepAborted(self._bus.now[0])
        return ReplicaPlan.decode(self._process.barrier.last.plans[self.leader])

    def tell_blocks(self, num_blocks: int) -> None:
        """See ReplicaBoard."""
        self._bus.blocks[self._process.seat.slot] = num_blocks

    @property
    def blocks_of_leader(self) -> int:
        """See ReplicaBoard."""
        return self._bus.blocks[self.leader]

    @property
    def blocks_of_followers(self) -> int:
        """See ReplicaBoard."""
        return min(filter(None, (self._bus.blocks[slot] for slot in self._followers)), default=BLOCKS_MAX)


class SimBarrier(StepBarrier):
    """One rank's end of the bus. `last`: the meeting that it was in last."""

    def __init__(self, bus: Bus, process: RankProcess) -> None:
        self._bus = bus
        self._process = process
        self.last = Meeting(0, [], {}, {}, {})

    def join(self, incarnation: int) -> None:
        """See StepBarrier. Who is in a slot is looked after by the world."""

    def leave(self) -> None:
        """See StepBarrier."""

    def membership(self) -> BarrierMembership:
        """See StepBarrier."""
        return BarrierMembership(*self._bus.membership())

    def staged(self) -> tuple[int, int]:
        """See StepBarrier."""
        generation, _, epoch = self._bus.staged()
        return generation, epoch

    def arrive(self, generation: int, num_tokens: int, flags: int, wait_ms: float) -> list[Arrival]:
        """See StepBarrier. Never waits: it times out at once."""
        self.count_progress()
        said = Arrival(self._process.seat.slot, num_tokens, flags)
        self.last = self._bus.arrive(self._process, generation, said)
        return self.last.said

    def is_awaited(self, generation: int) -> bool:
        """See StepBarrier."""
        return self._bus.is_awaited(generation)

    def switch(self, generation: int) -> bool:
        """See StepBarrier."""
        num_flips = self._bus.num_flips
        is_done = self._bus.flip(generation)
        if self._bus.num_flips > num_flips:
            self._process.sim.note(f"bus: flipped to generation {generation}, epoch {self._bus.now[3]}")
        return is_done

    def count_progress(self) -> None:
        """See StepBarrier."""
        self._bus.counts[self._process.seat.slot] += 1

    def tell_waiting(self, is_waiting: bool) -> None:
        """See StepBarrier. Nothing is computed on a device."""

    def tell_shortage(self, generation: int, total_tokens: int) -> None:
        """See StepBarrier. Memory is never short for a step."""

    def shortage(self, slot: int, generation: int) -> int:
        """See StepBarrier."""
        return 0

    def ring(self) -> None:
        """See StepBarrier."""
        self._process.world.ring(self._process)

    def hear(self) -> None:
        """See StepBarrier."""
        self._process.has_rung = False
