"""What a worker pool can be told."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from elasticmoe.common.layout import Activations, Compute, RankId
from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.limits import NAME_CHARS_MAX


class StartRank(Message, frozen=True):
    """Turn a standby process into the rank of a seat. Answered by scaler.RankStarted or Refused; scaler.RankReady
    follows when it serves. Idempotent: the same `incarnation` is started once.

    rank, slot, device: the seat
    incarnation: of the process, for its life as this rank
    epoch: of the layout that has the seat
    max_tokens: most tokens of one step
    max_sequences: most sequences at once, its ledger rows
    max_model_len: tokens of the longest sequence, prompt and output together
    compute: the backend, the same for all ranks
    activations: that it computes with, the same for all ranks
    """

    rank: RankId
    slot: Annotated[int, Meta(ge=0, le=63)]
    device: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    incarnation: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    epoch: Annotated[int, Meta(ge=1)]
    max_tokens: Annotated[int, Meta(ge=1, le=65_536)]
    max_sequences: Annotated[int, Meta(ge=1, le=65_536)]
    max_model_len: Annotated[int, Meta(ge=2, le=1_048_576)]
    compute: Compute = "host"
    activations: Activations = "float32"


class StopRank(Message, frozen=True):
    """End a rank: SIGTERM, then SIGKILL after `grace_ms`. Answered by Ack at once; RankExited follows."""

    rank: RankId
    incarnation: Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
    grace_ms: Annotated[int, Meta(ge=0, le=600_000)] = 5_000


class GetPool(Message, frozen=True):
    """Answered by scaler.PoolStatus. Its sender receives the pool's events (RankReady, RankExited) from now on."""


ToPool = StartRank | StopRank | GetPool
CODEC: Codec[ToPool] = Codec(ToPool)
