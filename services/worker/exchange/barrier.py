"""Interface of the step barrier: which ranks step together now, and where all of them meet at each step's start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple


class BarrierMembership(NamedTuple):
    """One publication: `members` is a bit mask of slots, `epoch` the layout's. All 0, not running, before the first."""

    generation: int
    members: int
    is_running: bool
    epoch: int


class Arrival(NamedTuple):
    """What the rank in `slot` said when it arrived."""

    slot: int
    num_tokens: int
    flags: int


class StepBarrier(ABC):
    """One rank's end. One thread.

    Membership has one writer, the HMM, except that members may make the staged generation current. While a generation
    runs, its members make the same arrivals. Whoever sleeps is woken by `ring`; a stale ring costs a look.
    """

    @abstractmethod
    def join(self, incarnation: int) -> None:
        """Take the own slot; a predecessor that still lives is fenced from then on. `incarnation`: 64 bits, not 0."""

    @abstractmethod
    def leave(self) -> None:
        """Give the own slot back, unless another incarnation has taken it. Idempotent."""

    @abstractmethod
    def membership(self) -> BarrierMembership:
        """What was published last. Never blocks."""

    @abstractmethod
    def staged(self) -> tuple[int, int]:
        """Generation and epoch of what `switch` would make current now; (0, 0) for nothing. Never blocks."""

    @abstractmethod
    def arrive(self, generation: int, num_tokens: int, flags: int, wait_ms: float) -> list[Arrival]:
        """Say `num_tokens` and `flags` (32 bits each) and wait for the other members; what all said, by slot.

        Raises StepAborted when the generation is over or does not run, StepTimedOut after `wait_ms`: the arrival
        stands then, with what was said first, and the same call goes on waiting.
        """

    @abstractmethod
    def is_awaited(self, generation: int) -> bool:
        """Whether a member waits at the next meeting of `generation`. Never blocks. Raises StepAborted."""

    @abstractmethod
    def switch(self, generation: int) -> bool:
        """Make the staged generation current, for those who know that all members agree; whether it is now. Never
        blocks."""

    @abstractmethod
    def count_progress(self) -> None:
        """Let others see that this rank is not stuck."""

    @abstractmethod
    def tell_waiting(self, is_waiting: bool) -> None:
        """Let others see whether this rank waits for its device, in a call that may last. `join` says that it does
        not."""

    @abstractmethod
    def tell_shortage(self, generation: int, total_tokens: int) -> None:
        """Let others see that this rank is about to end `generation` because it found no memory for a step of so many
        tokens, of all ranks together; at least 1."""

    @abstractmethod
    def shortage(self, slot: int, generation: int) -> int:
        """How many tokens that step had, if the rank in `slot` has said so; else 0. Never blocks."""

    @abstractmethod
    def ring(self) -> None:
        """Wake the other ranks."""

    @abstractmethod
    def hear(self) -> None:
        """Silence what woke this one."""
