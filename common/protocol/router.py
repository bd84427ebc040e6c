"""What a router can be told by the ranks. One Tokens message carries a whole step's tokens for that router."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.limits import PROMPT_TOKENS_MAX, STEP_FAILURES_MAX
from elasticmoe.common.protocol.replies import Ack, Refused


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token and of the most probable alternatives, best first."""

    token: float
    top: tuple[tuple[int, float], ...]


def logprob_bytes(num_top: int) -> int:
    """What a Logprob with so many alternatives takes in a message at the most."""
    return 13 + 15 * max(0, num_top)


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. `index` is the number of its output tokens before `ids`: the router drops what it has
    seen. `finish` is `stop` or `length` with the last one, else None; a stop token itself is not among `ids`."""

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
    """Of a request whose origin is traced, before the first Tokens since it got a place in steps: it waited for that,
    then its prompt, and what output it had, was computed, but for `num_cached` tokens whose KV was there. `num_stops`:
    how often its KV has been taken from it here, so that it waited and was computed again."""

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


class RankStatus(Message, frozen=True):
    """A rank's load, for the balancer; sent when it changes, at most ten times a second, from the work loop.

    `progress` counts steps and idle turns: it grows only while the loop does. Of the last steps' time, `share_waiting`
    went into waiting for ranks that had more to compute, and `share_overhead` into everything else that is not tensor
    math: scheduler, exchange, bus, ledger, messages. `is_leaving`: it hands its requests over to others and
    wants no new ones (those that come are handed over too). `recomputed`: tokens that this incarnation has computed and
    computed again, because their blocks were taken or their step was given up.
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


ToRouter = Tokens | Failed | Suspected | RankTimes | WantVocabulary | Moved | MayMove | RankStatus | Ack | Refused
CODEC: Codec[ToRouter] = Codec(ToRouter)
