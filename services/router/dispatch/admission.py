"""Permits: how many generations and how many bytes of bodies and answers the router holds at once. Tried before any
work: a request is priced by what its answer may become, since bounded factors (prompts, choices, tokens, log
probabilities) make a product that is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from elasticmoe.common.protocol.errors import InvalidRequest, Overloaded
from elasticmoe.common.wording import counted

# Bytes of an answer per token, about: its text, and its log probabilities with each alternative: of the output while
# they wait for a reader, of the prompt as JSON.
TEXT_BYTES = 8
OUTPUT_LOGPROB_BYTES = 128
CHOICE_BYTES = 4_096  # of one that has ended, beside its text
PROMPT_LOGPROB_BYTES = 64
PROMPT_BYTES = 48  # of a prompt's token that is submitted once more, for another choice
PROMPT_LOGPROBS_MAX = 131_072  # of one prompt, alternatives counted: a rank tells them in one message


def _served(number: int) -> str:
    return f"{counted(number, 'request')} {'is' if number == 1 else 'are'} being served"


class Permits:
    """A bounded number of permits, one per running generation (a choice of an answer). For one asyncio loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_held = 0

    def check(self) -> None:
        """Raises Overloaded when none is free: the cheap refusal, before a body is read."""
        if self.num_held >= self.most:
            raise Overloaded(f"{_served(self.num_held)}; the limit is {self.most}")

    def acquire(self) -> Permit:
        """Take one. Raises Overloaded when none is free; never waits."""
        self.check()
        self.num_held += 1
        return Permit(self)


class Permit:
    """What one HTTP request holds. A context manager: its end gives everything back."""

    def __init__(self, permits: Permits) -> None:
        self._permits = permits
        self._count = 1
        self._held: list[tuple[ByteBudget, int]] = []

    def hold(self, budget: ByteBudget, nbytes: int) -> None:
        """Hold bytes of a budget too. Raises Overloaded when they are not free now."""
        budget.take(nbytes)
        self._held.append((budget, nbytes))

    def end_one(self, budget: ByteBudget, num_tokens: int) -> None:
        """One generation has ended: what it told waits for its reader, and holds bytes of the budget instead of a
        permit; where the budget has none, the permit, as before. Of no effect after `release`."""
        if self._count == 0:
            return
        try:
            self.hold(budget, CHOICE_BYTES + num_tokens * TEXT_BYTES)
        except Overloaded:
            return
        self._count -= 1
        self._permits.num_held -= 1

    def widen(self, count: int) -> None:
        """Hold `count` permits instead of one, all or nothing.

        Raises Overloaded when they are not free now, InvalidRequest when they never can be.
        """
        permits, extra = self._permits, count - self._count
        if count > permits.most:
            raise InvalidRequest(f"{count} choices in one request exceed the limit of {permits.most}", param="n")
        if permits.num_held + extra > permits.most:
            raise Overloaded(
                f"{_served(permits.num_held)} and {extra} more {'is' if extra == 1 else 'are'} asked for; "
                f"the limit is {permits.most}"
            )
        permits.num_held += extra
        self._count = count

    def release(self) -> None:
        """Give back. Idempotent."""
        self._permits.num_held -= self._count
        self._count = 0
        for budget, nbytes in self._held:
            budget.give(nbytes)
        self._held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ByteBudget:
    """Bytes that are in memory at once, over all connections. `what`: whose, for the error."""

    def __init__(self, most: int, what: str = "request bodies") -> None:
        self.most = most
        self.num_held = 0
        self._what = what

    def take(self, nbytes: int) -> None:
        """Raises Overloaded beyond the budget; then nothing was taken."""
        if self.num_held + nbytes > self.most:
            raise Overloaded(
                f"{self._what} hold {self.num_held} bytes and {nbytes} more are asked for; the limit is {self.most}"
            )
        self.num_held += nbytes

    def give(self, nbytes: int) -> None:
        """Give back what was taken."""
        self.num_held -= nbytes


class Price(NamedTuple):
    """What a request may take, in bytes: all of it (what each choice repeats of its prompt, and the answer), and the
    part of the answer that has to be held beyond its plain text."""

    total: int
    held: int


def price(
    num_prompt: Sequence[int], num_output: Sequence[int], *, num_choices: int, num_logprobs: int, is_echo: bool
) -> Price:
    """The price of `num_choices` answers to each prompt of `num_prompt` tokens, with up to `num_output` tokens each.
    `num_logprobs`: alternatives per token; -1: no log probabilities."""
    alternatives = num_logprobs + 1
    prompts, outputs = sum(num_prompt), sum(num_output)
    per_output = OUTPUT_LOGPROB_BYTES * alternatives
    per_prompt = TEXT_BYTES + PROMPT_LOGPROB_BYTES * alternatives
    held = num_choices * (outputs * per_output + (prompts * per_prompt if is_echo else 0))
    submitted = (num_choices - 1) * prompts * PROMPT_BYTES
    return Price(submitted + num_choices * outputs * TEXT_BYTES + held, held)


def check_price(
    num_prompt: Sequence[int], cost: Price, most: int, *, num_choices: int, num_logprobs: int, is_echo: bool
) -> None:
    """Raises InvalidRequest for an answer of more than `most` bytes, or a prompt with more log probabilities than fit
    into a message."""
    longest = max(num_prompt)
    if is_echo and longest * (num_logprobs + 1) > PROMPT_LOGPROBS_MAX:
        raise InvalidRequest(
            f"a prompt of {longest} tokens with {num_logprobs + 1} log probabilities each exceeds the limit of "
            f"{PROMPT_LOGPROBS_MAX} of one prompt",
            code="answer_too_large",
            param="logprobs",
        )
    if cost.total > most:
        raise InvalidRequest(
            f"the request may take {cost.total} bytes ({len(num_prompt)} prompts, {num_choices} choices of each, "
            f"{max(0, num_logprobs)} alternatives to each token); the limit is {most}: ask for less, or set max_tokens",
            code="answer_too_large",
            param="logprobs" if num_logprobs >= 0 else "n" if num_choices > 1 else "max_tokens",
        )
