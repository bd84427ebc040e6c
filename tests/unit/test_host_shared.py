"""Memory that processes of a host share: sized once, opened by others, outliving whoever made it."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from elasticmoe.common import machine
from elasticmoe.common.host_shared import HostShared
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from elasticmoe.native import host

PAGE = 4096


def test_others_see_what_is_written_and_keep_it_after_its_maker() -> None:
    made = HostShared.create("test")
    assert (made.nbytes, made.address) == (0, 0)
    made.resize(2 * PAGE)
    other = HostShared.open(os.dup(made.fd), 2 * PAGE)
    ctypes.memmove(made.address + PAGE, b"content", 7)
    made.close()
    assert ctypes.string_at(other.address + PAGE, 7) == b"content"
    other.close()
    other.close()


def test_pages_are_made_when_they_are_populated() -> None:
    shared = HostShared.create("test")
    shared.resize(4 * PAGE)
    assert os.fstat(shared.fd).st_blocks == 0
    shared.populate(PAGE, 2 * PAGE)
    assert os.fstat(shared.fd).st_blocks * 512 == 2 * PAGE
    shared.close()


def test_a_machine_without_memory_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = HostShared.create("test")
    shared.resize(4 << 20)

    def fail(*_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(host, "allocate", fail)
    with pytest.raises(DoesNotFit, match=r"no memory for 4\.00 KiB"):
        shared.populate(0, PAGE)
    monkeypatch.setattr(machine, "group_room", lambda: 1 << 20)
    with pytest.raises(DoesNotFit, match=r"control group has room for 1\.00 MiB more"):
        shared.populate(0, 2 << 20)
    shared.close()


@pytest.mark.parametrize("nbytes", [2 * PAGE, 100, 0, -PAGE])
def test_what_is_no_such_memory_is_refused_and_nothing_stays_open(nbytes: int) -> None:
    before = set(os.listdir("/proc/self/fd"))
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGE)
    with pytest.raises(DeviceError, match="cannot be opened") as caught:
        HostShared.open(fd, nbytes)
    assert caught.value.code == "invalid_extent"
    assert set(os.listdir("/proc/self/fd")) == before
