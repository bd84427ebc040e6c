"""What a rank can be told. Requests come from routers, commands from the scaler."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from common.protocol.codec import Codec, Message
from common.protocol.limits import (
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    PROMPT_TOKENS_MAX,
    REQUEST_ID_CHARS_MAX,
    REQUEST_SECONDS_MAX,
    STOP_TOKEN_IDS_MAX,
    TEMPERATURE_MAX,
    VOCAB_MAX,
)

TokenId = Annotated[int, Meta(ge=0, lt=VOCAB_MAX)]
RequestId = Annotated[str, Meta(min_length=1, max_length=REQUEST_ID_CHARS_MAX)]


class Sampling(Message, frozen=True, tag=False):
    """How tokens are chosen. `temperature` 0 is greedy. `seed` is always set: the router draws one where the client
    gives none, so that a repeated step chooses the same token. `top_k` 0: off. `logprobs`: how many alternatives to
    report per token; -1: none, 0: only the chosen token's."""

    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    temperature: Annotated[float, Meta(ge=0.0, le=TEMPERATURE_MAX)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=VOCAB_MAX)] = 0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0
    logit_bias: Annotated[
        tuple[tuple[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], ...], Meta(max_length=LOGIT_BIAS_MAX)
    ] = ()
    logprobs: Annotated[int, Meta(ge=-1, le=LOGPROBS_MAX)] = -1


class Submit(Message, frozen=True):
    """Generate. Answered by a stream of router.Tokens with one finish, or one router.Failed.

    `prompt`: token ids, at least one. `stop_token_ids` end the sequence (the model's own eos ids come with them unless
    the client ignores eos); before `min_tokens` they are never chosen. `deadline_s`: seconds from receipt.
    `priority`: lower runs first; equal ones in order of arrival.
    """

    request_id: RequestId
    prompt: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=PROMPT_TOKENS_MAX)]
    max_tokens: Annotated[int, Meta(ge=1, le=PROMPT_TOKENS_MAX)]
    sampling: Sampling
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=STOP_TOKEN_IDS_MAX)] = ()
    min_tokens: Annotated[int, Meta(ge=0, le=PROMPT_TOKENS_MAX)] = 0
    deadline_s: Annotated[float, Meta(gt=0.0, le=REQUEST_SECONDS_MAX)] = 600.0
    priority: Annotated[int, Meta(ge=-1_000, le=1_000)] = 0
    prompt_logprobs: bool = False


class Cancel(Message, frozen=True):
    """The client left or the router has enough: free everything of this request. No answer; unknown ids are ignored."""

    request_id: RequestId


class Watch(Message, frozen=True):
    """A router introduces itself: it receives router.RankStatus at once and at every change from now on."""


class GetRankIntegrity(Message, frozen=True):
    """Verify blocks, rows and bus. Answered by scaler.Integrity."""


ToRank = Submit | Cancel | Watch | GetRankIntegrity
CODEC: Codec[ToRank] = Codec(ToRank)
