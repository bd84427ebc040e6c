"""What was pushed, in place of a socket."""

from __future__ import annotations

from elasticmoe.common.protocol import signals
from elasticmoe.common.protocol.codec import Message, encode
from elasticmoe.common.protocol.signals import RankWindow, RouterWindow


class Pushed:
    """A PushEnd that keeps what comes, as the scaler would decode it."""

    def __init__(self) -> None:
        self.windows: list[RouterWindow | RankWindow] = []

    def push(self, body: Message) -> bool:
        self.windows.append(signals.CODEC.decode(encode(body, sender="sender:1")).body)
        return True

    def close(self) -> None:
        pass
