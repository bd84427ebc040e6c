"""The one place that knows the exchanges by name."""

from __future__ import annotations

from pathlib import Path

from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.exchange.groups import Groups
from elasticmoe.services.worker.exchange.mailbox import MailboxExchange
from elasticmoe.services.worker.exchange.shm import ShmExchange
from elasticmoe.services.worker.exchange.torch_dist import TorchDistExchange
from elasticmoe.services.worker.hmm.memory import RankMemory


def open_exchange(memory: RankMemory, backend: ComputeBackend, rendezvous: Path) -> Exchange:
    """This rank's end of the exchange that the memory was made for: all ranks have the same one. `rendezvous`: a file
    by which ranks of the deployment find one another, where the exchange needs one."""
    bus, num_experts = memory.bus, memory.spec.num_experts_by_layer
    replica = memory.replica if memory.spec.tp > 1 else ()
    if memory.exchange == "mailbox":
        return MailboxExchange(bus, num_experts, backend, memory.mailboxes, replica, memory.device.queue_copy)
    if memory.exchange == "torch_dist":
        groups = Groups(rendezvous, memory.memory_id, bus, backend.device)
        return TorchDistExchange(bus, num_experts, backend, groups, replica)
    return ShmExchange(bus, num_experts, backend, replica)
