"""The store: what it holds, an outage, a loss of everything, a way back to an earlier state; and fences on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.fence import Fence
from common.layout import Layout
from common.protocol.errors import Fenced, Unavailable
from services.scaler.operation import Operation
from tests.sim.heap import Sim


class Store:
    """Does what common.store.Store does, at once or not at all."""

    def __init__(self, sim: Sim) -> None:
        self._sim = sim
        self.is_down = False
        self.checks_fence = True
        self.data: dict[str, Any] = {}
        self.lease_until = 0.0
        self._earlier: dict[str, Any] = {}

    def _check(self) -> None:
        if self.is_down:
            raise Unavailable("the store does not answer", code="store_unavailable")

    def _check_holder(self, holder: str) -> None:
        self._check()
        if self._holder() not in ("", holder):
            raise Fenced(f"{self._holder()} holds the lease")

    def _holder(self) -> str:
        return str(self.data.get("lease", "")) if self._sim.now < self.lease_until else ""

    def acquire_lease(self, holder: str, lease_ms: int, fence_min: int) -> int | str:
        """See common.store."""
        self._check()
        if self._holder() not in ("", holder):
            return self._holder()
        self.data["lease"], self.lease_until = holder, self._sim.now + lease_ms / 1e3
        self.data["fence"] = max(self.data.get("fence", 0), fence_min) + 1
        return int(self.data["fence"])

    def renew_lease(self, holder: str, lease_ms: int, fence: int) -> bool:
        """See common.store."""
        self._check()
        if self._holder() not in ("", holder):
            return False
        if not self._holder() and self.data.get("fence", 0) > fence and self.checks_fence:
            return False
        self.data["lease"], self.lease_until = holder, self._sim.now + lease_ms / 1e3
        return True

    def put_operation(self, holder: str, operation: Operation) -> None:
        """See common.store."""
        self._check_holder(holder)
        self.data["operation"] = operation

    def end_operation(self, holder: str, operation: Operation) -> None:
        """See common.store."""
        self._check_holder(holder)
        self.data.pop("operation", None)
        self.data["ended"] = [operation, *self.data.get("ended", [])]

    def get_operation(self) -> Operation | None:
        """See common.store."""
        self._check()
        return self.data.get("operation")

    def ended_operations(self) -> list[Operation]:
        """See common.store."""
        self._check()
        return list(self.data.get("ended", []))

    def put_layout(self, layout: Layout) -> None:
        """See common.store."""
        self._check()
        self.data["layout"] = layout

    def get_layout(self) -> Layout | None:
        """See common.store."""
        self._check()
        return self.data.get("layout")

    def get_epoch(self) -> int:
        """See common.store."""
        layout = self.get_layout()
        return layout.epoch if layout else 0

    def append_event(self, event: object) -> None:
        """See common.store."""
        self._check()

    def remember(self) -> None:
        """A snapshot on its disk."""
        self._earlier = dict(self.data)

    def roll_back(self) -> None:
        """It comes back with that snapshot."""
        self._sim.note("store: rolled back")
        self.data = dict(self._earlier)

    def wipe(self) -> None:
        """It comes back empty."""
        self._sim.note("store: emptied")
        self.data = {}


class DiskFence(Fence):
    """The product's fence, with a dictionary for a disk. `read` at the start of a process, as the file is."""

    def __init__(self, disk: dict[str, int], name: str) -> None:
        self._disk = disk
        self._name = name
        self._path = Path(name)
        self.num_refused = 0
        self.epoch = disk.get(name, 0)

    def _write(self, epoch: int) -> None:
        self._disk[self._name] = epoch
