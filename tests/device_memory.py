"""Memory of a device for tests that have no HMM: one handle, mapped, of a process of its own."""

from __future__ import annotations

import weakref

from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import ProcessRules
from elasticmoe.common.model_spec import round_up

GRANULARITY = 4096


class DeviceMemory:
    """At least `nbytes` of zeros at `address`, given back with this object."""

    def __init__(self, nbytes: int) -> None:
        size = round_up(nbytes, GRANULARITY)
        self.device = open_device("host:0", GRANULARITY, size, rules=ProcessRules())
        weakref.finalize(self, self.device.close)
        self.range = self.device.reserve(size)
        self.device.map(self.range, 0, self.device.create(size, "kv"), True)
        self.address = self.range.base
