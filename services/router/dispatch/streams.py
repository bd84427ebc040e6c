"""One accepted generation: its tokens in order and once each, its text, and its one end.

A Stream knows nothing of sockets. The dispatcher feeds it what ranks say; the HTTP side takes text out of it. Tokens
are counted by index, so it does not matter who produced them or how often they come: what is known is dropped, what
comes too early waits for what is missing. Its end is decided here and once: `end` is idempotent, the first call wins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.errors import ElasticMoEError, ProtocolError
from elasticmoe.common.protocol.limits import VOCAB_MAX
from elasticmoe.common.protocol.rank import Submit
from elasticmoe.common.protocol.router import Delta, Logprob, Suspicion
from elasticmoe.services.router.dispatch.absence import Absence
from elasticmoe.services.router.dispatch.trail import Trail
from elasticmoe.services.router.text.detokenizer import TextStream

FINISH_REASONS = ("stop", "length")


class Ending(NamedTuple):
    """How a generation ended: `finish` with a finish reason, `error` with an error, or `cancelled` by its client."""

    kind: str
    reason: str
    error: ElasticMoEError | None = None


class TokenInfo(NamedTuple):
    """A token with its log probabilities. `text_offset`: characters of the output before it."""

    token_id: int
    logprob: Logprob
    text_offset: int


class Output(NamedTuple):
    """What became available since the last `take`. `tokens` only where log probabilities are asked for."""

    text: str
    tokens: list[TokenInfo]


class Stream:
    """One generation, from acceptance to its end. For one asyncio loop.

    `name` identifies it in records; `submit.request_id` identifies it to the ranks and changes when it is submitted
    anew, with the `tokens` that have come. `wake` is set whenever the HTTP side has something to look at; several
    streams may share it. Times are seconds of the monotonic clock. `rank` and `sender` tell who works on it: a rank, in
    which incarnation. `is_prompt_only`: nothing but the prompt's log probabilities is wanted; the token that the rank
    chooses behind it does not count.
    """

    def __init__(
        self,
        name: str,
        submit: Submit,
        text: TextStream,
        wake: asyncio.Event,
        *,
        now: float,
        is_prompt_only: bool = False,
    ) -> None:
        self.name = name
        self.submit = submit
        self.wake = wake
        self.is_prompt_only = is_prompt_only
        self.trail: Trail | None = None  # of a request that is traced
        self.on_end: Callable[[Stream], None] | None = None  # called once, when it ends
        self.ending: Ending | None = None
        self.tokens: list[int] = []  # that count: up to the one that completed a stop string
        self.num_submits = 0
        self.num_losses = 0  # how often the rank that worked on it was lost since its last token
        self.num_refusals = 0
        self.suspicion: Suspicion | None = None  # what ranks know against it, as far as it reaches
        self.seq = 0  # of the message that submitted it, 0 once it has moved to another rank
        self.prompt_logprobs: tuple[Logprob, ...] | None = None
        self.accepted_at = now
        self.deadline = now + submit.deadline_s
        self.first_at: float | None = None
        self.last_at = now
        self.gap_since: float | None = None  # tokens are missing before ones that have come
        self.rank: RankId | None = None
        self.sender = ""
        self.moved_at = now  # last, from rank to rank; when it was accepted where it never did
        self._text = text
        self._wants_logprobs = submit.sampling.logprobs >= 0
        self._texts: list[str] = []
        self._infos: list[TokenInfo] = []
        self._early: dict[int, Delta] = {}  # by index: they wait for tokens before them
        self._earlier: set[str] = set()  # ids that it was submitted under before

    @property
    def num_tokens(self) -> int:
        """Tokens that count so far."""
        return len(self.tokens)

    @property
    def stop_text(self) -> str | None:
        """The stop string that ended it."""
        return self._text.stopped_by

    def tokens_within(self, num_chars: int) -> int:
        """How many tokens the first `num_chars` characters of the output are made of, the last of them whole."""
        return self._text.tokens_within(num_chars)

    @property
    def has_ended(self) -> bool:
        """Nothing more will come."""
        return self.ending is not None

    @property
    def is_untouched(self) -> bool:
        """No token has come."""
        return self.num_tokens == 0

    @property
    def reach(self) -> int:
        """The end of the last token that has come, also where ones before it are missing."""
        return max([self.num_tokens, *(early.index + len(early.ids) for early in self._early.values())])

    def was(self, request_id: str) -> bool:
        """Whether it was submitted under that id, which `restart` has changed since."""
        return request_id in self._earlier

    def excuse(self, absence: Absence) -> None:
        """Nothing of it is late by the time in which the router did not listen."""
        self.moved_at = absence.moved(self.moved_at)
        if self.gap_since is not None:
            self.gap_since = absence.moved(self.gap_since)

    def restart(self, request_id: str, now: float) -> None:
        """Go on with a submit under another id, from the tokens that have come. Text and log probabilities stay, and so
        does what ranks know against it."""
        known = self.suspicion
        if known is not None and len(self.submit.prompt) + self.num_tokens > known.reach:
            known = None
        self._earlier.add(self.submit.request_id)
        self.submit = msgspec.structs.replace(
            self.submit,
            request_id=request_id,
            deadline_s=self.deadline - now,
            output=tuple(self.tokens),
            suspicion=known,
        )
        self._early.clear()
        self.gap_since = None

    def lacks(self, delta: Delta) -> bool:
        """Whether `delta` has new tokens without what the client asked for beside them. A rank that goes on with what
        another had cannot tell the log probabilities whose report was lost with it; computing them anew can."""
        is_new = delta.index + len(delta.ids) > self.num_tokens
        if is_new and self._wants_logprobs and delta.logprobs is None:
            return True
        wants_prompt = self.submit.prompt_logprobs and self.prompt_logprobs is None
        return wants_prompt and delta.prompt_logprobs is None and (is_new or delta.finish is not None)

    def accept(self, delta: Delta, now: float) -> tuple[int, ...]:
        """Take what is new of `delta` and of what waited for it; returns the ids that count.

        Sets `ending` when this was the last. Raises ProtocolError for a delta that no working rank sends.
        """
        if self.has_ended:
            return ()
        _check(delta)
        if delta.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = delta.prompt_logprobs
        if self.is_prompt_only:
            if self.prompt_logprobs is not None:
                self.end(Ending("finish", "length"))
            return ()
        accepted: tuple[int, ...] = ()
        for part in self._in_order(delta):
            accepted += self._accept_part(part)
            if self.ending is not None:
                break
        self.gap_since = (self.gap_since or now) if self._early else None
        return accepted

    def _in_order(self, delta: Delta) -> Iterator[Delta]:
        """`delta` if it goes on where the output ends (or overlaps it), then all that has waited for it."""
        if delta.index > self.num_tokens:
            self._keep_early(delta)
            return
        yield delta
        while ready := [index for index in self._early if index <= self.num_tokens]:
            for index in ready:
                yield self._early.pop(index)

    def _keep_early(self, delta: Delta) -> None:
        """Keep it until those before it have come: a rank that handed the sequence over may be stopped with its last
        tokens unsent while the next one computes on. Each delta has a token, but for one that only ends."""
        known = self._early.get(delta.index)
        if known is None and len(self._early) > self.submit.max_tokens:
            raise ProtocolError(f"{len(self._early)} deltas came before their predecessors")
        if known is None or (len(delta.ids), delta.finish is not None) > (len(known.ids), known.finish is not None):
            self._early[delta.index] = delta

    def _accept_part(self, delta: Delta) -> tuple[int, ...]:
        known = self.num_tokens - delta.index
        ids = delta.ids[known:] if known else delta.ids
        for position, token_id in enumerate(ids, start=known):
            if self._wants_logprobs and delta.logprobs is not None:
                self._infos.append(TokenInfo(token_id, delta.logprobs[position], self._text.num_chars))
            self._texts.append(self._text.feed(token_id))
            self.tokens.append(token_id)
            if self._text.has_stopped:
                self.end(Ending("finish", "stop"))
                return ids[: position - known + 1]
        if delta.finish is not None and self.num_tokens >= delta.index + len(delta.ids):
            self.end(Ending("finish", delta.finish))
        elif ids:
            self.wake.set()
        return ids

    def end(self, ending: Ending) -> bool:
        """End it, unless it has ended: then False."""
        if self.ending is not None:
            return False
        self.ending = ending
        self._early.clear()
        if ending.kind == "finish":
            self._texts.append(self._text.finish())
        if self.on_end is not None:
            self.on_end(self)
        self.wake.set()
        return True

    @property
    def num_infos(self) -> int:
        """Tokens with log probabilities that `take` has to give."""
        return len(self._infos)

    @property
    def has_output(self) -> bool:
        """`take` has something to give."""
        return bool(self._texts or self._infos)

    def take(self, most: int | None = None) -> Output:
        """Everything that came since the last call; with log probabilities, of `most` tokens at most."""
        if most is None or len(self._infos) <= most:
            output = Output("".join(self._texts), self._infos)
            self._texts, self._infos = [], []
        else:  # each token has one text
            output = Output("".join(self._texts[:most]), self._infos[:most])
            del self._texts[:most], self._infos[:most]
        return output


def _check(delta: Delta) -> None:
    if delta.index < 0 or not all(0 <= token_id < VOCAB_MAX for token_id in delta.ids):
        raise ProtocolError(f"a delta has a negative index or a token id outside [0, {VOCAB_MAX})")
    if delta.finish is not None and delta.finish not in FINISH_REASONS:
        raise ProtocolError("a delta has an unknown finish reason")
    if delta.logprobs is not None and len(delta.logprobs) != len(delta.ids):
        raise ProtocolError(f"a delta has {len(delta.logprobs)} log probabilities for {len(delta.ids)} tokens")
