"""Computing the steps that ranks have agreed on, and living on after those that fail. What was not committed is planned
again, by this process where it can; a step that is never repeated costs nobody but who is to blame.

A step may find no memory: then it is given up, and if that does not help, planned without the request that needs most.
It may raise what cannot be laid at one request's door, or be discarded because another rank failed in it: then all that
were in it are tried (engine/trial.py). Where the process cannot go on, it ends, and the marks that it leaves in the
ledger tell the seat's next one as much. Where another rank says on the bus that it lacked memory, nobody is tried: the
step was too large.

A rank that fails in the midst of an exchange must not let the others wait for it. Only the HMM can end a generation of
the bus, and it does when a rank's connection ends: so the rank ends it, steps no more in that generation, and
introduces itself again (hmm/link.py), as after the HMM's own restart. The others discard the step, as at a death.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.failure import OUT_OF_MEMORY, is_shortage
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.plan import Chunk, PlanFailed, StepPlan
from elasticmoe.services.worker.engine.trials import guilty_error
from elasticmoe.services.worker.exchange.base import Exchange, StepAborted, StepTimedOut
from elasticmoe.services.worker.hmm.link import HmmLink
from elasticmoe.services.worker.rank.lockstep import Lockstep

log = get_logger("rank")

GIVEN_UP_MAX: Final = 8  # steps in a row that found no memory, to which others have brought most tokens
FAILED_MAX: Final = 8  # steps in a row that raised, also those without suspects: it is this process that is broken


class Steps:
    """Computes steps for the rank. Owned by its thread; all that it is made of stays the rank's. `tell` is called with
    what is to be told to routers. `num_discarded`: tokens of steps that other ranks' failures ended."""

    def __init__(
        self, engine: Engine, exchange: Exchange, lockstep: Lockstep, hmm: HmmLink, tell: Callable[[Outcome], None]
    ) -> None:
        self._engine = engine
        self._exchange = exchange
        self._lockstep = lockstep
        self._hmm = hmm
        self._tell = tell
        self._num_given_up = 0  # in a row, but for steps that left prompts out
        self._num_failed = 0  # in a row
        self._num_short = 0  # in a row that others found no memory for, likewise
        self._num_unplanned = 0  # in a row, for reasons that are nobody's
        self.num_discarded = 0

    def plan(self, *, decode_only: bool = False, num_clean: int = 0) -> StepPlan:
        """The next step's work. A request that its planning fails of ends alone; a failure that is nobody's costs the
        step, as one in computing it does. Raises MemoryError, and what went wrong where this process cannot go on."""
        while True:
            try:
                plan = self._engine.plan(decode_only=decode_only, num_clean=num_clean)
            except PlanFailed as failed:
                ended = self._engine.settle_plan(failed)
                log.exception("a plan failed", streams=[one.request_id for _, one in ended])
                self._tell(Outcome({}, ended))
                if ended:
                    continue  # one request fewer
                self._num_unplanned += 1
                if self._num_unplanned > FAILED_MAX:
                    raise
                return StepPlan([], [], [])
            self._num_unplanned = 0
            return plan

    def announce(self, plan: StepPlan) -> StepPlan | None:
        """See Engine. None where it failed: that is a step that failed, but nobody waits for a part in it, and this
        rank plans anew. Raises what went wrong where this process cannot go on."""
        try:
            return self._engine.announce(plan)
        except Exception as error:
            self._engine.trials.begin(plan)
            self._live_on(plan, plan.num_tokens, error, is_awaited=False)
            return None

    def run(self, plan: StepPlan, total_tokens: int, deadline_ms: float) -> StepPlan | None:
        """Compute, commit and tell. `total_tokens`: of all ranks together. What was computed: `plan`, or nothing of it
        where it is another rank's turn; None where the step failed or was given up. Raises StepTimedOut, and what went
        wrong where this process cannot go on."""
        if not self._lockstep.has_turn:
            plan = StepPlan([], [], [], is_alone=True)
        self._engine.trials.begin(plan)
        try:
            choices = self._engine.compute(plan, total_tokens, deadline_ms)
        except StepTimedOut:
            raise
        except StepAborted as aborted:
            log.info("step discarded", generation=aborted.generation)
            self.num_discarded += plan.num_tokens
            if short := self._lockstep.shortages():
                self._discard(plan, total_tokens, short)
            else:
                self._fail(plan, is_aborted=True)
            return None
        except Exception as error:
            self._live_on(plan, total_tokens, error, is_awaited=self._exchange.is_awaited)
            return None
        self._num_failed = 0
        # A step that left something out says nothing of one that was given up: it would be tried again for ever.
        if plan.is_whole:
            self._num_given_up = self._num_short = 0
        self._tell(self._engine.commit(plan, choices))
        self._engine.trials.end(plan)
        self._lockstep.note_done()
        return plan

    def end_unmet(self, plan: StepPlan) -> None:
        """The generation has ended before this rank saw that all had come to the step. Another one may have seen it,
        begun the step and found no memory for it, all before this one woke up: then that counts as in the step."""
        short = self._lockstep.shortages()
        total = max(short.values(), default=0)
        if short and plan.num_said <= total:
            self._discard(plan, total, short)
        else:  # or it was a step without this plan: of another's suspect alone
            self._lockstep.abort()

    def _live_on(self, plan: StepPlan, total_tokens: int, error: Exception, *, is_awaited: bool) -> None:
        """A step raised an error. Raises it again where this process must end of it."""
        if is_shortage(error):
            self._give_up(plan, total_tokens, error, is_awaited=is_awaited)
            return
        if is_awaited and not self._hmm.is_connected:
            raise error  # nobody can stop the others but this process's end
        self._num_failed += 1
        log.exception("a step failed", tokens=plan.num_tokens, in_a_row=self._num_failed, others_wait=is_awaited)
        if self._num_failed > FAILED_MAX:
            raise error
        if is_awaited:
            self._hmm.close()
        self._fail(plan, is_aborted=is_awaited)

    def _fail(self, plan: StepPlan, *, is_aborted: bool) -> None:
        """All that were in the step are tried; who is to blame ends. `is_aborted`: the generation ends of it."""
        if is_aborted:
            self._lockstep.abort()
        self._lockstep.note_failed()
        guilty = self._engine.trials.fail(plan)
        for sequence in guilty:
            log.error("request made steps fail, and is ended", **sequence.request.names)
        self._tell(Outcome({}, [self._engine.fail(sequence, guilty_error()) for sequence in guilty]))

    def _give_up(self, plan: StepPlan, total_tokens: int, error: Exception, *, is_awaited: bool) -> None:
        """A step found no memory."""
        self._num_given_up += 1
        log.error(
            "a step found no memory",
            because=f"{type(error).__name__}: {str(error)[:200]}",
            tokens=plan.num_tokens,
            in_a_row=self._num_given_up,
            others_wait=is_awaited,
        )
        is_over = self._num_given_up > GIVEN_UP_MAX and not plan.chunks
        if is_awaited or is_over:
            self._lockstep.tell_shortage()  # also of what this process ends of: others are not to be tried for it
        if is_over or (is_awaited and not self._hmm.is_connected):
            raise error  # nobody can stop the others but this process's end
        if is_awaited:
            self._lockstep.abort()
            self._hmm.close()
        self._withdraw(plan, self._num_given_up > _patience(plan, total_tokens))

    def _discard(self, plan: StepPlan, total_tokens: int, short: Collection[int]) -> None:
        """Other ranks found no memory for the step."""
        log.warning("other ranks found no memory for a step", slots=sorted(short), tokens=plan.num_tokens)
        self._lockstep.abort()
        self._num_short += bool(plan.chunks)
        self._withdraw(plan, self._num_short > _patience(plan, total_tokens))

    def _withdraw(self, plan: StepPlan, is_smaller: bool) -> None:
        """The step is planned again: a smaller one with fewer tokens of prompts, or, if they are few, without the
        request that needs most."""
        self._lockstep.note_failed()
        self._engine.trials.drop(plan)
        if is_smaller and plan.chunks and not self._engine.scheduler.budget.shrink(plan.num_prompt):
            text = "there is no memory to compute this request's next step"
            largest = max(plan.chunks, key=_size)
            failure = self._engine.fail(largest.sequence, Unavailable(text, code=OUT_OF_MEMORY))
            self._tell(Outcome({}, [failure]))


def _patience(plan: StepPlan, total_tokens: int) -> int:
    """How many steps in a row may find no memory before this rank leaves something out. Whoever brought more than half
    of the tokens made the step too large, on whichever rank; others wait until that has not helped."""
    return 1 if 2 * plan.num_tokens > total_tokens else GIVEN_UP_MAX


def _size(chunk: Chunk) -> tuple[int, int, int]:
    """Logits of whole prompts first, then tokens; of equals the youngest."""
    sequence = chunk.sequence
    return chunk.num_tokens if sequence.wants_prompt_logprobs else 0, chunk.num_tokens, sequence.arrival
