"""Ranks that step together without processes: the product's engines, steps and adoption over a real bus, each in a
thread while a step runs. What is played: the meeting, an HMM that ends the generation where a connection ends, deaths,
and a router that submits anew what was lost."""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Delta, Failed, Logprob, Suspected
from elasticmoe.services.worker.engine.adoption import adopt_rows
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.rank.steps import Steps
from tests.unit.migration_world import MAX_MODEL_LEN, MAX_SEQUENCES, make_ledger
from tests.unit.ranks import Ranks

PEER = b"router:1"
STEP_MS = 5_000.0
STEPS_MAX = 600


class Killed(BaseException):
    """Ends a rank where a kill would: nothing of it runs after that."""


class PlayedLockstep:
    """What a rank's steps need of the lockstep."""

    def __init__(self) -> None:
        self.has_turn = True
        self.is_everybodys = True
        self.num_aborts = 0
        self.num_shortages = 0
        self.short: dict[int, int] = {}  # tokens of the step, by slot
        self._num_clean = 0

    @property
    def num_clean(self) -> int:
        """See Lockstep."""
        return self._num_clean if self.is_everybodys else 0

    def note_done(self) -> None:
        """See Lockstep."""
        self._num_clean += self.is_everybodys

    def note_failed(self) -> None:
        """See Lockstep."""
        self._num_clean = 0

    def tell_shortage(self) -> None:
        """See Lockstep."""
        self.num_shortages += 1

    def shortages(self) -> dict[int, int]:
        """See Lockstep."""
        return self.short

    def abort(self) -> None:
        """See Lockstep."""
        self.num_aborts += 1


class CrewRank:
    """One seat: its rank of the moment, and what the router has heard of it."""

    def __init__(self, crew: Crew, number: int, sequences_max: int, tokens_max: int) -> None:
        self._crew = crew
        self._number = number
        self._sequences_max = sequences_max
        self._tokens_max = tokens_max
        self._ledger, self._memory = make_ledger(sequences_max=sequences_max)
        self._submits: dict[str, Submit] = {}
        self.given_up: set[str] = set()
        self.plan = StepPlan([], [], [])  # the last one
        self.num_deaths = 0
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}
        self.logprobs: dict[str, list[Logprob]] = {}
        self.noted: dict[str, tuple[Logprob, ...]] = {}  # log probabilities of prompts
        self.suspected: list[Suspected] = []
        self._seat()

    def _seat(self) -> None:
        ranks, number = self._crew.ranks, self._number
        self.engine = Engine(
            ranks.models[number],
            ranks.exchanges[number],
            ranks.weights[number].kv,
            self._ledger,
            max_tokens=self._tokens_max,
            max_sequences=self._sequences_max,
            max_model_len=MAX_MODEL_LEN,
        )
        self.lockstep = PlayedLockstep()
        exchange: Any = ranks.exchanges[number]
        lockstep: Any = self.lockstep
        self.steps = Steps(self.engine, exchange, lockstep, self._crew.hmm(number), self.hear)

    def die(self) -> None:
        """It is dead; another takes its seat."""
        self.num_deaths += 1
        self._seat()
        self.hear(adopt_rows(self.engine, self._crew.ranks.spec.vocab))
        for name, request in self._submits.items():  # that waited: the router submits them anew
            is_over = name in self.finish or name in self.failed or name in self.given_up
            if not is_over and self.engine.scheduler.get(PEER, name) is None:
                self.engine.add(msgspec.structs.replace(request, output=tuple(self.tokens[name])), PEER, 0.0)
        assert self.engine.check_integrity() == []

    def submit(self, name: str, prompt: list[int], max_tokens: int, sampling: Sampling, **fields: Any) -> None:
        """A request of the router."""
        self.take(Submit(name, tuple(prompt), max_tokens, sampling, **fields))

    def take(self, request: Submit) -> None:
        """See `submit`."""
        self._submits[request.request_id] = request
        self.engine.add(request, PEER, 0.0)
        self.tokens.setdefault(request.request_id, [])

    def forget_all(self) -> None:
        """Of what has ended."""
        for known in (self._submits, self.tokens, self.finish, self.failed, self.logprobs, self.noted):
            known.clear()  # type: ignore[attr-defined]

    def hear(self, outcome: Outcome) -> None:
        """What a router does with it."""
        self.suspected += [suspected for _, suspected in outcome.suspected]
        for delta in outcome.deltas.get(PEER, []):
            self._take(delta)
        for _, failed in outcome.failures:
            assert failed.request_id not in self.failed
            self.failed[failed.request_id] = failed

    def _take(self, delta: Delta) -> None:
        name = delta.request_id
        tokens = self.tokens[name]
        assert delta.index <= len(tokens)
        known = tokens[delta.index :]
        assert list(delta.ids[: len(known)]) == known
        tokens += delta.ids[len(known) :]
        if delta.finish:
            assert name not in self.finish
            self.finish[name] = delta.finish
        self.logprobs.setdefault(name, []).extend(delta.logprobs or ())
        if delta.prompt_logprobs is not None:
            self.noted[name] = delta.prompt_logprobs


class _Connection:
    """A rank's connection to the HMM."""

    is_connected = True

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def close(self) -> None:
        """The HMM sees its end."""
        self._crew.end_generation()


class Crew:
    """`ranks.models` in lockstep. `num_ended`: generations that were ended. `are_mortal`: a rank whose step raises dies
    of it, as its process does; else the test fails."""

    def __init__(
        self, ranks: Ranks, *, sequences_max: int = MAX_SEQUENCES, tokens_max: int = 16, are_mortal: bool = False
    ) -> None:
        self.ranks = ranks
        self._are_mortal = are_mortal
        self.num_ended = 0
        self.num_steps = 0
        self.members = [CrewRank(self, number, sequences_max, tokens_max) for number in range(len(ranks.models))]
        self._lock = threading.Lock()
        self._is_over = False

    def hmm(self, number: int) -> Any:
        """A rank's connection to it."""
        del number
        return _Connection(self)

    def end_generation(self) -> None:
        """Whoever waits in a step is let go."""
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self.num_ended += 1
                self.ranks._generation += 1
                self.ranks._observer.set_membership(self.ranks._generation, (1 << len(self.members)) - 1, False)

    def run(self, steps_max: int = STEPS_MAX) -> None:
        """Until nobody has a request."""
        for _ in range(steps_max):
            if not any(member.engine.scheduler.sequences() for member in self.members):
                return
            self.step()
        raise AssertionError("the requests do not end")

    def step(self) -> None:
        """One meeting, and the step that follows."""
        plans = [member.steps.plan(num_clean=member.lockstep.num_clean) for member in self.members]
        for member, plan in zip(self.members, plans, strict=True):
            member.plan = plan
        alone = next((number for number, plan in enumerate(plans) if plan.is_alone), None)
        for number, member in enumerate(self.members):
            member.lockstep.is_everybodys, member.lockstep.has_turn = alone is None, alone in (None, number)
        total = plans[alone].num_tokens if alone is not None else sum(plan.num_said for plan in plans)
        if not total:
            return
        self.num_steps += 1
        self._compute(plans, total)
        if self._is_over:
            self._is_over = False
            self.ranks.new_generation()
            for member in self.members:
                member.lockstep.note_failed()
        for member in self.members:
            assert member.engine.check_integrity() == []

    def _compute(self, plans: list[StepPlan], total: int) -> None:
        ends: list[BaseException | None] = [None] * len(plans)

        def step(number: int) -> None:
            try:
                self.members[number].steps.run(plans[number], total, STEP_MS)
            except BaseException as end:
                ends[number] = end
                self.end_generation()  # the HMM sees its connection end

        threads = [threading.Thread(target=step, args=(number,)) for number in range(len(plans))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, end in enumerate(ends):
            if isinstance(end, Killed) or (self._are_mortal and isinstance(end, Exception)):
                self.members[number].die()
            elif end is not None:
                raise AssertionError(f"rank {number} ended, or waited in vain: {end!r}") from end
