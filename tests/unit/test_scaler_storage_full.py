"""A scaler without room for what it must write: it refuses orders, says why, and goes on when there is room again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import redis

from common.fence import Fence
from common.protocol.errors import Unavailable
from common.store import Event, Writer, _guard
from services.scaler.journal import Journal
from services.scaler.lease import Lease
from tests.procs.waiting import wait_until

FULL = Unavailable("store takes no writes: it is out of memory or disk", code="storage_full")


class FakeStore:
    """Leases and events; `error` is what each write raises."""

    def __init__(self) -> None:
        self.error: Unavailable | None = None
        self.fence = 0
        self.holder = ""
        self.events: list[Event] = []

    def acquire_lease(self, holder: str, lease_ms: int, fence_min: int) -> int | str:
        self._check()
        self.fence = max(self.fence, fence_min) + 1
        self.holder = holder
        return self.fence

    def renew_lease(self, by: Writer, lease_ms: int) -> bool:
        self._check()
        return True

    def release_lease(self, holder: str) -> None:
        self.holder = ""

    def append_decision(self, by: Writer, decision: Any) -> None: ...

    def append_event(self, by: Writer, event: Event) -> None:
        self._check()
        self.events.append(event)

    def get_epoch(self) -> int:
        return 0

    def journal_mark(self) -> str:
        return ""

    def _check(self) -> None:
        if self.error is not None:
            raise self.error


class FullFence(Fence):
    """A disk that takes nothing while `is_full`."""

    is_full = True

    def _write(self, epoch: int) -> None:
        if self.is_full:
            raise Unavailable(f"epoch {epoch} cannot be made durable: No space left on device", code="storage_full")
        super()._write(epoch)


def test_an_epoch_that_cannot_be_kept_is_not_acted_under(tmp_path: Path) -> None:
    store, fence = FakeStore(), FullFence(tmp_path, "scaler")
    lease = Lease(store, "scaler:a", 100, fence)  # type: ignore[arg-type]
    reasons: list[tuple[str, str]] = []

    def looks() -> bool:
        reasons.append((lease.why_not.code, store.holder))
        fence.is_full = len(reasons) < 4
        return False

    got = lease.acquire(looks)
    assert got == fence.epoch == store.fence
    assert reasons[0][0] == "not_ready"
    assert reasons[1:] == [("storage_full", "")] * 3  # and the lease was given back each time
    lease.release()


def test_a_lease_that_cannot_be_renewed_for_want_of_room_refuses_orders(tmp_path: Path) -> None:
    store = FakeStore()
    lease = Lease(store, "scaler:a", 100, Fence(tmp_path, "scaler"))  # type: ignore[arg-type]
    lease.acquire(lambda: False)
    lease.check_room()

    def is_refused() -> bool:
        try:
            lease.check_room()
        except Unavailable as error:
            return error.code == "storage_full"
        return False

    store.error = FULL
    wait_until(is_refused, "the want of room was noticed")
    store.error = None
    wait_until(lambda: not is_refused(), "there is room again")
    store.error = Unavailable("store does not answer", code="store_unavailable")
    threading.Event().wait(0.15)  # a renewal fails: that is an outage, in which operations wait
    lease.check_room()
    lease.check()
    lease.release()


def test_a_journal_without_room_says_so_until_it_could_write() -> None:
    store: Any = FakeStore()
    journal = Journal(store, "scaler:a", lambda _: None, lambda: None, lambda: None)
    journal.act_under(1)
    try:
        journal.check_room()
        store.error = FULL
        journal.event(Event("decision", "because", 1, "scaler:a", 0.0))

        def code() -> str:
            try:
                journal.check_room()
            except Unavailable as error:
                return error.code
            return ""

        wait_until(lambda: code() == "storage_full", "the want of room was noticed")
        store.error = None
        wait_until(lambda: code() == "", "there is room again")
        assert [event.kind for event in store.events] == ["decision"]
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), True),
        (redis.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"), True),
        (redis.ReadOnlyError("You can't write against a read only replica."), False),
        (redis.ResponseError("max number of clients reached"), False),
        (redis.TimeoutError(), False),
    ],
)
def test_refusals_of_a_full_store_are_told_apart(error: redis.RedisError, is_full: bool) -> None:
    def refuse() -> None:
        raise error

    with pytest.raises(Unavailable) as caught:
        _guard(refuse)
    assert caught.value.code == ("storage_full" if is_full else "store_unavailable")
