"""Which of the requests in a step is it that makes steps fail? Found out by trial, so that it ends alone. Pure.

A step fails for all that were in it: a process dies in it, hangs and is ejected, or raises what cannot be laid at one
request's door. That says little of any of them, since processes also die for reasons of their own. So:

- Whoever was in a step that failed is tried again with the others. One whose prompt was in it is suspect at once (it is
  the likelier cause, and a prompt can wait), the others after SUSPECT_FAILURES failed steps in a row.
- Suspects are left out of ordinary steps and computed alone: one of them, and nobody else's work on any rank. Before
  each such step an ordinary one has to be completed, if need be without any work: steps succeed without suspects.
- One that has failed alone is tried so once more, after CONTROL_STEPS ordinary steps in a row: it is not that a rank's
  n-th step fails. If it fails again, it is the cause, and ends.
- An ordinary step that fails voids what was seen when those that it left out were alone.
- A request is cleared once all has been computed that a failed step was to compute of it, be it by starting over.

Deaths that have nothing to do with requests hit ordinary steps too, so they end nobody, however many there are in a
row. The chance that is left is that of two kills from outside in the two short steps of one and the same request, with
CONTROL_STEPS completed steps in between. What is known of a request survives its process in its ledger row's mark.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from elasticmoe.common.protocol.limits import STEP_FAILURES_MAX
from elasticmoe.common.protocol.router import Suspicion

SUSPECT_FAILURES: Final = 2
GUILTY_FAILURES: Final = 2
CONTROL_STEPS: Final = 16

_COUNT_MASK: Final = 255
assert STEP_FAILURES_MAX <= _COUNT_MASK
# What a row's process was doing with it.
NOTHING: Final = 0
COMPUTED: Final = 1
COMPUTED_ALONE: Final = 2
LEFT_OUT: Final = 3  # of an ordinary step

_STATE_MASK: Final = 3
_FAILURES_SHIFT: Final = 2
_ALONE_SHIFT: Final = 10
_REACH_SHIFT: Final = 18


class Trial(NamedTuple):
    """What is known of one request since it was cleared.

    `failures`: steps that failed with it. `failures_alone`: of these the last ones, in which it was alone. `reach`: how
    many of its tokens would have been computed after the one that went furthest.
    """

    failures: int = 0
    failures_alone: int = 0
    reach: int = 0

    def failed(self, reach: int, *, is_alone: bool) -> Trial:
        """A step with it has failed, which was to bring it to `reach` computed tokens."""
        num_alone = self.failures_alone + 1 if is_alone else 0
        failures = min(STEP_FAILURES_MAX, self.failures + 1)
        return Trial(failures, min(STEP_FAILURES_MAX, num_alone), max(self.reach, reach))

    def voided(self) -> Trial:
        """An ordinary step without it has failed."""
        return Trial(self.failures, 0, self.reach)

    def computed(self, num_tokens: int) -> Trial:
        """So many of its tokens are computed now."""
        return self if num_tokens < self.reach else INNOCENT

    @property
    def is_guilty(self) -> bool:
        """Whether it is what makes steps fail."""
        return self.failures_alone >= GUILTY_FAILURES

    def is_suspect(self, *, in_prompt: bool) -> bool:
        """Whether it may only be computed alone. `in_prompt`: its prompt, or what is computed like one, is not yet."""
        return self.failures >= (1 if in_prompt else SUSPECT_FAILURES)

    def may_be_alone(self, num_clean: int) -> bool:
        """Whether the next step may be its own, after `num_clean` ordinary ones that were completed since the last that
        failed; 0 right after another's own."""
        return num_clean >= (CONTROL_STEPS if self.failures_alone else 1)

    @property
    def suspicion(self) -> Suspicion | None:
        """For other ranks; None where there is nothing to know."""
        return Suspicion(*self) if self.failures else None

    def mark(self, state: int = NOTHING, reach: int = 0) -> int:
        """The row's mark. `state`: its part in a step that has begun, to bring it to `reach` computed tokens (0: to all
        but the one that is chosen then); who finds it so knows that it did not end."""
        counts = self.failures << _FAILURES_SHIFT | self.failures_alone << _ALONE_SHIFT
        return state | counts | max(self.reach, reach) << _REACH_SHIFT


INNOCENT: Final = Trial()


def trial_of(suspicion: Suspicion | None) -> Trial:
    """What another rank knew."""
    if suspicion is None:
        return INNOCENT
    return Trial(suspicion.failures, suspicion.failures_alone, suspicion.reach)


def after_death(mark: int, num_tokens: int) -> Trial:
    """What is known of a row's request with so many tokens, now that the process which wrote this mark is dead."""
    failures, failures_alone = mark >> _FAILURES_SHIFT & _COUNT_MASK, mark >> _ALONE_SHIFT & _COUNT_MASK
    trial = Trial(failures, failures_alone, min(num_tokens, mark >> _REACH_SHIFT))
    state = mark & _STATE_MASK
    if state == LEFT_OUT:
        return trial.voided()
    return trial if state == NOTHING else trial.failed(trial.reach or num_tokens, is_alone=state == COMPUTED_ALONE)
