"""One rank's part in the lockstep: its generation, the meeting at each step's start, the flip.

While any rank has work, all ranks step together. Each step starts with a meeting: every rank arrives at the barrier,
says how many tokens it brings, and waits for the others. After a meeting to which no rank brought any, all ranks go to
sleep on their sockets and their doorbells. A sleeping rank that gets work arrives at the barrier and then rings the
others. A rank that is woken looks whether a peer waits at the barrier; a stale ring costs no more than that look.

When the generation changes, because a rank died or joined, the step in flight is discarded and planned again once
the HMM publishes a running generation.

A new layout needs no discarded step. The HMM *stages* a generation; a rank that sees it says so at its next meeting.
When all have said so at the same meeting, each rank knows that the others know it too. No rank computes that step: each
makes the staged generation the current one and goes on in it, by its routing. A rank that leaves the meeting late finds
the generation over, as after any change; it had not begun to compute either.

A rank may ask at the meeting to compute alone, to try a request that may be what makes steps fail (engine/trial.py):
then all other ranks compute no tokens of their own. Where several ask, the rank in the lowest slot computes.
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
STAGED_STEPS_MAX = 2  # urgent because a layout is staged: a rank that has not seen it by then has other reasons
FIRST_STEPS = 3  # urgent after ranks came in: the ranks that bring them work need up to two steps
STEP_MS_MAX = 120_000.0  # a step that takes longer has a wedged rank in it
HAND_OVER_STEPS = 2  # urgent: the one in which a sequence travels, and the one in which its next rank computes it
HAND_OVERS_MAX = 8  # steps in a row that make others urgent so; then one takes prompts
PUT_OFF_MAX = 8  # urgent steps that put prompts off are caught up with, as many steps long
# What a rank says at a meeting: how many tokens it brings, and
ALONE = 1 << 31  # only if nobody else brings any
HANDING = 1 << 30  # after this step it hands sequences over
TOKENS = HANDING - 1


class Lockstep:
    """The lockstep as one rank sees it. Owned by the rank's thread.

    `barrier` and `exchange` stay the rank's, and so do `routings`: owners of the experts by epoch, as the HMM has told
    them so far. `leader`: the slot that says how many tokens this rank's replica brings, if it is not the own one.

    generation: the present one; 0 before the first
    members: bit mask of the slots that take part in it
    epoch: of the layout whose routing is in use; 0 before the first generation
    is_member: this rank takes part in the present generation; `has_come_in`: for the first time
    is_awake: it steps with the others, also without work of its own
    has_turn: the tokens that this rank's replica brought count in the step that was met for last
    is_settled: all have met since a step was given up, by this rank or by its seat's last one, so that no rank is in
        the midst of that step any more
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
        self._is_short = False  # the step that was planned last: its prompts were put off
        self._num_put_off = 0  # such steps that have not been caught up with
        self._num_handing = 0  # steps that were followed by hand-overs, since the last one that was not urgent
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
        """Follow to the present generation; a rank that is no member does so, too. Returns whether it is a new one that
        runs: the others' processes may be new ones since."""
        generation, members, running, epoch = self._barrier.membership()
        if generation == self.generation:
            self._staged()  # a rank that is no member yet gets ready beside the members
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
        """Whether the next step should be a short one, because something waits for its end: streams after a pause,
        ranks that are about to flip, or what `hurry` was called for. The rank meets the others for it anyway."""
        return (self.is_awake and self._num_urgent > 0) or (self._num_staged < STAGED_STEPS_MAX and self._staged() != 0)

    @property
    def is_catching_up(self) -> bool:
        """Whether prompts of this rank have waited for urgent steps, and others' as well, as far as is known: they come
        a few at a time then, for all at once would make one step as long as the pauses that were avoided."""
        return self._num_put_off > 0 and not self.is_urgent

    def hurry(self, num_steps: int) -> None:
        """Let at least so many of the next steps be urgent, until no rank has work."""
        if self.is_awake:
            self._num_urgent = max(self._num_urgent, num_steps)

    def _staged(self) -> int:
        """The generation that this rank is ready to flip to; 0 for none."""
        generation, epoch = self._barrier.staged()
        is_ready = generation and epoch in self._routings and self._exchange.prepare(generation)
        return generation if is_ready else 0

    def meet(
        self, num_tokens: int, *, is_alone: bool = False, is_handing: bool = False, puts_off: bool = False
    ) -> int | None:
        """Arrive at the step's barrier with `num_tokens` and wait for the others; the tokens of all ranks together, to
        be computed now; 0 when there is nothing to compute, be it that the ranks have flipped to a new layout.
        `is_alone`: no other rank's are to be computed with them. Whether the own ones are: `has_turn`. `is_handing`:
        the rank hands sequences over after this step, so the next HAND_OVER_STEPS are urgent for all. `puts_off`: own
        prompts were left out because the step is urgent.

        A rank that was asleep first arrives, then rings those that are not there yet. None: not all have come within
        MEET_MS; the arrival stands, and the same call goes on waiting. Raises StepAborted when the generation is over,
        StepTimedOut when a peer stays away beyond STEP_MS_MAX.
        """
        flags = self._flags
        if flags is None:
            self._is_short = puts_off
            flags, self._deadline = self._staged(), self._clock.monotonic() + STEP_MS_MAX / 1e3
            self._num_staged += flags != 0
            wait_ms = MEET_MS if self.is_awake else 0.0
        else:
            wait_ms = MEET_MS
        try:
            words = num_tokens | ALONE * is_alone | HANDING * is_handing
            said = self._barrier.arrive(self.generation, words, flags, wait_ms)
        except StepTimedOut:
            if self._clock.monotonic() > self._deadline:
                raise
            self._flags = flags
            self._barrier.ring()
            self._barrier.count_progress()  # a rank that waits is not stuck
            return None
        except StepAborted:
            self._flags = None
            raise
        self._flags = None
        self.is_settled = True
        if not self._num_urgent:
            self._num_handing = 0
        self._num_urgent = max(0, self._num_urgent - 1)
        staged = said[0][2]
        if staged and all(flag == staged for _, _, flag in said):
            self._flip(staged)
            return 0
        alone = next(((slot, words & TOKENS) for slot, words, _ in said if words & ALONE), None)
        self._is_everybodys, self.has_turn = alone is None, alone is None or alone[0] == self._leader
        total = sum(words & TOKENS for _, words, _ in said) if alone is None else alone[1]
        self.is_awake, self._total = total > 0, total
        self._num_put_off = min(PUT_OFF_MAX, self._num_put_off + 1) if self._is_short else max(0, self._num_put_off - 1)
        if not total:
            self._num_urgent = self._num_put_off = 0
        if self._num_handing < HAND_OVERS_MAX and any(words & HANDING for _, words, _ in said):
            self._num_handing += 1
            self.hurry(HAND_OVER_STEPS)
        return total

    def _flip(self, generation: int) -> None:
        failpoint("rank.flip.before")
        is_done = self._barrier.switch(generation)
        failpoint("rank.flip.after")
        log.info("flipped" if is_done else "flip was overtaken", generation=generation)
        self._barrier.ring()  # new members sleep

    @property
    def num_clean(self) -> int:
        """Steps of all ranks that were completed since the last one that failed; 0 where the last one was one rank's
        alone."""
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
