"""One request while a rank works on it, and the place that is kept for one that comes from another rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from elasticmoe.common.protocol.rank import Submit
from elasticmoe.services.worker.engine.trial import trial_of

if TYPE_CHECKING:
    from elasticmoe.common.grammar import Bits
    from elasticmoe.services.worker.grammar.guide import Guide

HEAD_START_S = 60.0

RequestKey = tuple[bytes, str]
"""Router and request id: names a sequence in the whole deployment."""


def head_start_s(priority: int) -> float:
    """Seconds by which a request of that priority counts as if it had come later; earlier where it is negative. Grows
    with the priority, the faster the nearer to 0 (1: 5 s, 10: 30 s), and stays below HEAD_START_S: that is how long a
    more urgent one that comes later goes before one of priority 0, and twice that before the least urgent."""
    return HEAD_START_S * priority / (abs(priority) + 10)


class Sequence:
    """A request's tokens and KV. Owned by the scheduler; only the rank's loop thread touches it.

    `tokens`: prompt and output so far. `kv_len`: how many of them have their KV written (the committed position).
    `blocks`: KV block ids by position. `row`: its ledger row while it runs, -1 while it waits.
    `num_sent`: output tokens that were reported to the router. `stops` counts how often it lost its KV, `relocations`
    how often blocks of it were moved. `trial`: what is known of its steps that failed (the scheduler's to change).
    `guide`: where its output stands in its grammar; None without one, and until one is made.
    `request` is without `output`, which `tokens` has, and without `suspicion`, which `trial` has.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached",
        "deadline",
        "guide",
        "kv_len",
        "kv_len_max",
        "logged",
        "num_sent",
        "peer",
        "relocations",
        "request",
        "row",
        "stops",
        "tokens",
        "trial",
    )

    def __init__(self, request: Submit, peer: bytes, arrival: int, deadline: float) -> None:
        is_bare = not request.output and request.suspicion is None
        self.request = request if is_bare else msgspec.structs.replace(request, output=(), suspicion=None)
        self.peer = peer
        self.arrival = arrival
        self.deadline = deadline
        self.tokens: list[int] = [*request.prompt, *request.output]
        self.trial = trial_of(request.suspicion)
        self.kv_len = 0
        # The most it has been: what is computed below it is computed again.
        self.kv_len_max = len(self.tokens) - 1 if request.output else 0
        self.blocks: list[int] = []
        self.row = -1
        self.cached = 0  # leading blocks that are registered in the prefix cache
        self.logged = 0  # leading blocks that its ledger row names
        self.num_sent = len(request.output)
        self.stops = 0
        self.relocations = 0
        self.guide: Guide | None = None

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def allowed(self) -> Bits | None:
        """The tokens that its grammar lets come next; None without one."""
        return None if self.guide is None else self.guide.allowed

    @property
    def is_suspect(self) -> bool:
        """Whether it may only be computed alone (trial.py)."""
        is_decoding = self.kv_len >= len(self.request.prompt) and len(self.tokens) - self.kv_len == 1
        return self.trial.is_suspect(in_prompt=not is_decoding)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every row of the prompt is still needed: it must be computed, not taken from the prefix cache."""
        return self.request.prompt_logprobs and self.num_output == 0

    @property
    def order(self) -> tuple[bool, float, int]:
        """Sort key: lower runs first and is preempted last. Those that ran elsewhere before come first of all.

        A priority is worth time, and a bounded one: whoever waits grows older and overtakes in the end. Since all grow
        older alike, two sequences never change places, and the key needs no clock. Their age is that of their deadline,
        which goes along when they move; routers give all requests the same time.
        """
        return (self.arrival >= 0, self.deadline + head_start_s(self.request.priority), self.arrival)

    def finish_reason(self, max_model_len: int) -> str | None:
        """`stop` when the last token ends the sequence, `length` at a limit, else None."""
        if self.num_output == 0:
            return None
        if self.tokens[-1] in self.request.stop_token_ids and self.num_output > self.request.min_tokens:
            return "stop"
        if self.num_output >= self.request.max_tokens or len(self.tokens) >= max_model_len:
            return "length"
        return None


class BlockHold:
    """What is kept for a sequence with the beginning `tokens` that another rank hands over. Owned by the scheduler.

    `blocks`: by position; the first `num_cached` hold its KV already and are shared. `row`: a ledger row that is not
    open yet; -1 when it comes without KV, and then without blocks.
    """

    __slots__ = ("blocks", "num_cached", "row", "tokens")

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.blocks: list[int] = []
        self.num_cached = 0
        self.row = -1
