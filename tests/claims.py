"""Memory that tests have the HMM's devices make."""

from __future__ import annotations

from elasticmoe.common.devices.base import Handle
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.services.hmm.memory.memory import DeviceMemory


def settled(memory: DeviceMemory, handle: Handle) -> Handle:
    """A handle of `memory` that was claimed, with its zeros."""
    memory.device.populate(handle, 0, handle.nbytes)
    memory.device.settle(handle)
    return handle


def make_record(memory: DeviceMemory, key: RecordKey, nbytes: int) -> Handle:
    """A record that the catalog names."""
    return settled(memory, memory.claim_record(key, nbytes))


def make_kv(memory: DeviceMemory, nbytes: int) -> Handle:
    """One more KV handle that the catalog names."""
    return settled(memory, memory.claim_kv(nbytes))
