"""What a worker pool and its own processes say to one another, over Unix sockets that they inherit (fdchannel.py).

The pool sends a standby its seat (pool.StartRank) on the socket that came with Fork; the rest goes the other way.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from elasticmoe.common.protocol.codec import Codec, Message
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import RankReady


class Fork(Message, frozen=True):
    """Pool -> template: fork a standby that talks over the descriptor of this message."""


class Forked(Message, frozen=True):
    """Standby -> pool: I am there, and wait for a seat. `pid` is in the pool's pid namespace."""

    pid: Annotated[int, Meta(ge=1)]


class Posted(Message, frozen=True):
    """Rank -> pool: my seat's record is another one now (SeatRecord)."""


class SeatRecord(Message, frozen=True):
    """What is on file of a seat (services/worker/pool/seats.py): written by its rank, for the pool that has it.
    `pid`: who wrote it. `ready`: since it serves; `failure`: why it is about to end."""

    pid: Annotated[int, Meta(ge=1)]
    seat: StartRank
    ready: RankReady | None = None
    failure: Refused | None = None


FromStandby = Forked | Posted
TO_TEMPLATE: Codec[Fork] = Codec(Fork)
TO_POOL: Codec[FromStandby] = Codec(FromStandby)
ON_FILE: Codec[SeatRecord] = Codec(SeatRecord)
