"""The store: what it holds, an outage, a loss of everything, a way back to an earlier state; and fences on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from elasticmoe.common.fence import Fence
from elasticmoe.common.layout import Layout, Served
from elasticmoe.common.protocol.errors import Fenced, Unavailable
from elasticmoe.common.store import Writer
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.store.reserve import DiskReserve
from tests.sim.heap import Sim

if TYPE_CHECKING:
    from tests.sim.world import World


class Store:
    """Does what elasticmoe.common.store.Store does, at once or not at all."""

    def __init__(self, sim: Sim) -> None:
        self._sim = sim
        self.is_down = False
        self.is_full = False
        self.reserved_by = ""  # the scaler that took room for an operation's records
        self.is_reserve_eaten = False  # by somebody else, as soon as it is given up
        self.data: dict[str, Any] = {}
        self.lease_until = 0.0
        self.decisions: list[bytes] = []
        self.num_losses = 0
        self._num_writes = 0
        self._earlier: dict[str, Any] = {}

    def another(self, client: str) -> Store:
        """See elasticmoe.common.store."""
        return self

    def _check(self) -> None:
        if self.is_down:
            raise Unavailable("the store does not answer", code="store_unavailable")

    def _check_room(self) -> None:
        self._check()
        if self.is_full:
            raise Unavailable("the store has no room", code="storage_full")

    def _may_write(self, by: Writer) -> bool:
        self._check_room()
        fence, holder = self.data.get("fence", 0), self._holder()
        is_foreign = holder not in ("", by.holder)
        if fence > by.fence or (fence == by.fence and is_foreign):
            return False
        if fence < by.fence:
            self.data["fence"] = by.fence
            if is_foreign:
                self.data.pop("lease")
        return True

    def _check_writer(self, by: Writer) -> None:
        if not self._may_write(by):
            raise Fenced("another scaler holds the lease")

    def _mark(self) -> str:
        self._num_writes += 1
        self.data["journal"] = str(self._num_writes)
        return str(self._num_writes)

    def _holder(self) -> str:
        return str(self.data.get("lease", "")) if self._sim.now < self.lease_until else ""

    def acquire_lease(self, holder: str, lease_ms: int, fence_min: int) -> int | str:
        """See elasticmoe.common.store."""
        self._check_room()
        if self._holder() not in ("", holder):
            return self._holder()
        self.data["lease"], self.lease_until = holder, self._sim.now + lease_ms / 1e3
        self.data["fence"] = max(self.data.get("fence", 0), fence_min) + 1
        return int(self.data["fence"])

    def renew_lease(self, by: Writer, lease_ms: int) -> bool:
        """See elasticmoe.common.store."""
        if not self._may_write(by):
            return False
        self.data["lease"], self.lease_until = by.holder, self._sim.now + lease_ms / 1e3
        return True

    def release_lease(self, holder: str) -> None:
        """See elasticmoe.common.store."""
        self._check()
        if self._holder() == holder:
            self.data.pop("lease")

    def put_operation(self, by: Writer, operation: Operation | None) -> str:
        """See elasticmoe.common.store."""
        self._check_writer(by)
        if operation is None:
            self.data.pop("operation", None)
        else:
            self.data["operation"] = operation
        return self._mark()

    def end_operation(self, by: Writer, operation: Operation) -> str:
        """See elasticmoe.common.store."""
        self._check_writer(by)
        self.data.pop("operation", None)
        self.data["ended"] = [operation, *self.data.get("ended", [])]
        return self._mark()

    def journal_mark(self) -> str:
        """See elasticmoe.common.store."""
        self._check()
        return str(self.data.get("journal", ""))

    def get_operation(self, decoder: object = None) -> Operation | None:
        """See elasticmoe.common.store."""
        self._check()
        return self.data.get("operation")

    def ended_operations(self, decoder: object = None) -> list[Operation]:
        """See elasticmoe.common.store."""
        self._check()
        return list(self.data.get("ended", []))

    def put_layout(self, by: Writer, layout: Layout) -> None:
        """See elasticmoe.common.store."""
        self._check_writer(by)
        self.data["layout"] = layout

    def get_layout(self) -> Layout | None:
        """See elasticmoe.common.store."""
        self._check()
        return self.data.get("layout")

    def get_epoch(self) -> int:
        """See elasticmoe.common.store."""
        layout = self.get_layout()
        return layout.epoch if layout else 0

    def put_served(self, by: Writer, served: Served) -> None:
        """See elasticmoe.common.store."""
        self._check_writer(by)
        self.data["served"] = served

    def get_served(self) -> Served | None:
        """See elasticmoe.common.store."""
        self._check()
        return self.data.get("served")

    def put_instance(self, by: Writer, instance: str) -> None:
        """See elasticmoe.common.store."""
        self._check_writer(by)
        self.data["instance"] = instance

    def get_instance(self) -> str:
        """See elasticmoe.common.store."""
        self._check()
        return str(self.data.get("instance", ""))

    def put_policy(self, by: Writer, policy: object) -> None:
        """See elasticmoe.common.store."""
        self._check_writer(by)
        self.data["policy"] = policy

    def get_policy(self, _: object) -> Any:
        """See elasticmoe.common.store."""
        self._check()
        return self.data.get("policy")

    def append_event(self, by: Writer, event: object) -> None:
        """See elasticmoe.common.store."""
        self._check_writer(by)

    def append_decision(self, by: Writer, decision: Any) -> None:
        """See common.store. What was written is kept here also when the store is emptied: it is for the checker."""
        self._check_writer(by)
        self.decisions.append(msgspec.msgpack.encode(decision))

    def remember(self) -> None:
        """A snapshot on its disk."""
        self._earlier = dict(self.data)

    def roll_back(self) -> None:
        """It comes back with that snapshot."""
        self._sim.note("store: rolled back")
        self.data = dict(self._earlier)
        self.num_losses += 1

    def wipe(self) -> None:
        """It comes back empty."""
        self._sim.note("store: emptied")
        self.data = {}
        self.num_losses += 1


class StoreReserve(DiskReserve):
    """The product's reserve, with a flag of the store for a file."""

    def __init__(self, store: Store, holder: str) -> None:
        super().__init__(Path())
        self._store = store
        self._holder = holder

    def take(self, nbytes: int) -> None:
        """See elasticmoe.services.scaler.store.reserve."""
        if self._store.is_full:
            raise Unavailable("no room for an operation's records", code="storage_full")
        self._store.reserved_by = self._holder

    def give_up(self) -> bool:
        """See elasticmoe.services.scaler.store.reserve."""
        was, self._store.reserved_by = self._store.reserved_by, ""
        if was and not self._store.is_reserve_eaten:
            self._store.is_full = False
        return bool(was)


class DiskFence(Fence):
    """The product's fence, with a dictionary for a disk."""

    def __init__(self, disk: dict[str, int], name: str) -> None:
        self._disk = disk
        self._name = name
        super().__init__(Path(), name)

    def _read(self) -> int:
        return self._disk.get(self._name, 0)

    @contextmanager
    def _locked(self, epoch: int, wait_s: float | None = None) -> Iterator[None]:
        yield

    def _write(self, epoch: int) -> None:
        self._disk[self._name] = epoch


class NotingFence(DiskFence):
    """The world looks whom the resource obeys."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world.disk, name)
        self._world = world

    def check(self, epoch: int, sender: str) -> None:
        """See Fence."""
        super().check(epoch, sender)
        self._world.note_fence(self._name, epoch)
