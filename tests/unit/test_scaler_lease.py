"""Scalers that share one state directory, and a store that forgets: no epoch is acted under twice, none falls."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import elasticmoe.common.fence
from elasticmoe.common.fence import Fence
from elasticmoe.common.protocol.errors import Fenced, Unavailable
from elasticmoe.common.store import Writer
from elasticmoe.services.scaler.store.lease import Lease


class ForgetfulStore:
    """Gives out leases as a store does that may be emptied at any time."""

    def __init__(self) -> None:
        self.fence = 0
        self.holder = ""

    def acquire_lease(self, holder: str, lease_ms: int, fence_min: int) -> int | str:
        if self.holder not in ("", holder):
            return self.holder
        self.holder, self.fence = holder, max(self.fence, fence_min) + 1
        return self.fence

    def renew_lease(self, by: Writer, lease_ms: int) -> bool:
        return self.fence <= by.fence

    def release_lease(self, holder: str) -> None:
        if self.holder == holder:
            self.holder = ""

    def wipe(self) -> None:
        self.fence, self.holder = 0, ""


def lease_of(store: ForgetfulStore, name: str, folder: Path) -> Lease:
    return Lease(store, f"scaler:{name}", 100, Fence(folder, "scaler"))  # type: ignore[arg-type]


def test_who_waited_gets_an_epoch_above_the_ones_that_were_used_meanwhile(tmp_path: Path) -> None:
    store = ForgetfulStore()
    first, waiting = lease_of(store, "a", tmp_path), lease_of(store, "b", tmp_path)
    assert first.attempt() == 1
    assert waiting.attempt() == "scaler:a holds it"
    store.wipe()
    assert waiting.attempt() == 2


def test_an_epoch_that_somebody_claimed_first_is_given_back(tmp_path: Path) -> None:
    store = ForgetfulStore()
    slow, quick = lease_of(store, "a", tmp_path), lease_of(store, "b", tmp_path)
    given = store.acquire_lease

    def overtaken(holder: str, lease_ms: int, fence_min: int) -> int | str:
        """The answer is on its way when the store is emptied and another one gets the same epoch."""
        epoch = given(holder, lease_ms, fence_min)
        store.acquire_lease = given  # type: ignore[method-assign]
        store.wipe()
        assert quick.attempt() == epoch
        return epoch

    store.acquire_lease = overtaken  # type: ignore[method-assign]
    assert slow.attempt() == "scaler:a was given epoch 1; epoch 1 has been seen"
    assert store.holder == "scaler:b"  # whose lease was not released
    assert slow.why_not.code == "not_ready"
    store.release_lease("scaler:b")
    assert slow.attempt() == 2


def test_a_stale_scaler_sees_its_successor_on_the_disk_where_the_store_was_emptied(tmp_path: Path) -> None:
    store = ForgetfulStore()
    stale, new = lease_of(store, "a", tmp_path), lease_of(store, "b", tmp_path)
    assert stale.attempt() == 1
    assert stale.renew() is True
    store.release_lease("scaler:a")
    assert new.attempt() == 2
    store.wipe()
    assert stale.renew() is False
    with pytest.raises(Fenced, match="another scaler"):
        stale.check()
    assert new.renew() is True
    new.check()


def test_a_fence_that_another_process_raised_refuses_and_does_not_fall(tmp_path: Path) -> None:
    old, new = Fence(tmp_path, "rank-0"), Fence(tmp_path, "rank-0")
    old.check(1, "scaler:a")
    new.check(3, "scaler:c")
    for epoch in (1, 2):
        with pytest.raises(Fenced, match="epoch 3 has been seen"):
            old.check(epoch, "scaler:a")
    assert (old.num_refused, Fence(tmp_path, "rank-0").epoch) == (2, 3)


def test_one_of_many_claims_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elasticmoe.common.fence, "LOCK_SECONDS_MAX", 60.0)  # of eight, on a disk with other work
    fences = [Fence(tmp_path, "scaler") for _ in range(8)]
    start, won, lost = threading.Barrier(len(fences)), [], []

    def claim(fence: Fence, name: str) -> None:
        start.wait(60)
        for epoch in range(1, 6):
            try:
                fence.claim(epoch, name)
                won.append(epoch)
            except Fenced:
                lost.append(epoch)

    threads = [threading.Thread(target=claim, args=(fence, str(i))) for i, fence in enumerate(fences)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(set(won))
    assert len(won) + len(lost) == 5 * len(fences)
    assert Fence(tmp_path, "scaler").epoch == max(won) == 5


@pytest.mark.parametrize("use", [lambda fence: fence.claim(2, "b"), lambda fence: fence.check(2, "b")])
def test_a_process_that_stopped_with_the_lock_holds_up_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Fence], None]
) -> None:
    monkeypatch.setattr(elasticmoe.common.fence, "LOCK_SECONDS_MAX", 0.05)
    fence = Fence(tmp_path, "scaler")
    fence.claim(1, "a")
    with open(tmp_path / "fence-scaler.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match=r"locked by another process for 0\.05 s"):
            use(fence)
    assert fence.epoch == 1
    use(fence)
    assert fence.epoch == 2


def test_a_fence_that_cannot_be_read_lets_nothing_pass(tmp_path: Path) -> None:
    fence, store = Fence(tmp_path, "scaler"), ForgetfulStore()
    lease = Lease(store, "scaler:a", 100, fence)  # type: ignore[arg-type]
    assert lease.attempt() == 1
    for content in ("", "x"):
        (tmp_path / "fence-scaler").write_text(content)
        for use in (fence.refresh, lambda: fence.check(1, "a"), lambda: fence.claim(2, "a")):
            with pytest.raises(Unavailable, match="fence-scaler cannot be read"):
                use()
        with pytest.raises(Unavailable, match="cannot be read"):
            Fence(tmp_path, "scaler")
        assert lease.renew() is True  # not known to be lost
        lease.check()
    (tmp_path / "fence-scaler").write_text("1")
    fence.check(1, "a")


def test_a_question_under_a_newer_epoch_fences_the_older_ones(tmp_path: Path) -> None:
    fence = Fence(tmp_path, "hmm")
    fence.check(1, "scaler:a")
    fence.heed(0)
    fence.heed(2)
    with pytest.raises(Fenced, match="epoch 2 has been seen"):
        Fence(tmp_path, "hmm").check(1, "scaler:a")
    fence.check(2, "scaler:b")


def test_a_question_is_no_error_where_its_epoch_cannot_be_kept(tmp_path: Path) -> None:
    fence = Fence(tmp_path, "hmm")
    fence.check(1, "scaler:a")
    (tmp_path / "fence-hmm.new").mkdir()  # nothing can be written there
    fence.heed(2)
    assert fence.epoch == 1
    with pytest.raises(Unavailable, match="epoch 2 cannot be made durable"):
        fence.check(2, "scaler:b")


def test_a_question_does_not_wait_for_who_stopped_with_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is asked many times a second, and all others wait for it."""

    def sleep(_: float) -> None:
        raise AssertionError("a question waits")

    monkeypatch.setattr(elasticmoe.common.fence.time, "sleep", sleep)
    fence = Fence(tmp_path, "rank-0")
    fence.check(1, "scaler:a")
    with open(tmp_path / "fence-rank-0.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fence.heed(2)
    assert fence.epoch == 1
    fence.heed(2)
    assert fence.epoch == 2
