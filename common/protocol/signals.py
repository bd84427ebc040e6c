"""What routers and ranks tell the scaler of their load, unasked: one window after the other, each with the time of its
end by its sender's monotonic clock.

Lossy: nobody answers, nobody repeats one. `number` counts a sender's windows from 1: where it jumps, windows were lost;
where it repeats, one was doubled. `epoch` is of the layout that the sender went by when the window ended. A window is
whole in itself: no figure needs the window before it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.limits import (
    EPOCH_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    MONOTONIC_SECONDS_MAX,
    NAME_CHARS_MAX,
    STEP_SAMPLES_MAX,
    WINDOW_COUNT_MAX,
    WINDOW_SECONDS_MAX,
    WINDOW_TOKENS_MAX,
)
from elasticmoe.common.sketch import Counts, JointCounts, check_ascending, total

Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
WindowNumber = Annotated[int, Meta(ge=1, le=EPOCH_MAX)]
LayoutEpoch = Annotated[int, Meta(ge=0, le=EPOCH_MAX)]
Moment = Annotated[float, Meta(ge=0.0, le=MONOTONIC_SECONDS_MAX)]
Span = Annotated[float, Meta(gt=0.0, le=WINDOW_SECONDS_MAX)]
Num = Annotated[int, Meta(ge=0, le=WINDOW_COUNT_MAX)]
NumTokens = Annotated[int, Meta(ge=0, le=WINDOW_TOKENS_MAX)]
ExpertPlace = Annotated[int, Meta(ge=0, lt=LAYERS_MAX * EXPERTS_MAX)]


class RouterWindow(Message, frozen=True, kw_only=True):
    """What one router saw in `span_s` seconds.

    router: identity of the incarnation
    number, ended_s: as the module says
    epoch: of the layout that it routes by, 0 before the first
    admitted: requests that it took, at their admission; `prompt_tokens` and `max_tokens` (that they may get) of them
    refused: generations that it did not take for want of room: permits, bytes or replicas
    finished, failed, cancelled: requests that ended so, whenever they were admitted; `output_tokens` of the finished
    open: admitted and not ended at the window's end; `queued`: those of them without a first token; `oldest_queued_s`:
        since the admission of the oldest of these, 0.0 where there is none; `oldest_prompt_tokens`: of its prompt
    ttft: seconds from admission to the first token, counted at the first token
    gaps: seconds between two tokens of a stream, counted as tokens come
    joint: (TTFT, mean gap) of the requests that ended with a token; the mean gap of a single token is 0
    """

    router: Name
    number: WindowNumber
    epoch: LayoutEpoch
    ended_s: Moment
    span_s: Span
    admitted: Num = 0
    refused: Num = 0
    prompt_tokens: NumTokens = 0
    max_tokens: NumTokens = 0
    finished: Num = 0
    failed: Num = 0
    cancelled: Num = 0
    output_tokens: NumTokens = 0
    open: Num = 0
    queued: Num = 0
    oldest_queued_s: Moment = 0.0
    oldest_prompt_tokens: NumTokens = 0
    ttft: Counts = ()
    gaps: Counts = ()
    joint: JointCounts = ()

    @property
    def ended(self) -> int:
        """Requests that ended, however."""
        return self.finished + self.failed + self.cancelled

    def __post_init__(self) -> None:
        """Raises ValueError where figures contradict one another."""
        if self.queued > self.open:
            raise ValueError(f"{self.queued} requests wait for a first token, of {self.open} that are open")
        if self.oldest_queued_s > 0.0 and self.queued == 0:
            raise ValueError(f"no request waits, and the oldest does for {self.oldest_queued_s} s")
        if self.output_tokens > 0 and self.finished == 0:
            raise ValueError(f"no request finished, and {self.output_tokens} tokens are of those that did")
        if (num := sum(count for _, _, count in self.joint)) > self.ended:
            raise ValueError(f"joint: {num} requests with a token ended, of {self.ended} that ended")
        check_ascending("ttft", (bucket for bucket, _ in self.ttft))
        check_ascending("gaps", (bucket for bucket, _ in self.gaps))
        check_ascending("joint", ((first, second) for first, second, _ in self.joint))
        if total(self.ttft) > WINDOW_COUNT_MAX or total(self.gaps) > WINDOW_COUNT_MAX:
            raise ValueError(f"a sketch counts more than the limit of {WINDOW_COUNT_MAX}")


class StepSample(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step of a rank.

    seconds: from its turn's beginning to its end, waiting for other ranks included
    prefill_tokens: tokens that it computed of sequences that were still in their prompt
    kv_tokens: KV entries that its sequences read
    sequences: those of them that were past their prompt
    steps_since_cutover: steps before this one by the layout in force; a rank that is attached anew begins at 0, too
    """

    seconds: Annotated[float, Meta(gt=0.0, le=WINDOW_SECONDS_MAX)]
    prefill_tokens: NumTokens
    kv_tokens: NumTokens
    sequences: Num
    steps_since_cutover: Num


class RankWindow(Message, frozen=True, kw_only=True):
    """What one rank did in `span_s` seconds.

    incarnation: of its process
    number, ended_s: as the module says
    epoch: of the layout that it computes by, 0 before its first step
    running, waiting: sequences at the window's end; `queued_prefill_tokens`: tokens of both that are still to be
        computed before their next new token
    kv_used, kv_total: tokens that the rank's KV blocks hold and could hold; blocks that only the prefix cache keeps are
        not used
    uncached_tokens, cached_tokens: of the prompts that it admitted in the window, those to be computed, and those that
        the prefix cache served
    generated: new tokens
    num_steps: of the window; `steps` tells some of them
    expert_rows: now and then, of `expert_steps` sampled steps since they were told last: rows that came for its own
        experts, by layer × the most experts of a layer + expert; experts without any are left out
    """

    rank: RankId
    incarnation: Name
    number: WindowNumber
    epoch: LayoutEpoch
    ended_s: Moment
    span_s: Span
    running: Num = 0
    waiting: Num = 0
    queued_prefill_tokens: NumTokens = 0
    kv_used: NumTokens = 0
    kv_total: NumTokens = 0
    uncached_tokens: NumTokens = 0
    cached_tokens: NumTokens = 0
    generated: NumTokens = 0
    num_steps: Num = 0
    steps: Annotated[tuple[StepSample, ...], Meta(max_length=STEP_SAMPLES_MAX)] = ()
    expert_steps: Num = 0
    expert_rows: Annotated[tuple[tuple[ExpertPlace, Num], ...], Meta(max_length=LAYERS_MAX * EXPERTS_MAX)] = ()

    def __post_init__(self) -> None:
        """Raises ValueError where figures contradict one another."""
        if self.kv_used > self.kv_total:
            raise ValueError(f"KV of {self.kv_used} tokens is used, of {self.kv_total}")
        if len(self.steps) > self.num_steps:
            raise ValueError(f"{len(self.steps)} steps are told, of {self.num_steps}")
        if self.expert_rows and not self.expert_steps:
            raise ValueError("rows of experts are told, of no step")
        check_ascending("expert_rows", (place for place, _ in self.expert_rows))
        if self.rank.replica < 0 or self.rank.tp < 0:
            raise ValueError(f"no rank is {self.rank}")


Signal = RouterWindow | RankWindow
CODEC: Codec[Signal] = Codec(Signal)
