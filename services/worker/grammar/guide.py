"""Where one sequence's output stands in its grammar."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elasticmoe.common.grammar import Bits, GrammarMatcher, GrammarState


class Guide:
    """Of one sequence, whose it is. Nothing of it outlives the process: it is made anew of the grammar and the tokens.

    `ends`: ids that end the sequence where the grammar accepts. `opening`: its matcher is being made. `pending`: its
    matcher is being brought up to the sequence's tokens. `num_tokens`: of the output, that the matcher has, or is
    about to have. `state`: what may follow on those; only where nothing is pending.
    """

    __slots__ = ("ends", "matcher", "num_tokens", "opening", "pending", "state")

    def __init__(self, opening: Future[GrammarMatcher], num_tokens: int, ends: tuple[int, ...]) -> None:
        self.opening: Future[GrammarMatcher] | None = opening
        self.matcher: GrammarMatcher | None = None
        self.ends = ends
        self.pending: Future[None] | None = None
        self.num_tokens = num_tokens
        self.state: GrammarState | None = None

    def take(self, state: GrammarState) -> None:
        """What may follow now. Called in a thread of its own, while `pending`."""
        if state.is_accepting and not state.is_over:
            for token_id in self.ends:
                state.allowed[token_id >> 3] |= 1 << (token_id & 7)
        self.state = state

    @property
    def allowed(self) -> Bits | None:
        """The tokens that may come next."""
        return None if self.state is None else self.state.allowed
