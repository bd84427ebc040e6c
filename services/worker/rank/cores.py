"""How many threads a rank computes with: its part of the machine's cores (ADR 44)."""

from __future__ import annotations

from elasticmoe.common.config import PoolConfig
from elasticmoe.common.devices.names import DeviceCount


def threads_of(config: PoolConfig, cores: int, num_ranks: int) -> int:
    """Of a rank, one of `num_ranks` that step together: the cores of one of the devices that share the machine, or of
    one of the ranks, where these share it; one where it is pinned to it. At least one, at most `threads_max`."""
    if config.pin_cores:
        return 1
    parts = num_ranks if config.share_cores else DeviceCount.parse(config.devices).count
    return max(1, min(config.threads_max, cores // max(1, parts)))
