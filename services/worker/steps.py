"""A step that finds no memory: it is given up and planned again, and if that does not help, without the request that
needs most. The rank lives on, and nothing of such a step was committed.

A rank that fails in the midst of an exchange must not let the others wait for it. Only the HMM can end a generation of
the bus, and it does when a rank's connection ends: so the rank ends it, steps no more in that generation, and
introduces itself again (hmm_link.py), as after the HMM's own restart. The others discard the step, as at a death.
"""

from __future__ import annotations

from typing import Final

from common.protocol.errors import ElasticMoEError, Unavailable
from common.telemetry import get_logger
from services.worker.engine.engine import Engine, Outcome
from services.worker.engine.failure import OUT_OF_MEMORY, is_shortage
from services.worker.engine.scheduler import Chunk, Plan
from services.worker.exchange.shm import ShmExchange
from services.worker.hmm_link import HmmLink
from services.worker.lockstep import Lockstep

log = get_logger("rank")

GIVEN_UP_MAX: Final = 8  # steps in a row without a request of one's own to do without: others' tokens find no room here


class Shortage:
    """Computes steps for the rank. Owned by its thread; all that it is made of stays the rank's."""

    def __init__(self, engine: Engine, exchange: ShmExchange, lockstep: Lockstep, hmm: HmmLink) -> None:
        self._engine = engine
        self._exchange = exchange
        self._lockstep = lockstep
        self._hmm = hmm
        self._num_given_up = 0  # in a row, but for steps that left prompts out

    def compute(self, plan: Plan, total_tokens: int, deadline_ms: float) -> Outcome:
        """`Engine.compute`; where it finds no memory, the requests that failed of it, if any: the others' work is
        planned again. Raises as it does, and what it raised where this rank cannot go on."""
        try:
            outcome = self._engine.compute(plan, total_tokens, deadline_ms)
        except (MemoryError, RuntimeError, ElasticMoEError) as error:
            if not is_shortage(error):
                raise
            return self._give_up(plan, error)
        # A step that left prompts out says nothing of one that was given up: they would be tried again for ever.
        if not plan.is_decode_only:
            self._num_given_up = 0
        return outcome

    def _give_up(self, plan: Plan, error: Exception) -> Outcome:
        self._num_given_up += 1
        is_awaited = self._exchange.is_awaited
        log.error(
            "a step found no memory",
            because=f"{type(error).__name__}: {str(error)[:200]}",
            tokens=plan.num_tokens,
            in_a_row=self._num_given_up,
            others_wait=is_awaited,
        )
        if is_awaited and not self._hmm.is_connected:
            raise error  # nobody can stop the others but this process's end
        if self._num_given_up > GIVEN_UP_MAX and not plan.chunks:
            raise error
        if is_awaited:
            self._lockstep.abort()
            self._hmm.close()
        failures = []
        if self._num_given_up > 1 and plan.chunks:
            text = "the rank has no memory to compute this request's next step"
            largest = max(plan.chunks, key=_size)
            failures.append(self._engine.fail(largest.sequence, Unavailable(text, code=OUT_OF_MEMORY)))
        return Outcome({}, failures)


def _size(chunk: Chunk) -> tuple[int, int, int]:
    """Logits of whole prompts first, then tokens; of equals the youngest."""
    sequence = chunk.sequence
    return chunk.num_tokens if sequence.wants_prompt_logprobs else 0, chunk.num_tokens, sequence.arrival
