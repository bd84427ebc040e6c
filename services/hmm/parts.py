"""What an HMM is made of."""

from __future__ import annotations

from typing import NamedTuple

from common.clock import Clock
from common.endpoints import ServerEnd
from common.fence import Fence
from common.protocol.hmm import ToHmm
from common.telemetry import Logger
from services.hmm.background import Background
from services.hmm.memory.blocks import BlockCopies
from services.hmm.memory.holdings import Holdings
from services.hmm.memory.supply import Supply
from services.hmm.sessions.attachments import Attachments
from services.hmm.sessions.parking import Parking


class Parts(NamedTuple):
    """An HMM's, and its thread's, from then on.

    `devices`: as they are configured.
    `clock`: what it waits and measures by.
    `server`: where others reach it.
    `attachments`: the connections of ranks.
    `parking`: the connection to the keeper.
    `holdings`: the memory, and what it is for.
    `background`: threads for what takes long; `copies` and `supply` use it.
    `fence`: refuses commands of superseded scalers.
    """

    devices: str
    clock: Clock
    log: Logger
    server: ServerEnd[ToHmm]
    attachments: Attachments
    parking: Parking
    holdings: Holdings
    background: Background
    copies: BlockCopies
    supply: Supply
    fence: Fence
