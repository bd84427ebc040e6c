"""What an HMM is made of."""

from __future__ import annotations

from typing import NamedTuple

from elasticmoe.common.clock import Clock
from elasticmoe.common.endpoints import ServerEnd
from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.hmm import ToHmm
from elasticmoe.common.telemetry import Logger
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory.blocks import BlockCopies
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.large_pages import LargePages
from elasticmoe.services.hmm.memory.transfer import Supply
from elasticmoe.services.hmm.sessions.attachments import Attachments
from elasticmoe.services.hmm.sessions.parking import Parking


class Parts(NamedTuple):
    """An HMM's, and its thread's, from then on.

    `devices`: as they are configured.
    `clock`: what it waits and measures by.
    `server`: where others reach it.
    `attachments`: the connections of ranks.
    `parking`: the connection to the keeper.
    `holdings`: the memory, and what it is for.
    `background`: threads for what takes long; `copies`, `supply` and `large_pages` use it.
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
    large_pages: LargePages
    fence: Fence
