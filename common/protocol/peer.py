"""What a rank can be told by another rank, or by the HMM, in answer to its requests while it hands sequences over."""

from __future__ import annotations

from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.replies import Ack, Refused


class Reserved(Message, frozen=True):
    """Answer to rank.Reserve: a place for the sequence is kept.

    request_id: as the router has submitted it
    incarnation, slot: of the answering rank, for CopyBlocks
    blocks: KV blocks for the sequence, by position; none where it comes without KV
    num_cached: of these the first ones that hold its KV already, a prefix that both ranks know: not to be written
    """

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
