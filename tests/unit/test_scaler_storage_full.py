"""A scaler without room for what it must write: it refuses orders, says why, and goes on when there is room again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.errors import Unavailable
from elasticmoe.common.store import Event, Writer, _guard
from elasticmoe.common.wording import size
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.store import journal as journal_module
from elasticmoe.services.scaler.store.journal import Journal
from elasticmoe.services.scaler.store.lease import Lease
from elasticmoe.services.scaler.store.reserve import DiskReserve, bytes_of
from tests.clocks import PlayedClock
from tests.procs.waiting import wait_until
from tests.unit.reserves import NO_RESERVE
from tests.unit.transitions import UP, operation_of

FULL = Unavailable("store takes no writes: it is out of memory or disk", code="storage_full")


class FakeStore:
    """Leases and events; `error` is what each write raises."""

    def __init__(self) -> None:
        self.error: Unavailable | None = None
        self.fence = 0
        self.holder = ""
        self.events: list[Event] = []
        self.operation: Operation | None = None
        self.num_ended = 0

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

    def put_operation(self, by: Writer, operation: Operation | None) -> str:
        self._check()
        self.operation = operation
        return ""

    def end_operation(self, by: Writer, operation: Operation) -> str:
        self._check()
        self.operation = None
        self.num_ended += 1
        return ""

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

    while isinstance(got := lease.attempt(), str):
        reasons.append((lease.why_not.code, store.holder))
        fence.is_full = len(reasons) < 3
    assert got == fence.epoch == store.fence
    assert reasons == [("storage_full", "")] * 3  # and the lease was given back each time
    lease.release()


def test_a_lease_that_cannot_be_renewed_for_want_of_room_refuses_orders(tmp_path: Path) -> None:
    store = FakeStore()
    lease = Lease(store, "scaler:a", 100, Fence(tmp_path, "scaler"))  # type: ignore[arg-type]
    lease.start()
    assert lease.attempt() == 1
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
    journal = Journal(store, "scaler:a", lambda _: None, lambda: None, lambda: None, NO_RESERVE, SYSTEM_CLOCK)
    journal.start()
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


# ---- room that is reserved -------------------------------------------------------------------------------------------


class Scene:
    """A journal, its store, and the folder of the store's files."""

    def __init__(self, folder: Path) -> None:
        self.store: Any = FakeStore()
        (folder / "appendonlydir").mkdir()
        self.file = folder / "reserve"
        self.now = 0.0
        clock, reserve = PlayedClock(lambda: self.now), DiskReserve(folder)
        self.journal = Journal(self.store, "a", lambda _: None, lambda: None, lambda: None, reserve, clock)
        self.journal.start()
        self.journal.act_under(1)

    def put(self, operation: Operation) -> None:
        self.journal.put(operation)
        wait_until(lambda: self.journal.is_durable(operation), "the operation is written")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    scene = Scene(tmp_path)
    yield scene
    scene.store.error = None
    scene.journal.close()


def test_room_is_there_while_an_operation_runs_and_gone_when_its_end_is_written(scene: Scene) -> None:
    operation = operation_of(UP)
    scene.journal.reserve(operation)
    blocks = scene.file.stat().st_blocks
    assert blocks * 512 >= bytes_of(operation) == scene.file.stat().st_size
    scene.put(operation)
    assert scene.file.exists()
    scene.journal.end(operation)
    wait_until(lambda: not scene.file.exists(), "nothing is reserved")
    assert scene.store.num_ended == 1


def test_the_next_operations_room_outlives_the_end_of_the_one_before(scene: Scene) -> None:
    first, second = operation_of(UP), msgspec.structs.replace(operation_of(UP), op_id="second")
    scene.journal.reserve(first)
    scene.put(first)
    scene.store.error = FULL  # so that the end of the first is written after the second has begun
    scene.journal.end(first)
    wait_until(lambda: not scene.file.exists(), "it was given up")
    scene.journal.reserve(second)
    scene.store.error = None
    scene.put(second)
    assert scene.store.num_ended == 1
    assert scene.file.exists()


def test_a_store_without_room_gets_what_was_reserved_and_time_to_find_it(scene: Scene) -> None:
    operation = operation_of(UP)
    scene.journal.reserve(operation)
    scene.put(operation)
    scene.store.error = FULL
    scene.journal.put(msgspec.structs.replace(operation, phase="commit"))
    wait_until(lambda: not scene.file.exists(), "it was given up")
    assert scene.journal.no_room() == ""
    scene.now += journal_module.REOPEN_S
    assert scene.journal.no_room() == FULL.message  # somebody else took it
    scene.store.error = None
    wait_until(lambda: scene.journal.no_room() == "", "there is room again")


def test_what_was_given_up_is_reserved_again_once_the_store_has_found_room(scene: Scene) -> None:
    operation = operation_of(UP)
    scene.journal.reserve(operation)
    scene.store.error = FULL  # it has not looked yet since its disk was full
    scene.journal.put(operation)
    wait_until(lambda: not scene.file.exists(), "it was given up")
    scene.store.error = None
    wait_until(lambda: scene.file.exists() and scene.file.stat().st_size == bytes_of(operation), "it is reserved again")
    scene.store.error = FULL
    scene.journal.put(msgspec.structs.replace(operation, phase="commit"))
    wait_until(lambda: not scene.file.exists(), "it was given up once more")
    assert scene.journal.no_room() == ""
    scene.store.error = None
    scene.journal.end(operation)
    wait_until(lambda: scene.store.num_ended == 1 and not scene.file.exists(), "nothing is reserved for what has ended")


def test_without_room_for_all_records_nothing_is_held(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(fd: int, start: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    operation, before = operation_of(UP), len(os.listdir("/proc/self/fd"))
    with pytest.raises(Unavailable, match=f"need {size(bytes_of(operation))} .*: No space left") as refused:
        scene.journal.reserve(operation)
    assert refused.value.code == "storage_full"
    assert (scene.file.exists(), len(os.listdir("/proc/self/fd"))) == (False, before)


def test_what_an_earlier_scaler_reserved_stays_for_its_operation_only(scene: Scene) -> None:
    scene.file.touch()
    scene.journal.adopt(operation_of(UP))
    assert scene.file.exists()
    scene.journal.end(operation_of(UP))
    wait_until(lambda: not scene.file.exists(), "nothing is reserved")
    scene.file.touch()
    scene.journal.adopt(None)
    assert not scene.file.exists()


def test_nothing_is_reserved_beside_a_store_whose_files_are_elsewhere(tmp_path: Path) -> None:
    DiskReserve(tmp_path).take(1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_records_bytes_grow_with_the_plan_and_its_legs() -> None:
    one_leg = msgspec.structs.replace(operation_of(UP), num_legs=1)
    assert 0 < bytes_of(operation_of(None)) < bytes_of(one_leg) < bytes_of(operation_of(UP))
