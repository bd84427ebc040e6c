"""What a scaler is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from elasticmoe.common.clock import Clock
from elasticmoe.common.endpoints import Transport
from elasticmoe.common.fence import Fence
from elasticmoe.common.store import Store
from elasticmoe.services.scaler.control.poller import Poller
from elasticmoe.services.scaler.store.reserve import DiskReserve


class ScalerParts(NamedTuple):
    """A scaler's, from then on.

    `identity`: its own, one per process; `new_identity(name)` makes those of the ranks that it starts.
    `clock`: what it waits and measures by.
    `transport`: leads to the HMM, the pool and the ranks.
    `poller`: where its loop sleeps.
    `store`: the loop's; lease and journal get others like it.
    `fence`: the epoch that scalers of this host have acted under; `epochs`: the highest of a layout. Both on its disk.
    `reserve`: room for an operation's records.
    """

    identity: str
    new_identity: Callable[[str], str]
    clock: Clock
    transport: Transport
    poller: Poller
    store: Store
    fence: Fence
    epochs: Fence
    reserve: DiskReserve
