"""Requests that make the step fail in which a certain position of theirs is computed: promise P25."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from elasticmoe.services.worker.engine.plan import StepPlan

if TYPE_CHECKING:
    from tests.sim.world import World

STRIKES_MAX = 12  # four where nothing else fails; what fails beside it voids what was seen


class Poison(NamedTuple):
    """`kind`: the rank `dies`, or its step `raises`. `is_foreign`: not its own rank, but one that has its experts."""

    kind: str
    position: int
    is_foreign: bool


class Poisons:
    """Which requests of a seed are bad, and what they did. Drawn apart, so that a seed's other events stay the same."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self.rng = random.Random(f"poison {seed}")
        self.by_name: dict[str, Poison] = {}
        self.num_strikes: dict[str, int] = {}
        self.is_in_seed = self.rng.random() < 0.3

    def draw(self, name: str, num_prompt: int, num_tokens: int) -> None:
        """One request in some is bad."""
        if self.is_in_seed and self.rng.random() < 0.15:
            first = num_prompt - 1  # what comes before it may be in the prefix cache, and is not computed then
            position = self.rng.choice((first, num_prompt, self.rng.randrange(first, first + num_tokens)))
            self.by_name[name] = Poison(self.rng.choice(("dies", "raises")), position, self.rng.random() < 0.3)

    def strikes(self, plans: list[StepPlan]) -> tuple[int, str] | None:
        """Which of the ranks with these plans fails in this step, by number, and how."""
        for number, plan in enumerate(plans):
            for chunk in plan.chunks:
                name = chunk.sequence.request.request_id.partition("~")[0]
                poison = self.by_name.get(name)
                if poison is None or not chunk.start <= poison.position < chunk.start + chunk.num_tokens:
                    continue
                self.num_strikes[name] = self.num_strikes.get(name, 0) + 1
                self._world.sim.note(f"{name}: a rank {poison.kind} of it")
                text = f"{name} made {self.num_strikes[name]} steps fail"
                self._world.expect(self.num_strikes[name] <= STRIKES_MAX, text)
                others = [other for other in range(len(plans)) if other != number] if poison.is_foreign else []
                return (self.rng.choice(others) if others else number), poison.kind
        return None

    def check_end(self, name: str, kind: str, reason: str) -> None:
        """Only a bad request ends for what it did, and it does not get past that."""
        is_bad = name in self.by_name
        self._world.expect(is_bad or reason != "request_failed", f"{name} ended for what it did not do")
        self._world.expect(not is_bad or kind != "finish", f"{name} got past where it makes steps fail")
