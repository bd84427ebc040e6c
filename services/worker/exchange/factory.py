"""The one place that knows the exchanges by name."""

from __future__ import annotations

from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.mailbox import MailboxExchange
from elasticmoe.services.worker.exchange.shm import ShmExchange
from elasticmoe.services.worker.hmm.memory import RankMemory


def open_exchange(memory: RankMemory, backend: ComputeBackend) -> Exchange:
    """This rank's end of the exchange that the memory was made for: all ranks have the same one."""
    bus, num_experts = memory.bus, memory.spec.num_experts_by_layer
    if memory.exchange == "mailbox":
        return MailboxExchange(bus, num_experts, backend, memory.mailboxes)
    return ShmExchange(bus, num_experts, backend)
