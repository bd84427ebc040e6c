"""elasticmoe.native.host: reservations and mappings, page allocation, bulk memory work, as Python sees them."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from elasticmoe.native import host

PAGE = mmap.PAGESIZE


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 8 * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def space() -> Iterator[host.Reservation]:
    space = host.Reservation(16 * PAGE)
    yield space
    space.close()


def bytes_at(addr: int, nbytes: int) -> bytes:
    return ctypes.string_at(addr, nbytes)


def test_reservation_has_the_asked_size_and_alignment():
    space = host.Reservation(4 * PAGE, alignment=2 << 20)
    assert space.nbytes == 4 * PAGE
    assert space.base % (2 << 20) == 0
    assert space.mapped() == []
    space.close()
    space.close()
    assert (space.base, space.nbytes) == (0, 0)


@pytest.mark.parametrize(("nbytes", "alignment"), [(0, PAGE), (-PAGE, PAGE), (100, PAGE), (PAGE, 3 * PAGE), (PAGE, 8)])
def test_bad_reservations_are_refused(nbytes, alignment):
    with pytest.raises(ValueError):
        host.Reservation(nbytes, alignment)


def test_mappings_share_the_file(fd, space):
    space.map(4 * PAGE, fd, 2 * PAGE, 2 * PAGE, writable=True)
    os.pwrite(fd, b"expert", 2 * PAGE)
    assert bytes_at(space.base + 4 * PAGE, 6) == b"expert"
    host.copy(space.base + 5 * PAGE, space.base + 4 * PAGE, 6)
    assert os.pread(fd, 6, 3 * PAGE) == b"expert"
    assert space.mapped() == [(4 * PAGE, 2 * PAGE)]
    space.unmap(4 * PAGE, 2 * PAGE)
    assert space.mapped() == []


def test_wrong_mappings_are_refused(fd, space):
    space.map(2 * PAGE, fd, 0, 2 * PAGE, True)
    for offset, fd_offset, nbytes in [
        (3 * PAGE, 0, PAGE),
        (PAGE, 0, 2 * PAGE),
        (5, 0, PAGE),
        (15 * PAGE, 0, 2 * PAGE),
        (8 * PAGE, 7 * PAGE, 2 * PAGE),
        (-PAGE, 0, PAGE),
        (8 * PAGE, -PAGE, PAGE),
    ]:
        with pytest.raises(ValueError):
            space.map(offset, fd, fd_offset, nbytes, True)
    with pytest.raises(ValueError, match="exactly"):
        space.unmap(2 * PAGE, PAGE)
    with pytest.raises(OSError, match="fstat") as caught:
        space.map(8 * PAGE, 987, 0, PAGE, True)
    assert caught.value.errno == errno.EBADF


def test_many_mappings_are_all_or_none(fd, space):
    with pytest.raises(ValueError, match="overlaps"):
        space.map_many([(0, fd, 0, PAGE), (0, fd, PAGE, PAGE)], True)
    assert space.mapped() == []
    readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        space.map_many([(0, fd, 0, PAGE), (PAGE, readonly, 0, PAGE)], True)
    assert space.mapped() == []
    space.map_many([(0, fd, 0, PAGE), (PAGE, readonly, 0, PAGE)], False, populate=True)
    assert space.mapped() == [(0, PAGE), (PAGE, PAGE)]
    os.close(readonly)


def test_a_mapping_outlives_its_descriptor(space):
    fd = os.memfd_create("short-lived")
    os.write(fd, b"kept".ljust(PAGE))
    space.map(0, fd, 0, PAGE, False)
    os.close(fd)
    assert bytes_at(space.base, 4) == b"kept"
    assert isinstance(space.collapse(0, PAGE), bool)
    with pytest.raises(ValueError, match="multiples of a large page"):
        space.make_large(0, PAGE, 3 * PAGE)


def test_pages_are_taken_and_given_back(fd):
    host.allocate(fd, PAGE, 3 * PAGE)
    assert os.fstat(fd).st_blocks * 512 == 3 * PAGE
    os.pwrite(fd, b"x" * PAGE, PAGE)
    host.punch_hole(fd, PAGE, PAGE)
    assert os.fstat(fd).st_blocks * 512 == 2 * PAGE
    assert os.pread(fd, 1, PAGE) == b"\0"
    host.allocate(fd, 8 * PAGE, PAGE)
    assert os.fstat(fd).st_size == 9 * PAGE
    with pytest.raises(ValueError):
        host.allocate(fd, 0, 0)
    with pytest.raises(OSError, match="fallocate") as caught:
        host.punch_hole(987, 0, PAGE)
    assert caught.value.errno == errno.EBADF


def test_reading_is_exact(fd, space, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 40)
    space.map(0, fd, 0, 4 * PAGE, True)
    with path.open("rb") as file:
        host.read_into(file.fileno(), 3, space.base, 10_000)
        assert bytes_at(space.base, 10_000) == (bytes(range(256)) * 40)[3:10_003]
        with pytest.raises(OSError, match="short read") as caught:
            host.read_into(file.fileno(), 1, space.base, 256 * 40)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="pread") as caught:
            host.read_into(file.fileno(), 0, space.base + 8 * PAGE, 10)  # reserved, not mapped
        assert caught.value.errno == errno.EFAULT


def test_checksum_is_xxh64(fd, space):
    space.map(0, fd, 0, 8 * PAGE, True)
    os.pwrite(fd, b"Nobody inspects the spammish repetition", 0)
    assert host.checksum(space.base, 0) == 0xEF46DB3751D8E999
    assert host.checksum(space.base, 39) == 0xFBCEA83C8A378BF1
    assert host.checksum(space.base, 8 * PAGE) != host.checksum(space.base + 1, 8 * PAGE - 1)


def test_overlapping_and_absurd_copies_are_refused(fd, space):
    space.map(0, fd, 0, 8 * PAGE, True)
    for dst, src, nbytes in [(1, 0, 2), (0, 1, 2), (0, PAGE, -1)]:
        with pytest.raises(ValueError):
            host.copy(space.base + dst, space.base + src, nbytes)
    with pytest.raises(ValueError):
        host.copy(0, space.base, 1)
    with pytest.raises(ValueError):
        host.checksum(2**64 - 2, 10)
