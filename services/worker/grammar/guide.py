"""Where one sequence's output stands in its grammar."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from elasticmoe.common.protocol.errors import RequestFailed

if TYPE_CHECKING:
    from elasticmoe.common.grammar import Bits, GrammarMatcher, GrammarState

TIME_S: Final = 2.0  # of CPU, that what may follow takes for one output
TOKEN_TIME_S: Final = 0.001  # and for each token of it


class Guide:
    """Of one sequence, whose it is. Nothing of it outlives the process: it is made anew of the grammar and the tokens.

    `ends`: ids that end the sequence where the grammar accepts. `opening`: its matcher is being made. `pending`: its
    matcher is being brought up to the sequence's tokens. `num_tokens`: of the output, that the matcher has, or is
    about to have. `state`: what may follow on those; only where nothing is pending. `spent_s`: of CPU, for all that
    may follow; `slowest_s`: the most for one token but the first.
    """

    __slots__ = ("ends", "matcher", "num_tokens", "opening", "pending", "slowest_s", "spent_s", "state")

    def __init__(self, opening: Future[GrammarMatcher], num_tokens: int, ends: tuple[int, ...]) -> None:
        self.opening: Future[GrammarMatcher] | None = opening
        self.matcher: GrammarMatcher | None = None
        self.ends = ends
        self.pending: Future[None] | None = None
        self.num_tokens = num_tokens
        self.state: GrammarState | None = None
        self.spent_s = 0.0
        self.slowest_s = 0.0

    def close(self) -> None:
        """The sequence has ended: nothing is begun for it any more."""
        for future in (self.opening, self.pending):
            if future is not None:
                future.cancel()

    def check_time(self) -> None:
        """Raises RequestFailed where its grammar has taken more time than it may."""
        most = TIME_S + TOKEN_TIME_S * self.num_tokens
        if self.spent_s > most:
            text = f"the grammar took {self.spent_s:.1f} s of CPU for {self.num_tokens} tokens; the limit is {most:.1f}"
            raise RequestFailed(text, code="grammar_failed")

    def take(self, state: GrammarState, spent_s: float, *, is_first: bool) -> None:
        """What may follow now, and the CPU time that it took. Called in a thread of its own, while `pending`."""
        self.spent_s += spent_s
        self.slowest_s = self.slowest_s if is_first else max(self.slowest_s, spent_s)
        if state.is_accepting and not state.is_over:
            for token_id in self.ends:
                state.allowed[token_id >> 3] |= 1 << (token_id & 7)
        self.state = state

    @property
    def allowed(self) -> Bits | None:
        """The tokens that may come next."""
        return None if self.state is None else self.state.allowed
