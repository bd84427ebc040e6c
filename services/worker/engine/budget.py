"""How many tokens a step computes: so many that prompts get their first tokens soon, and so few that running streams
bear it. Results do not depend on it (ADR 8).

A step takes F + b n seconds: F for what each one does (weights are read), b for each of n tokens. Of k prompts of L
tokens that wait, m in each step, the first tokens come after (k F / m + k b L + F + b m L) / 2 seconds in the mean.
That is least where m L = sqrt(Q F / b), Q = k L being all that waits: many prompts want large steps, in which weights
are read less often; few want small ones, whose ends are soon. One prompt alone never gains by being cut.

A running stream gets one token a step, so what prompts add to a step is what it waits longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Final

LEAST_TOKENS: Final = 128  # a step may have so many in any case
BEARABLE_S: Final = 0.5  # a step with more lasts no longer while streams run
FIXED_TOKENS: Final = 64.0  # F / b until both are known
SHARE_OF_LAST: Final = 1 / 8  # of the last step in what is known of steps
TELLING_TOKENS: Final = 64  # a prompt's part of a step that says something of b


class StepBudget:
    """Owned by the scheduler; a function of what it was told. `tokens_max`: of any step."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._fixed_s: float | None = None
        self._token_s: float | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all steps have the same."""
        return self._tokens_max <= LEAST_TOKENS

    def note(self, num_prompt: int, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens`, `num_prompt` of them of prompts, took `seconds`."""
        if num_tokens and not num_prompt:
            self._fixed_s = _moved(self._fixed_s, seconds)
        elif num_prompt >= TELLING_TOKENS and self._fixed_s is not None:
            self._token_s = _moved(self._token_s, max(seconds - self._fixed_s, 0.0) / num_prompt)

    def tokens(self, prompts: Sequence[int], num_decoding: int) -> int:
        """Tokens of the next step. `prompts`: those left of each, in their order; each of `num_decoding` streams is to
        get one besides."""
        if self.is_fixed or not prompts:
            return self._tokens_max
        fixed, token = self._fixed_s, self._token_s
        ratio = FIXED_TOKENS if fixed is None or token is None else fixed / max(token, 1e-9)
        wanted = float(max(prompts[0], sqrt(sum(prompts) * ratio)))
        if num_decoding:
            bearable = 0.0 if fixed is None or token is None else (BEARABLE_S - fixed) / max(token, 1e-9)
            wanted = min(wanted, bearable)
        wanted = min(max(wanted, LEAST_TOKENS), self._tokens_max)  # finite from here on
        return max(LEAST_TOKENS, min(ceil(wanted) + num_decoding, self._tokens_max))


def _moved(known: float | None, last: float) -> float:
    return last if known is None else known + (last - known) * SHARE_OF_LAST
