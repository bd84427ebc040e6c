"""An HMM in a process of its own."""

from __future__ import annotations

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.fdchannel import Listener
from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.hmm import CODEC
from elasticmoe.common.telemetry import get_logger
from elasticmoe.common.transport import Sockets, new_identity
from elasticmoe.services.hmm.background import Background
from elasticmoe.services.hmm.memory.blocks import BlockCopies
from elasticmoe.services.hmm.memory.holdings import Holdings
from elasticmoe.services.hmm.memory.large_pages import LargePages
from elasticmoe.services.hmm.memory.transfer import Supply
from elasticmoe.services.hmm.parts import Parts
from elasticmoe.services.hmm.service import Hmm
from elasticmoe.services.hmm.sessions.attachments import Attachments
from elasticmoe.services.hmm.sessions.parking import Parking


def open_hmm(config: HmmConfig) -> Hmm:
    """Take the run directory's HMM sockets. Raises Conflict (already_running) where another HMM has them."""
    identity = new_identity("hmm")
    server = Sockets(config.socket).serve("hmm", identity, CODEC)
    try:
        # Opened once everything is adopted: a rank that steps must not wait in a connection for that.
        listener = Listener(config.socket("handles"), is_open=False)
    except BaseException:
        server.close()
        raise
    log = get_logger("hmm")
    parking = Parking(config.socket("keeper"), identity, log, SYSTEM_CLOCK)
    holdings = Holdings(config, parking, log)
    background = Background(log)
    supply = Supply(holdings, background)
    return Hmm(
        Parts(
            devices=config.devices,
            clock=SYSTEM_CLOCK,
            log=log,
            server=server,
            attachments=Attachments(listener, identity, log, SYSTEM_CLOCK),
            parking=parking,
            holdings=holdings,
            background=background,
            copies=BlockCopies(background),
            supply=supply,
            large_pages=LargePages(holdings, supply, background, log, is_wanted=config.large_pages),
            fence=Fence(config.state_dir, "hmm"),
        )
    )
