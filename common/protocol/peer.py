"""What a rank can be told by another rank, or by the HMM, in answer to its requests while it hands sequences over."""

from __future__ import annotations

from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.replies import Ack, Refused


class Reserved(Message, frozen=True):
    """Blocks for the sequence's KV, by position; the first `num_cached` hold it already (a prefix that both know) and
    must not be written. `incarnation` and `slot` are the answering rank's, for CopyBlocks."""

    request_id: str
    incarnation: str
    slot: int
    blocks: tuple[int, ...]
    num_cached: int


class Taken(Message, frozen=True):
    """The answering rank goes on with the sequence."""

    request_id: str


ToPeer = Reserved | Taken | Ack | Refused
CODEC: Codec[ToPeer] = Codec(ToPeer)
