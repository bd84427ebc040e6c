"""What a rank can be told. Requests come from routers, commands from the scaler."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.ids import TRACEPARENT_PATTERN, CommandId, trace_id_of
from elasticmoe.common.protocol.limits import (
    DECODE_ONLY_STEPS_MAX,
    GRAMMAR_PACKED_BYTES_MAX,
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    MOVE_TARGETS_MAX,
    OUTPUT_PENALTY_MAX,
    PROMPT_TOKENS_MAX,
    REPETITION_PENALTY_MAX,
    REPETITION_PENALTY_MIN,
    REQUEST_ID_CHARS_MAX,
    REQUEST_SECONDS_MAX,
    STOP_TOKEN_IDS_MAX,
    TAIL_BYTES_MAX,
    TEMPERATURE_MAX,
    TOKEN_BIAS_MAX,
    VOCAB_MAX,
    VOCABULARY_BYTES_MAX,
    VOCABULARY_PIECE_BYTES,
)
from elasticmoe.common.protocol.router import Logprob, StepShares, Suspicion

TokenId = Annotated[int, Meta(ge=0, lt=VOCAB_MAX)]
RequestId = Annotated[str, Meta(min_length=1, max_length=REQUEST_ID_CHARS_MAX)]

# Of sampling, for the router's bodies too: what a client may send is what a rank takes.
Temperature = Annotated[float, Meta(ge=0.0, le=TEMPERATURE_MAX)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
OutputPenalty = Annotated[float, Meta(ge=-OUTPUT_PENALTY_MAX, le=OUTPUT_PENALTY_MAX)]
RepetitionPenalty = Annotated[float, Meta(ge=REPETITION_PENALTY_MIN, le=REPETITION_PENALTY_MAX)]
TokenBias = Annotated[float, Meta(ge=-TOKEN_BIAS_MAX, le=TOKEN_BIAS_MAX)]


VocabularyHash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the output has to keep to, from its first token on. `packed`: its text, compressed (common/grammar_text.py),
    which the router has tried. `vocabulary`: the hash of the vocabulary that it speaks of; a rank that does not have
    that asks for it (router.WantVocabulary), and the request waits meanwhile."""

    packed: Annotated[bytes, Meta(min_length=1, max_length=GRAMMAR_PACKED_BYTES_MAX)]
    vocabulary: VocabularyHash


class Sampling(Message, frozen=True, tag=False):
    """How tokens are chosen.

    seed: always set, so that a repeated step chooses the same token; the router draws one where the client gives none
    temperature: 0, or below what float32 can divide by, is greedy
    top_p: of the most probable tokens, as few as make up this share; 1: all, 0: the most probable token alone
    top_k: so many of the most probable tokens; 0: all
    min_p: tokens that have at least this part of the greatest probability; 0: all
    presence_penalty, frequency_penalty: taken from the logit of each token that the output has: once, and for each
        time that it has it
    repetition_penalty: the logits of tokens that prompt or output have are divided by it, those below 0 multiplied
        with it; 1: none
    logit_bias: (token, what is added to its logit)
    logprobs: how many alternatives to report per token; 0: only the chosen token's, -1: none
    grammar: what the output has to keep to; None: nothing
    """

    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    temperature: Temperature = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, Meta(ge=0, le=VOCAB_MAX)] = 0
    min_p: Share = 0.0
    presence_penalty: OutputPenalty = 0.0
    frequency_penalty: OutputPenalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: Annotated[tuple[tuple[TokenId, TokenBias], ...], Meta(max_length=LOGIT_BIAS_MAX)] = ()
    logprobs: Annotated[int, Meta(ge=-1, le=LOGPROBS_MAX)] = -1
    grammar: Grammar | None = None


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """Whose request it is that a rank works on, for its logs. `request_id`: by which the client knows it, its
    x-request-id. `traceparent`: of the span that waits for it; empty where it is not traced."""

    request_id: RequestId
    traceparent: Annotated[str, Meta(pattern=TRACEPARENT_PATTERN)] = ""


class Submit(Message, frozen=True):
    """Generate. Answered by a stream of router.Tokens with one finish, or one router.Failed.

    request_id: the router's name for it; the rank knows it by this and the router
    prompt: token ids, at least one
    max_tokens: most output tokens, those of `output` included
    sampling: how tokens are chosen
    stop_token_ids: end the sequence; the model's own eos ids are among them unless the client ignores eos
    min_tokens: output tokens before which no stop token is chosen
    deadline_s: seconds from receipt after which it fails
    priority: lower runs first, until those behind it have waited long enough; equal ones in order of arrival
    prompt_logprobs: log probabilities of the prompt's tokens are reported, too
    output: what another rank, which was lost, has generated so far: it is computed like the prompt, counts as
        generated, and is not reported again
    suspicion: what router.Suspected told of it; None where nothing
    origin: whose request it is; where it is traced, the rank tells its times (router.RankTimes)
    """

    request_id: RequestId
    prompt: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=PROMPT_TOKENS_MAX)]
    max_tokens: Annotated[int, Meta(ge=1, le=PROMPT_TOKENS_MAX)]
    sampling: Sampling
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=STOP_TOKEN_IDS_MAX)] = ()
    min_tokens: Annotated[int, Meta(ge=0, le=PROMPT_TOKENS_MAX)] = 0
    deadline_s: Annotated[float, Meta(ge=0.0, le=REQUEST_SECONDS_MAX)] = 600.0
    priority: Annotated[int, Meta(ge=-1_000, le=1_000)] = 0
    prompt_logprobs: bool = False
    output: Annotated[tuple[TokenId, ...], Meta(max_length=PROMPT_TOKENS_MAX)] = ()
    suspicion: Suspicion | None = None
    origin: Origin | None = None

    @property
    def names(self) -> dict[str, str]:
        """What logs call it by, in every process."""
        origin = self.origin
        if origin is None:
            return {"stream": self.request_id}
        names = {"request_id": origin.request_id, "stream": self.request_id}
        return names | {"trace_id": trace_id_of(origin.traceparent)} if origin.traceparent else names


class Cancel(Message, frozen=True):
    """The client left or the router has enough: free everything of this request. No answer; unknown ids are ignored."""

    request_id: RequestId


class VocabularyPiece(Message, frozen=True):
    """Answers router.WantVocabulary: bytes from `offset` on of the `nbytes` that an encoded vocabulary has
    (common/grammar_text.py). All pieces come, one after the other."""

    digest: VocabularyHash
    offset: Annotated[int, Meta(ge=0, lt=VOCABULARY_BYTES_MAX)]
    nbytes: Annotated[int, Meta(ge=1, le=VOCABULARY_BYTES_MAX)]
    data: Annotated[bytes, Meta(min_length=1, max_length=VOCABULARY_PIECE_BYTES)]


class Watch(Message, frozen=True):
    """A router introduces itself: it receives router.RankStatus at once and at every change from now on."""


class Unwatch(Message, frozen=True):
    """The router sends this rank nothing more: no status is wanted, no request will follow. No answer."""


class TellShares(Message, frozen=True):
    """Of a follower to its leader, which tells them to routers with its own. No answer."""

    shares: StepShares


class GetRankLoad(Message, frozen=True):
    """Answered by scaler.RankLoad."""


class MoveTarget(msgspec.Struct, frozen=True):
    """A rank that may take sequences over, at most `num_sequences` of them; a drain has no such bound."""

    rank: RankId
    slot: Annotated[int, Meta(ge=0, le=63)]
    num_sequences: Annotated[int, Meta(ge=0)] = 0


Targets = Annotated[tuple[MoveTarget, ...], Meta(max_length=MOVE_TARGETS_MAX)]
DecodeOnlySteps = Annotated[int, Meta(ge=0, le=DECODE_ONLY_STEPS_MAX)]


class MigrateTo(Message, frozen=True):
    """Scaler -> rank, fenced, as all RankCommands: hand so many sequences over to each of `targets`, with their KV,
    while they run. Answered by Ack at once, then watched with GetRankLoad, which tells the `id` in force. Any new
    command replaces the one in force; what it does not ask for ends."""

    id: CommandId
    targets: Targets


class Precopy(Message, frozen=True):
    """Get sequences ready for ranks that are no members yet: places are reserved and full blocks copied; they are
    handed over when the target steps with the others. The next `decode_only_steps` steps only decode, because each of
    these acts waits for the end of a step."""

    id: CommandId
    targets: Targets
    decode_only_steps: DecodeOnlySteps = 0


class DecodeOnly(Message, frozen=True):
    """Hand over nothing. The next so many steps only decode, because a change of the layout waits for their ends."""

    id: CommandId
    decode_only_steps: DecodeOnlySteps


class Drain(Message, frozen=True):
    """Hand over all sequences, those that come later too, to any of `targets`. The rank leaves: it ends by itself once
    it is no member any more, its sequences have gone, and no router watches it."""

    id: CommandId
    targets: Targets


class CancelMigration(Message, frozen=True):
    """Hand over nothing, and leave no more."""

    id: CommandId


RankCommand = MigrateTo | Precopy | DecodeOnly | Drain | CancelMigration


class Reserve(Message, frozen=True):
    """Rank -> rank: keep a row and KV blocks for a sequence of `tokens` so far that I want to hand over. Answered by
    peer.Reserved or Refused. `router`: the one that gets the tokens. Idempotent for the same sender and request. What
    was reserved is kept until HandOver or Unreserve, and RESERVATION_S after the sender's last Reserve at the longest.
    """

    request_id: RequestId
    router: Annotated[bytes, Meta(min_length=1, max_length=255)]
    tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=PROMPT_TOKENS_MAX)]
    num_blocks: Annotated[int, Meta(ge=0)]


class Unreserve(Message, frozen=True):
    """Rank -> rank: the sequence stays with me. Answered by Ack, also when nothing was reserved."""

    request_id: RequestId
    router: Annotated[bytes, Meta(min_length=1, max_length=255)]


class HandOver(Message, frozen=True):
    """Rank -> rank: the sequence is yours from now on. Answered by peer.Taken or Refused; idempotent.

    request: as it was submitted, without `output`; `deadline_s` counts from now, `suspicion` is what is known now
    router: the one that gets the tokens
    output: output tokens so far; `num_sent`: how many of them were reported
    kv_len: tokens of prompt and output whose KV is written
    num_copied: KV up to this block number lies in the blocks that were reserved
    tail: KV of the blocks from there on, one after the other, each of the geometry's `block_bytes`
    prompt_logprobs: of the prompt's tokens, those that are known so far and not reported; None where there are none
    """

    request: Submit
    router: Annotated[bytes, Meta(min_length=1, max_length=255)]
    output: Annotated[tuple[TokenId, ...], Meta(max_length=PROMPT_TOKENS_MAX)]
    num_sent: Annotated[int, Meta(ge=0)]
    kv_len: Annotated[int, Meta(ge=0)]
    num_copied: Annotated[int, Meta(ge=0)]
    tail: Annotated[bytes, Meta(max_length=TAIL_BYTES_MAX)]
    prompt_logprobs: tuple[Logprob, ...] | None = None


class GetRankIntegrity(Message, frozen=True):
    """Verify blocks, rows and bus. Answered by scaler.Integrity."""


ToRank = (
    Submit
    | Cancel
    | VocabularyPiece
    | Watch
    | Unwatch
    | TellShares
    | GetRankIntegrity
    | GetRankLoad
    | RankCommand
    | Reserve
    | Unreserve
    | HandOver
)
CODEC: Codec[ToRank] = Codec(ToRank)
