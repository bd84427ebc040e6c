"""One rank's part in the lockstep: its generation, the meeting at each step's start, the flip.

While any rank has work, all step together: each step starts at a barrier where every rank says how many tokens it
brings. When nobody brought any, all go to sleep on their sockets and their doorbell. Who gets work first
arrives at the barrier and then rings; whoever wakes looks whether a peer waits there (a stale ring costs a look).

When the generation changes, because a rank died or joined, the step in flight is discarded and planned again once
the HMM publishes a running generation.

A new layout needs no discarded step. The HMM *stages* a generation; a rank that sees it says so at its next
meeting, and when all have said so at the same meeting, all know that all know: nobody computes that step, they make
the staged generation the current one and go on in it, by its routing. (Who is slow to leave that meeting finds the
generation over, as after any change; it had not begun to compute either.)

A rank may ask at the meeting to compute alone, to try a request that may be what makes steps fail (engine/trial.py):
then all others compute no tokens of their own. Of several that ask, the one in the lowest slot does.
"""

from __future__ import annotations

from collections.abc import Mapping

from elasticmoe.common.clock import Clock
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.protocol.handles import Routing
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.exchange.barrier import StepBarrier
from elasticmoe.services.worker.exchange.base import Exchange, StepAborted, StepTimedOut

log = get_logger("rank")

MEET_MS = 500.0  # of waiting for others in one go: the rank looks that often whether it shall stop
STAGED_STEPS_MAX = 2  # urgent because a layout is staged: who has not heard of it by then is slow for other reasons
FIRST_STEPS = 3  # urgent after ranks came in: who brings them work needs up to two steps
STEP_MS_MAX = 120_000.0  # a step that takes longer has a wedged rank in it
ALONE = 1 << 31  # beside the tokens that a rank says it brings: only if nobody else brings any


class Lockstep:
    """Owned by the rank's thread. `barrier` and `exchange` stay the rank's, and `routings`: owners of the experts by
    epoch, as the HMM has told them so far.

    `generation`: the present one. `is_member`: takes part in it; `has_come_in`: for the first time. `is_awake`: steps
    with the others, also without work of its own. `members`: bit mask of the slots that take part in the present
    generation. `epoch`: of the layout whose routing is in use; 0 before the first generation. `has_turn`: the tokens
    that this rank's replica brought count in the step that was met for last. `leader`: the slot that says how many, if
    it is not the own one. `is_settled`: all have met since a step was given up, by this rank or by its seat's last
    one, so that nobody is in the midst of that any more.
    """

    def __init__(
        self,
        barrier: StepBarrier,
        exchange: Exchange,
        routings: Mapping[int, Routing],
        slot: int,
        clock: Clock,
        leader: int | None = None,
    ) -> None:
        self._barrier = barrier
        self._exchange = exchange
        self._routings = routings
        self._slot = slot
        self._leader = slot if leader is None else leader
        self._clock = clock
        self.generation = 0
        self._num_urgent = 0  # of the next steps
        self._has_run = False  # as a member
        self._num_staged = 0  # steps of this generation while another one was staged
        self._is_everybodys = True  # the last step
        self._total = 0  # its tokens
        self._num_clean = 0  # that were, and were completed, since the last one that failed
        self._flags: int | None = None  # with which it has arrived where not all are yet
        self._deadline = 0.0  # of that meeting
        self.epoch = 0
        self.members = 0
        self.is_member = False
        self.has_come_in = False
        self.is_awake = False
        self.has_turn = True
        # A member's successor: others may still be in a step that the one before has not lived to see given up.
        self.is_settled = not barrier.membership().members >> slot & 1

    def sync(self) -> bool:
        """Follow to the present generation, also as one who is no member. Whether it is a new one that runs:
        the others' processes may be new ones since."""
        generation, members, running, epoch = self._barrier.membership()
        if generation == self.generation:
            self._staged()  # who is no member yet gets ready beside the others
            return False
        routing = self._routings.get(epoch)
        if running and members >> self._slot & 1 and routing is None:
            return False  # the HMM's message with it has not been read yet
        is_larger = bool(members & ~self.members)
        self.generation, self.members = generation, members
        self._num_clean = 0
        self.is_member = running and bool(members >> self._slot & 1)
        self.has_come_in = self.is_member and not self._has_run
        self._has_run |= self.is_member
        if self.is_member and routing is not None:
            self._exchange.set_routing(generation, routing.owners)
            self.epoch = epoch
            self.is_awake = True  # the first step of a generation is everybody's
            self._num_staged = 0
            self.hurry(FIRST_STEPS if is_larger else 1)
        log.info("membership", generation=generation, members=bin(members), running=running, epoch=epoch)
        return running

    def shall_meet(self) -> bool:
        """Whether the others step, or are about to flip, though this rank has no work."""
        if self.is_awake or self._staged():
            return True
        try:
            return self._barrier.is_awaited(self.generation)
        except StepAborted:
            return False

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for the end of the next step, so that it should be a short one: streams after a pause,
        ranks that are about to flip, or whom `hurry` was called for. The rank meets the others for it anyway."""
        return (self.is_awake and self._num_urgent > 0) or (self._num_staged < STAGED_STEPS_MAX and self._staged() != 0)

    def hurry(self, num_steps: int) -> None:
        """Let at least so many of the next steps be urgent, until nobody has work."""
        if self.is_awake:
            self._num_urgent = max(self._num_urgent, num_steps)

    def _staged(self) -> int:
        """The generation that this rank is ready to flip to; 0 for none."""
        generation, epoch = self._barrier.staged()
        is_ready = generation and epoch in self._routings and self._exchange.prepare(generation)
        return generation if is_ready else 0

    def meet(self, num_tokens: int, *, is_alone: bool = False) -> int | None:
        """Arrive at the step's barrier with `num_tokens` and wait for the others; the tokens of all ranks together, to
        be computed now; 0 when there is nothing to compute, be it that the ranks have flipped to a new layout.
        `is_alone`: nobody else's are to be computed with them. Whether the own ones are: `has_turn`.

        Whoever comes from sleep first arrives, then rings those that are not there yet. None: not all have come within
        MEET_MS; the arrival stands, and the same call goes on waiting. Raises StepAborted when the generation is over,
        StepTimedOut when a peer stays away beyond STEP_MS_MAX.
        """
        flags = self._flags
        if flags is None:
            flags, self._deadline = self._staged(), self._clock.monotonic() + STEP_MS_MAX / 1e3
            self._num_staged += flags != 0
            wait_ms = MEET_MS if self.is_awake else 0.0
        else:
            wait_ms = MEET_MS
        try:
            said = self._barrier.arrive(self.generation, num_tokens | (ALONE if is_alone else 0), flags, wait_ms)
        except StepTimedOut:
            if self._clock.monotonic() > self._deadline:
                raise
            self._flags = flags
            self._barrier.ring()
            self._barrier.count_progress()  # who waits is not who is stuck
            return None
        except StepAborted:
            self._flags = None
            raise
        self._flags = None
        self.is_settled = True
        self._num_urgent = max(0, self._num_urgent - 1)
        staged = said[0][2]
        if staged and all(flag == staged for _, _, flag in said):
            self._flip(staged)
            return 0
        alone = next(((slot, tokens ^ ALONE) for slot, tokens, _ in said if tokens & ALONE), None)
        self._is_everybodys, self.has_turn = alone is None, alone is None or alone[0] == self._leader
        total = sum(tokens for _, tokens, _ in said) if alone is None else alone[1]
        self.is_awake, self._total = total > 0, total
        if not total:
            self._num_urgent = 0
        return total

    def _flip(self, generation: int) -> None:
        failpoint("rank.flip.before")
        is_done = self._barrier.switch(generation)
        failpoint("rank.flip.after")
        log.info("flipped" if is_done else "flip was overtaken", generation=generation)
        self._barrier.ring()  # new members sleep

    @property
    def num_clean(self) -> int:
        """Steps of everybody that were completed since the last one that failed; 0 where the last one was not
        everybody's."""
        return self._num_clean if self._is_everybodys else 0

    def note_done(self) -> None:
        """The step that was met for last is completed."""
        self._num_clean += self._is_everybodys

    def note_failed(self) -> None:
        """It is not."""
        self._num_clean = 0

    def tell_shortage(self) -> None:
        """This rank is about to end the generation because it found no memory for the step that was met for last."""
        self._barrier.tell_shortage(self.generation, max(1, self._total))

    def shortages(self) -> dict[int, int]:
        """Slots of the members that ended the present generation so, and how many tokens the step had."""
        slots = (slot for slot in range(self.members.bit_length()) if self.members >> slot & 1)
        return {slot: total for slot in slots if (total := self._barrier.shortage(slot, self.generation))}

    def abort(self) -> None:
        """The generation is over: wait for the next."""
        self.is_member = False
        self.is_settled = False
