"""How many tokens a step computes: so many that prompts get their first tokens soon, and so few that running streams
bear it. Results do not depend on it (ADR 8).

A step takes F + b n seconds: F for what each one does (weights are read), b for each of the n tokens of all replicas,
which step together. Of k prompts of L tokens that wait, m in each step, the first tokens come after
(k F / m + k b L + F + b m L) / 2 seconds in the mean. That is least where m L = sqrt(Q F / b), Q = k L being all that
waits: many prompts want large steps, in which weights are read less often; few want small ones, whose ends are soon.
One prompt alone never gains by being cut.

A running stream gets one token a step, so what prompts add to a step is what it waits longer. What steps take is
learned, and may be wrong: beside streams no step is more than twice as large as one that is known. Nor does any step
take so long that its rank, which tells nothing meanwhile, is taken for lost.

Steps that others wait for take no prompts (ADR 14). Behind them all replicas have prompts at once, and each takes its
part of what one alone would take, for a while, as long as some of those that were put off are left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from math import ceil, sqrt
from typing import Final

from elasticmoe.services.worker.engine.sequence import Sequence

LEAST_TOKENS: Final = 128  # a step may have so many in any case
BEARABLE_S: Final = 0.5  # a step with more lasts no longer while streams run, as far as is known
LONGEST_S: Final = 2.0  # nor while none do: routers doubt a rank that has been silent for 2.5 s
FIXED_TOKENS: Final = 64.0  # F / b until both are known
FIRST_TOKENS: Final = 1024  # of prompts in a step until then, where no streams run
TELLING_TOKENS: Final = 64  # of prompts: a step with so many says something of b
SHARE_OF_LOWER: Final = 1 / 2  # of the last step in what is known, where it took less than that
SHARE_OF_HIGHER: Final = 1 / 16  # where it took more: it may have waited for something


class StepBudget:
    """Owned by the scheduler; a function of what it was told. `tokens_max`: of any step. `is_catching_up`: whether all
    replicas may have prompts that were put off. `put_off`: of this one's prompts, those that were and still wait, by
    their arrival."""

    def __init__(self, tokens_max: int) -> None:
        self._limit = self._prompt_max = tokens_max
        self._num_replicas = 1
        self.is_catching_up = False
        self.put_off: set[int] = set()
        self.begin(1)

    def begin(self, num_replicas: int) -> None:
        """So many step together from now on: what was known of steps says nothing of the next ones. That large ones
        find no memory stays known while there are as many."""
        if max(1, num_replicas) != self._num_replicas:  # else what found no memory would be tried again for ever
            self._prompt_max = self._limit
        self._num_replicas = max(1, num_replicas)
        self._fixed_s: float | None = None
        self._token_s: float | None = None
        self._largest = 0  # step that is known
        self._plain = 0  # tokens of the last step without prompts
        self._last_s = 0.0  # that the last step took
        self._are_others = False  # in the last step

    def note_prompts(
        self,
        running: Iterable[Sequence],
        waiting: Iterable[Sequence],
        without: Collection[Sequence],
        *,
        are_left_out: bool,
    ) -> bool:
        """What the next step could compute of prompts: those of `running` and `waiting` but not of `without`. Returns
        whether it puts some off, because they are left out for its sake."""
        if not (are_left_out or self.put_off):
            return False
        prompts = [s for s in running if len(s.tokens) - s.kv_len > 1]
        arrivals = {s.arrival for s in (*prompts, *waiting) if s not in without}
        if are_left_out:
            self.put_off |= arrivals
            return bool(arrivals)
        self.put_off = self.put_off & arrivals if self.is_catching_up else set()
        return False

    @property
    def is_fixed(self) -> bool:
        """Whether each step has the same."""
        return self._limit <= LEAST_TOKENS and not self.divides

    @property
    def divides(self) -> bool:
        """Whether replicas divide what one may take."""
        return self.is_catching_up and self._num_replicas > 1 and bool(self.put_off)

    def note(self, num_prompt: int, num_tokens: int, total_tokens: int, seconds: float) -> None:
        """A step took `seconds`, with `total_tokens` of all replicas, of these `num_tokens` of this one, of these
        `num_prompt` of prompts."""
        self._are_others = total_tokens > num_tokens
        self._largest = max(self._largest, total_tokens)
        self._last_s = seconds
        # Another replica that brings about as many as this one, which brings no prompts, has none either.
        others = total_tokens - num_tokens
        is_plain = total_tokens < TELLING_TOKENS or others <= (self._num_replicas - 1) * num_tokens
        if num_prompt == 0 and is_plain:
            self._fixed_s, self._plain = _moved(self._fixed_s, seconds), total_tokens
        elif num_prompt >= TELLING_TOKENS and self._fixed_s is not None and seconds > self._fixed_s:
            more = max(num_prompt, total_tokens - self._plain)
            self._token_s = _moved(self._token_s, (seconds - self._fixed_s) / more)

    def shrink(self, num_prompt: int) -> bool:
        """A step with so many tokens of prompts found no memory: steps have half of them at most from now on. False
        where it had no more than each may have."""
        if num_prompt <= LEAST_TOKENS:
            return False
        self._prompt_max = max(LEAST_TOKENS, num_prompt // 2)
        return True

    def tokens(self, prompts: Seq[float], num_decoding: int) -> int:
        """Tokens of the next step. `prompts`: those left of each, in their order; each of `num_decoding` streams is to
        get one besides."""
        if self.is_fixed or not prompts:
            return self._limit
        ratio, bearable, longest = FIXED_TOKENS, 0.0, float(FIRST_TOKENS)
        if self._last_s < LONGEST_S / 2:  # some loads have no steps without prompts
            longest = max(longest, 2.0 * self._largest)
        if self._fixed_s is not None and self._token_s is not None:
            ratio, bearable = self._fixed_s / self._token_s, max(0.0, BEARABLE_S - self._fixed_s) / self._token_s
            longest = max(0.0, LONGEST_S - self._fixed_s) / self._token_s
        replicas = self._num_replicas if self._are_others else 1
        wanted = min(max(prompts[0], sqrt(sum(prompts) * ratio / replicas)), longest / replicas)
        if num_decoding or self._are_others:
            wanted = min(wanted, min(bearable, 2.0 * self._largest) / replicas)
        of_prompts = min(self._prompt_max, ceil(max(wanted, LEAST_TOKENS)))
        if self.divides:
            of_prompts = min(of_prompts, max(1, min(self._limit, LEAST_TOKENS) // self._num_replicas))
        return min(self._limit, of_prompts + num_decoding)


def _moved(known: float | None, last: float) -> float:
    if known is None:
        return last
    return known + (last - known) * (SHARE_OF_LOWER if last < known else SHARE_OF_HIGHER)
