"""What a router can be told by the ranks. One Tokens message carries a whole step's tokens for that router."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX, STEP_FAILURES_MAX, TP_MAX
from elasticmoe.common.protocol.replies import Ack, Refused


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token and of the most probable alternatives, best first."""

    token: float
    top: tuple[tuple[int, float], ...]


def logprob_bytes(num_top: int) -> int:
    """What a Logprob with so many alternatives takes in a message at the most."""
    return 13 + 15 * max(0, num_top)


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request.

    request_id: as the router has submitted it
    index: number of its output tokens before `ids`; the router drops what it has seen
    ids: the new tokens; a stop token is not among them
    finish: `stop` or `length` with the last of them, else None
    stop_token: the stop token that has ended the request; None where none has
    logprobs: of `ids`; None where they were not asked for, and where they were lost with the rank that computed them
    prompt_logprobs: where asked for, of the prompt's tokens from the second on, once; else None
    """

    request_id: str
    index: int
    ids: tuple[int, ...]
    finish: str | None = None
    stop_token: int | None = None
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None


class Tokens(Message, frozen=True):
    """What one step made for the receiving router."""

    deltas: tuple[Delta, ...]


class Failed(Message, frozen=True):
    """The one terminal event of a request that ends without a finish reason."""

    request_id: str
    code: str
    message: str
    retryable: bool


class Suspicion(msgspec.Struct, frozen=True, array_like=True):
    """Steps in a row failed with the request in them: `failures`, in the last `failures_alone` of which it was alone.
    `reach`: how many of its tokens, those of the prompt among them, would have been computed after them."""

    failures: Annotated[int, Meta(ge=0, le=STEP_FAILURES_MAX)]
    failures_alone: Annotated[int, Meta(ge=0, le=STEP_FAILURES_MAX)]
    reach: Annotated[int, Meta(ge=0, le=2 * PROMPT_TOKENS_MAX)]


class Suspected(Message, frozen=True):
    """A rank's successor found the request in a step that did not end. Comes before its Tokens. As long as it has no
    more tokens than the suspicion reaches, that goes with it wherever it is submitted."""

    request_id: str
    suspicion: Suspicion


class RankTimes(Message, frozen=True):
    """How long a rank took for a request whose origin is traced. Comes before the request's first Tokens since it got a
    place in steps.

    request_id: as the router has submitted it
    waited_s: seconds that it waited for that place; 0 where it has lost a place before: that wait is not known
    computed_s: seconds from then until its prompt, and what output it had, was computed
    num_cached: tokens of these that were not computed, because their KV was there
    num_stops: how often its KV has been taken from it here, so that it waited and was computed again
    """

    request_id: str
    waited_s: float
    computed_s: float
    num_cached: int
    num_stops: int


class WantVocabulary(Message, frozen=True):
    """The rank works on a request with a grammar and does not have the vocabulary of that hash: answered by
    rank.VocabularyPiece. It asks again until it has all of it."""

    digest: str


class Moved(Message, frozen=True):
    """Another rank goes on with the request: cancel it there from now on. Its tokens may come before this message.
    `incarnation`: the process that took it, as far as is known; a later one may not have it."""

    request_id: str
    rank: RankId
    incarnation: str = ""


class MayMove(Message, frozen=True):
    """The request may go on at another rank soon: connect to that rank, so that its tokens find the way. It may be one
    that no layout names yet."""

    request_id: str
    rank: RankId


class StepShares(msgspec.Struct, frozen=True):
    """Of the time of one rank's last steps, by what it went into; 0 to 1.

    tp: its index in its replica
    overhead: neither tensor math nor `waiting`: scheduler, exchange, bus, ledger, messages
    waiting: for ranks that had more to compute; a follower's for its leader's plan, too
    """

    tp: Annotated[int, Meta(ge=0, lt=TP_MAX)]
    overhead: Annotated[float, Meta(ge=0.0, le=1.0)]
    waiting: Annotated[float, Meta(ge=0.0, le=1.0)]


class RankStatus(Message, frozen=True):
    """A rank's load, for the balancer; sent when it changes, at most ten times a second, from the work loop.

    rank: the one that tells it; `incarnation`: of its process
    progress: its steps and idle turns so far: it grows only while the loop turns
    running, waiting: requests that are computed, and those that wait for it
    tokens_queued: tokens of both that are still to be computed before their next new token
    blocks_free, blocks_total: KV blocks
    max_model_len: tokens of the longest sequence that it can hold now
    share_overhead: of the last steps' time, the part that is neither tensor math nor `share_waiting`: scheduler,
        exchange, bus, ledger, messages; 0 to 1
    share_waiting: of the same time, the part that went into waiting for ranks that had more to compute; 0 to 1
    is_leaving: it hands its requests over to others and wants no new ones; those that come are handed over too
    recomputed: tokens that this incarnation has computed and computed again, because their blocks were taken or their
        step was given up
    followers: shares of the replica's other ranks, as far as they have told them
    """

    rank: RankId
    incarnation: str
    progress: int
    running: int
    waiting: int
    tokens_queued: int
    blocks_free: int
    blocks_total: int
    max_model_len: int
    share_overhead: float = 0.0
    share_waiting: float = 0.0
    is_leaving: bool = False
    recomputed: int = 0
    followers: Annotated[tuple[StepShares, ...], Meta(max_length=TP_MAX - 1)] = ()


ToRouter = Tokens | Failed | Suspected | RankTimes | WantVocabulary | Moved | MayMove | RankStatus | Ack | Refused
CODEC: Codec[ToRouter] = Codec(ToRouter)
