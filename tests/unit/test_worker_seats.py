"""The file of a pool's seats: what is read back, and what is not. Who holds a lock: procs/test_pool_death.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol.codec import encode
from elasticmoe.common.protocol.errors import ElasticMoEError, Unavailable
from elasticmoe.common.protocol.limits import ERROR_TEXT_CHARS_MAX, NAME_CHARS_MAX, PROTOCOL_VERSION, RANKS_MAX
from elasticmoe.common.protocol.pool import StartRank
from elasticmoe.common.protocol.scaler import RankReady
from elasticmoe.services.worker.pool import seats
from elasticmoe.services.worker.pool.seats import RECORD_BYTES, SeatLock, Seats, path_of

WIDE = "\U0001f600"  # four bytes


def seat(slot: int, name: str = "rank-r0t0:1") -> StartRank:
    return StartRank(RankId(slot, 0), slot, "host:0", name, 1, 16, 4, 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return path_of(tmp_path, "pool")


def test_what_a_rank_puts_on_file_is_read_back(path: Path) -> None:
    file = Seats(path)
    assert path.stat().st_size == RANKS_MAX * RECORD_BYTES
    last = RANKS_MAX - 1
    assert (file.read(last), file.holder(last)) == (None, 0)
    hold = SeatLock(path, seat(last))
    record = file.read(last)
    assert record is not None
    assert (record.pid, record.seat, record.ready, record.failure) == (os.getpid(), seat(last), None, None)
    ready = RankReady(RankId(last, 0), last, "rank-r0t0:1", 1.5, 2.5)
    hold.tell_ready(ready)
    hold.tell_failure(ElasticMoEError("no luck", code="bad_luck"))
    record = file.read(last)
    assert record is not None
    assert record.failure is not None
    assert (record.ready, record.failure.code) == (ready, "bad_luck")
    assert file.read(last - 1) is None
    Seats(path).close()  # it is there: nothing is lost
    assert file.read(last) == record
    file.close()


def test_the_longest_record_fits(path: Path) -> None:
    file, name = Seats(path), WIDE * NAME_CHARS_MAX
    hold = SeatLock(path, StartRank(RankId(0, 0), 0, name, name, 1, 16, 4, 64))
    hold.tell_ready(RankReady(RankId(0, 0), 0, name, 1.5, 2.5))
    hold.tell_failure(ElasticMoEError(WIDE * (2 * ERROR_TEXT_CHARS_MAX), code=name))
    record = file.read(0)
    assert record is not None
    assert record.failure is not None
    assert record.failure.message == WIDE * ERROR_TEXT_CHARS_MAX
    assert file.read(1) is None
    file.close()


@pytest.mark.parametrize("change", ["a bit", "the length", "the version", "nothing at all"])
def test_what_cannot_be_read_is_no_record(path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Seats(path)
    if change == "the version":
        now, later = (b"\xa7version" + bytes([version]) for version in (PROTOCOL_VERSION, PROTOCOL_VERSION + 1))
        newer = encode(seats.SeatRecord(1, seat(2)), sender="rank:1").replace(now, later)
        assert later in newer
        monkeypatch.setattr(seats, "encode", lambda *_, **__: newer)
    SeatLock(path, seat(2))
    with open(path, "r+b") as raw:
        raw.seek(2 * RECORD_BYTES)
        data = bytearray(raw.read(RECORD_BYTES))
        if change == "a bit":
            data[20] ^= 1
        elif change == "the length":
            data[:4] = b"\xff\xff\xff\xff"
        elif change == "nothing at all":
            data[:] = bytes(RECORD_BYTES)
        raw.seek(2 * RECORD_BYTES)
        raw.write(data)
    assert file.read(2) is None
    file.close()


def test_a_full_disk_is_a_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Unavailable, match="finds no room: No space left") as caught:
            Seats(path)
        assert (caught.value.code, len(os.listdir("/proc/self/fd"))) == ("storage_full", before)
    Seats(path).close()
    hold = SeatLock(path, seat(0))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Unavailable, match="cannot be written") as caught:
        hold.tell_ready(RankReady(RankId(0, 0), 0, "rank-r0t0:1", 1.5, 2.5))
    assert caught.value.code == "storage_full"


def test_a_file_that_is_not_there_is_a_refusal(path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be locked"):
        SeatLock(path, seat(0))
