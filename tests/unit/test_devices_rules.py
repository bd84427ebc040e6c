"""Every rule of device memory is refused with its code, and a refusal changes nothing.

Longer than other files because it is the contract of all devices, which a driver that is there is asked to keep as one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from elasticmoe.common.devices.base import Device, FdToken, Handle, KeyToken, Range
from elasticmoe.common.devices.factory import open_device
from elasticmoe.common.devices.rules import Token
from elasticmoe.common.protocol.errors import DeviceError
from tests.devices.backends import ALL_KINDS, Machine, machine

PAGE = 2 << 20


@dataclass
class World:
    """A machine with an owner of two devices and a user of the same two, which are two processes."""

    machine: Machine
    owner: Device
    owner_other: Device
    user: Device
    user_other: Device

    def local(self, pages: int = 1) -> Handle:
        return self.owner.create(pages * PAGE, "kv")

    def imported(self, pages: int = 1) -> Handle:
        return self.user.import_(self.owner.export(self.local(pages)))

    def third(self, budget: int) -> Device:
        """The first device in one more process, which may import what the owner exports."""
        made = self.machine.process().open(0, PAGE, budget)
        self.owner.admit([self.user.importer_number(0), made.importer_number(0)])
        return made


@pytest.fixture(params=ALL_KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with machine(request.param, tmp_path, monkeypatch) as made:
        owner, user = made.process(), made.process()
        devices = [
            owner.open(0, PAGE, 64 * PAGE),
            owner.open(1, PAGE, 64 * PAGE),
            user.open(0, PAGE),
            user.open(1, PAGE),
        ]
        for device in devices[:2]:
            device.admit([devices[2].importer_number(0)])
        yield World(made, *devices)
        for device in devices:
            device.close()


def refuses(code: str, act: Callable[[], object]) -> None:
    with pytest.raises(DeviceError) as caught:
        act()
    assert caught.value.code == code


@pytest.mark.parametrize("nbytes", [0, -PAGE, 1, PAGE + 1])
def test_sizes_are_granular(world: World, nbytes: int) -> None:
    refuses("not_granular", lambda: world.owner.create(nbytes, "kv"))
    refuses("not_granular", lambda: world.owner.reserve(nbytes))
    token = world.owner.export(world.local())
    refuses("not_granular", lambda: world.user.import_(token._replace(nbytes=nbytes)))
    if isinstance(token, FdToken):
        refuses("not_granular", lambda: world.user.import_(token._replace(offset=7)))


@pytest.mark.parametrize(("offset", "code"), [(1, "not_granular"), (-PAGE, "out_of_range"), (3 * PAGE, "out_of_range")])
def test_mappings_lie_in_the_range(world: World, offset: int, code: str) -> None:
    range_ = world.owner.reserve(4 * PAGE)
    refuses(code, lambda: world.owner.map(range_, offset, world.local(2), True))


@pytest.mark.parametrize(("offset", "pages"), [(2, 2), (1, 2), (3, 1), (0, 8), (2, 1)])
def test_nothing_is_mapped_over_a_live_mapping(world: World, offset: int, pages: int) -> None:
    range_ = world.owner.reserve(16 * PAGE)
    world.owner.map(range_, 2 * PAGE, world.local(2), True)
    other = world.local(pages)
    refuses("mapping_live", lambda: world.owner.map(range_, offset * PAGE, other, True))
    assert other.num_mappings == 0
    world.owner.unmap(range_, 2 * PAGE)
    world.owner.map(range_, offset * PAGE, other, True)


def test_many_parts_are_mapped_all_or_none(world: World) -> None:
    range_ = world.owner.reserve(8 * PAGE)
    first, second = world.local(2), world.local()
    for parts in ([(0, first), (PAGE, second)], [(0, first), (9 * PAGE, second)]):
        with pytest.raises(DeviceError):
            world.owner.map_many(range_, parts, True)
        assert (range_.starts, first.num_mappings) == ([], 0)
    world.owner.map_many(range_, [(2 * PAGE, second), (0, first)], True)
    assert range_.starts == [0, 2 * PAGE]
    world.owner.map_many(range_, [], True)


def test_a_range_holds_local_or_imported_handles(world: World) -> None:
    user = world.third(4 * PAGE)
    range_ = user.reserve(4 * PAGE)
    local, imported = user.create(PAGE, "kv"), user.import_(world.owner.export(world.local()))
    refuses("mixed_range", lambda: user.map_many(range_, [(0, local), (PAGE, imported)], True))
    user.map(range_, 0, imported, True)
    refuses("mixed_range", lambda: user.map(range_, PAGE, local, True))
    user.unmap(range_, 0)
    user.map(range_, 0, local, True)  # an empty range may hold either
    refuses("mixed_range", lambda: user.map(range_, PAGE, imported, True))
    user.close()


def test_devices_do_not_mix(world: World) -> None:
    foreign_range = world.owner_other.reserve(PAGE)
    own = world.local()
    own_range = world.owner.reserve(PAGE)
    foreign = world.owner_other.create(PAGE, "kv")
    refuses("other_device", lambda: world.owner.map(foreign_range, 0, own, True))
    refuses("other_device", lambda: world.owner.map(own_range, 0, foreign, True))
    refuses("other_device", lambda: world.owner.release(foreign))
    refuses("other_device", lambda: world.owner.unreserve(foreign_range))


def test_a_handle_is_imported_once_per_process_whatever_the_descriptor(world: World) -> None:
    token = world.owner.export(world.local())
    handle = world.user.import_(token)
    refuses("already_imported", lambda: world.user.import_(token))
    if isinstance(token, FdToken):
        again = os.dup(token.fd)
        refuses("already_imported", lambda: world.user.import_(token._replace(fd=again)))
        refuses("already_imported", lambda: world.user_other.import_(token))  # any of this host's may map it
        os.close(again)
    world.user.release(handle)
    world.user.import_(token)


def test_a_token_names_one_handle(world: World) -> None:
    """Also where another one has the place, and so the id, that it had."""
    first, second = world.local(), world.local()
    token = world.owner.export(first)
    known = world.user.import_(token)
    assert world.user.is_named(known, token)
    assert not world.user.is_named(known, world.owner.export(second))
    assert not world.user.is_named(known, token._replace(nbytes=2 * PAGE))
    place = first.place
    world.owner.release(first)
    again = world.local()
    assert again.place == place
    # On the host a place is the memory; elsewhere a key tells one handle from its successor there.
    assert world.user.is_named(known, world.owner.export(again)) == (world.machine.kind == "host")
    other: Token = KeyToken(1, PAGE) if isinstance(token, FdToken) else FdToken(0, 0, PAGE)
    refuses("invalid_token", lambda: world.user.is_named(known, other))


def test_a_process_exports_or_imports(world: World) -> None:
    handle = world.local()
    token = world.owner.export(handle)
    refuses("export_and_import", lambda: world.owner.import_(token))
    refuses("export_and_import", lambda: world.owner_other.import_(token))
    user = world.third(PAGE)
    user.import_(world.owner.export(handle))
    own = user.create(PAGE, "kv")
    refuses("export_and_import", lambda: user.export(own))
    user.close()


def test_only_local_handles_are_exported(world: World) -> None:
    imported = world.imported()
    refuses("not_local", lambda: world.user.export(imported))


def test_unmap_undoes_exactly_one_map(world: World) -> None:
    range_ = world.owner.reserve(8 * PAGE)
    handle = world.local(2)
    world.owner.map(range_, PAGE, handle, True)
    world.owner.map(range_, 3 * PAGE, world.local(), True)
    for offset in (0, 2 * PAGE, 4 * PAGE):
        refuses("not_mapped", partial(world.owner.unmap, range_, offset))
    world.owner.unmap(range_, PAGE)
    refuses("not_mapped", lambda: world.owner.unmap(range_, PAGE))
    assert range_.starts == [3 * PAGE]


def test_what_could_not_be_unmapped_is_mapped_still(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the limit of mappings: its handle must not be given back under it."""

    def fail(*_: object) -> None:
        raise DeviceError("no more mappings")

    owner, range_, handle = world.owner, world.owner.reserve(2 * PAGE), world.local()
    owner.map(range_, PAGE, handle, True)
    with monkeypatch.context() as patched:
        patched.setattr(owner, "_unmap", fail)
        with pytest.raises(DeviceError, match="no more mappings"):
            owner.unmap(range_, PAGE)
    refuses("still_mapped", lambda: owner.release(handle))
    refuses("mapping_live", lambda: owner.map(range_, PAGE, handle, True))
    owner.write_bytes(range_.address(PAGE), b"abc")
    owner.unmap(range_, PAGE)
    refuses("not_mapped", lambda: owner.read_bytes(range_.address(PAGE), 3))
    owner.release(handle)


def test_mapped_handles_and_ranges_are_not_given_back(world: World) -> None:
    range_, handle = world.owner.reserve(2 * PAGE), world.local()
    world.owner.map_many(range_, [(0, handle), (PAGE, handle)], True)
    refuses("still_mapped", lambda: world.owner.release(handle))
    refuses("still_mapped", lambda: world.owner.unreserve(range_))
    world.owner.unmap(range_, 0)
    refuses("still_mapped", lambda: world.owner.release(handle))
    world.owner.unmap(range_, PAGE)
    world.owner.release(handle)
    world.owner.unreserve(range_)


def test_what_is_released_is_not_used_again(world: World) -> None:
    range_, handle = world.owner.reserve(PAGE), world.local()
    world.owner.release(handle)
    refuses("released", lambda: world.owner.release(handle))
    refuses("released", lambda: world.owner.map(range_, 0, handle, True))
    refuses("released", lambda: world.owner.export(handle))
    world.owner.unreserve(range_)
    refuses("released", lambda: world.owner.unreserve(range_))
    refuses("released", lambda: world.owner.wrap(range_, 0, (1,), None, "float32"))
    world.owner.close()
    refuses("released", lambda: world.owner.create(PAGE, "kv"))
    refuses("released", lambda: world.owner.reserve(PAGE))


def test_read_only_handles_are_mapped_read_only(world: World) -> None:
    handle = world.user.import_(world.owner.export(world.owner.create(PAGE, "weights")))
    range_ = world.user.reserve(PAGE)
    if world.machine.narrows:
        refuses("read_only", lambda: world.user.map(range_, 0, handle, True))
    world.user.map(range_, 0, handle, False)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "dtype", "code"),
    [
        (0, (PAGE // 4 + 1,), None, "float32", "out_of_range"),
        (PAGE, (1,), None, "float32", "out_of_range"),
        (-4, (1,), None, "float32", "out_of_range"),
        (2, (4,), None, "float32", "out_of_range"),
        (0, (2, 2), (PAGE // 4, 1), "float32", "out_of_range"),
        (0, (2,), (-1,), "float32", "out_of_range"),
        (0, (2, 2), (1,), "float32", "out_of_range"),
        (0, (1 << 62,), None, "float32", "out_of_range"),
        (0, (1,), None, "Tensor", "invalid_dtype"),
    ],
)
def test_tensors_lie_in_the_range(
    world: World, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str, code: str
) -> None:
    range_ = world.owner.reserve(PAGE)
    refuses(code, lambda: world.owner.wrap(range_, offset, shape, strides, dtype))


def both(world: World) -> tuple[Range, Range]:
    ranges = world.owner.reserve(4 * PAGE), world.owner.reserve(4 * PAGE)
    for range_ in ranges:
        world.owner.map_many(range_, [(0, world.local()), (PAGE, world.local()), (3 * PAGE, world.local())], True)
    return ranges


def test_only_mapped_memory_is_copied_or_read(world: World) -> None:
    dst, src = both(world)
    world.owner.copy(dst.base, src.base, 2 * PAGE)
    refuses("not_mapped", lambda: world.owner.copy(dst.base + PAGE, src.base, 2 * PAGE))
    refuses("not_mapped", lambda: world.owner.copy(dst.base, src.base + 2 * PAGE, PAGE))
    refuses("out_of_range", lambda: world.owner.copy(dst.base, 4096, PAGE))
    refuses("out_of_range", lambda: world.owner.copy(dst.base, dst.base + 1, PAGE))
    refuses("not_mapped", lambda: world.owner.read_bytes(dst.address(PAGE), 2 * PAGE))
    refuses("out_of_range", lambda: world.owner.read_bytes(dst.base - 1, 2))


def test_large_pages_are_asked_for_mapped_memory_in_whole_ones(world: World) -> None:
    large = world.owner.large_page_bytes
    nbytes = 2 * (large or PAGE)
    range_ = world.owner.reserve(2 * nbytes)
    handle = world.owner.create(nbytes, "kv")
    world.owner.map(range_, 0, handle, True)
    world.owner.write_bytes(range_.base, bytes(range(256)) * (nbytes // 256))
    world.owner.collapse(range_, 0, nbytes)  # True or False, as the kernel likes
    assert world.owner.read_bytes(range_.base, nbytes) == bytes(range(256)) * (nbytes // 256)
    if large:
        refuses("not_granular", lambda: world.owner.collapse(range_, 4096, large))
        refuses("not_granular", lambda: world.owner.collapse(range_, 0, large + 4096))
        refuses("not_mapped", lambda: world.owner.collapse(range_, large, nbytes))
        refuses("out_of_range", lambda: world.owner.collapse(range_, nbytes, 2 * nbytes))
    else:
        assert world.owner.collapse(range_, 0, nbytes)


def test_claimed_memory_is_made_in_large_pages_and_is_zeros(world: World) -> None:
    large = world.owner.large_page_bytes
    nbytes = 2 * (large or PAGE)
    range_ = world.owner.reserve(2 * nbytes)
    handle = world.owner.claim(nbytes, "kv")
    if large:
        refuses("not_mapped", lambda: world.owner.make_large(range_, 0, nbytes))
    world.owner.map(range_, 0, handle, True)
    is_made = world.owner.make_large(range_, 0, nbytes)  # True or False, as the kernel likes
    refuses("not_populated", lambda: world.owner.settle(handle))
    world.owner.populate(handle, 0, nbytes)
    world.owner.settle(handle)
    assert world.owner.read_bytes(range_.base, nbytes) == bytes(nbytes)
    assert world.owner.pages == nbytes
    if large:
        refuses("not_claimed", lambda: world.owner.make_large(range_, 0, nbytes))
        refuses("not_granular", lambda: world.owner.make_large(range_, 4096, large))
        refuses("out_of_range", lambda: world.owner.make_large(range_, nbytes, 2 * nbytes))
    else:
        assert is_made
    world.owner.unmap(range_, 0)
    world.owner.release(handle)
    assert world.owner.pages == 0


def test_tokens_that_name_no_memory_are_refused(world: World) -> None:
    token = world.owner.export(world.local())
    bad: list[Token]
    if isinstance(token, FdToken):
        out, into = os.pipe()
        bad = [token._replace(offset=1 << 40), token._replace(fd=1 << 20), token._replace(fd=out), KeyToken(1, PAGE)]
    else:
        out, into = -1, -1
        bad = [token._replace(key=token.key ^ 0x100), token._replace(nbytes=2 * PAGE), FdToken(0, 0, PAGE)]
        if world.machine.is_whole:  # a driver does not tell a handle's size until it is mapped
            bad = [bad[0], bad[2]]
    for one in bad:
        refuses("invalid_token", partial(world.user.import_, one))
    for fd in {out, into} - {-1}:
        os.close(fd)
    world.user.import_(token)  # none of them left a trace


def test_a_handle_is_made_settled_and_given_back_in_that_order(world: World) -> None:
    owner = world.owner
    handle = owner.claim(2 * PAGE, "weights")
    range_ = owner.reserve(2 * PAGE)
    owner.map(range_, 0, handle, True)  # its addresses may be known before its memory is there
    refuses("not_settled", lambda: owner.export(handle))
    refuses("not_retired", lambda: owner.reclaim(handle, 0, PAGE))
    refuses("not_populated", lambda: owner.settle(handle))
    owner.populate(handle, 0, PAGE)
    refuses("not_populated", lambda: owner.settle(handle))
    source = both(world)[0].base
    owner.write_bytes(source, b"ab" * (PAGE // 2))
    owner.write(handle, PAGE, source, PAGE)
    owner.settle(handle)
    assert owner.read_bytes(range_.base, 2 * PAGE) == bytes(PAGE) + b"ab" * (PAGE // 2)
    acts: list[Callable[[Handle], object]] = [
        owner.settle,
        lambda one: owner.populate(one, 0, PAGE),
        lambda one: owner.write(one, 0, source, PAGE),
    ]
    for act in acts:
        refuses("not_claimed", partial(act, handle))
    owner.export(handle)
    owner.retire(handle)
    owner.reclaim(handle, 0, PAGE)
    refuses("released", lambda: owner.export(handle))
    refuses("released", lambda: owner.map(owner.reserve(2 * PAGE), 0, handle, True))
    owner.unmap(range_, 0)
    owner.release(handle)
    refuses("released", lambda: owner.retire(handle))


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_a_claim_that_is_given_up_takes_only_what_was_made_of_it(world: World, pages: int) -> None:
    owner, kept = world.owner, world.local()
    handle = owner.claim(2 * PAGE, "kv")
    for page in range(pages):
        owner.populate(handle, page * PAGE, PAGE)
    assert owner.pages == (1 + (2 if world.machine.is_whole else pages)) * PAGE
    owner.retire(handle)
    owner.release(handle)
    assert (owner.pages, owner.used["kv"]) == (PAGE, PAGE)
    assert owner.check_integrity() == []
    owner.release(kept)
    assert (owner.pages, owner.check_integrity()) == (0, [])


@pytest.mark.parametrize(("offset", "nbytes"), [(-PAGE, PAGE), (0, 0), (PAGE, 2 * PAGE), (2 * PAGE, 1)])
def test_what_is_made_and_given_back_lies_in_the_handle(world: World, offset: int, nbytes: int) -> None:
    handle, source = world.owner.claim(2 * PAGE, "kv"), both(world)[0].base
    refuses("out_of_range", lambda: world.owner.populate(handle, offset, nbytes))
    if nbytes == PAGE:
        refuses("out_of_range", lambda: world.owner.write(handle, offset, source, nbytes))
    world.owner.retire(handle)
    refuses("out_of_range", lambda: world.owner.reclaim(handle, offset, nbytes))


def test_imported_handles_are_their_owners_to_change(world: World) -> None:
    imported = world.imported()
    refuses("not_local", lambda: world.user.retire(imported))
    refuses("not_claimed", lambda: world.user.populate(imported, 0, PAGE))
    refuses("not_claimed", lambda: world.user.settle(imported))
    refuses("not_retired", lambda: world.user.reclaim(imported, 0, PAGE))


def test_every_access_to_bytes_is_checked(world: World, tmp_path: Path) -> None:
    owner, range_ = world.owner, both(world)[0]
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    claimed = owner.claim(2 * PAGE, "kv")
    acts: list[Callable[[int, int], object]] = [
        lambda at, nbytes: owner.read_into(at, fd, 0, nbytes),
        owner.read_bytes,
        lambda at, nbytes: owner.write_bytes(at, bytes(nbytes)),
        owner.checksum,
        lambda at, nbytes: owner.copy_async([(range_.base, range_.address(PAGE), 1), (at, range_.base, nbytes)]),
        lambda at, nbytes: owner.write(claimed, 0, at, nbytes),
    ]
    for act in acts:
        refuses("not_mapped", partial(act, range_.address(2 * PAGE), PAGE))
        refuses("not_mapped", partial(act, range_.address(2 * PAGE - 1), 2))
        refuses("out_of_range", partial(act, range_.address(4 * PAGE - 1), 2))
        refuses("out_of_range", partial(act, 0, 1))
        refuses("out_of_range", partial(act, range_.base, 0))
    owner.read_into(range_.address(10), fd, 2, 8)
    assert owner.read_bytes(range_.address(9), 10) == b"\x0023456789\x00"
    with pytest.raises(OSError, match="Input/output"):
        owner.read_into(range_.base, fd, 8, 8)
    os.close(fd)


@pytest.mark.parametrize("begin", [0, 3 * PAGE // 2 + 5])
def test_many_bytes_go_to_their_handles(world: World, tmp_path: Path, begin: int) -> None:
    """A host writes many through files: the second handle lies before the first one there, and reaches over it here.
    Another process sees them, and writes likewise."""
    owner, user = world.owner, world.user
    earlier, last, first = (world.local() for _ in range(3))
    range_, seen = owner.reserve(4 * PAGE), user.reserve(4 * PAGE)
    owner.map_many(range_, [(0, first), (PAGE, earlier), (2 * PAGE, last)], True)
    for at, handle in enumerate((first, earlier, last)):
        user.map(seen, at * PAGE, user.import_(owner.export(handle)), True)
    data = random.Random(1).randbytes(3 * PAGE - begin - 3)
    whole = bytes(begin) + data + bytes(3)
    owner.write_bytes(range_.address(begin), data)
    assert user.read_bytes(seen.base, 3 * PAGE) == whole
    user.write_bytes(seen.address(begin), memoryview(bytearray(data[::-1])))
    assert owner.read_bytes(range_.base, 3 * PAGE) == bytes(begin) + data[::-1] + bytes(3)
    (tmp_path / "file").write_bytes(b"xyz" + data)
    with open(tmp_path / "file", "rb") as file:
        owner.read_into(range_.address(begin), file.fileno(), 3, len(data))
        assert user.read_bytes(seen.base, 3 * PAGE) == whole
        with pytest.raises(OSError, match="Input/output"):
            owner.read_into(range_.address(begin), file.fileno(), 4, len(data))
    assert earlier.place < first.place


def test_what_is_mapped_read_only_is_not_written(world: World, tmp_path: Path) -> None:
    user = world.user
    seen, own = user.reserve(PAGE), user.reserve(PAGE)
    user.map(seen, 0, world.imported(), False)
    user.map(own, 0, world.imported(), True)
    user.copy(own.base, seen.base, PAGE)
    refuses("read_only", lambda: user.copy(seen.base, own.base, PAGE))
    refuses("read_only", lambda: user.write_bytes(seen.base, b"x"))
    (tmp_path / "file").write_bytes(b"x")
    with open(tmp_path / "file", "rb") as file:
        refuses("read_only", lambda: user.read_into(seen.base, file.fileno(), 0, 1))


def test_a_device_of_no_backend_is_refused() -> None:
    refuses("unknown_backend", lambda: open_device("tpu:0", PAGE))


def test_a_successor_takes_over_what_was_recorded_and_the_rest_goes(world: World) -> None:
    owner = world.owner
    kept, handle = owner.create(2 * PAGE, "weights"), owner.claim(PAGE, "kv")
    lost = owner.create(3 * PAGE, "weights")
    range_ = owner.reserve(2 * PAGE)
    owner.map(range_, 0, kept, True)
    owner.write_bytes(range_.base, b"abc")
    seen = world.user.import_(owner.export(kept))
    descriptors = {part: os.dup(fd) for part, fd in owner.descriptors().items()}
    successor = world.machine.process().open(0, PAGE, 64 * PAGE, descriptors)
    if not world.machine.takes_over:
        refuses("invalid_extent", lambda: successor.restore("weights", kept.place, kept.nbytes, kept.key))
        return
    for place, nbytes, key in ((kept.place, PAGE, 0), (kept.place + 100 * PAGE, PAGE, 1), (7, PAGE, kept.key)):
        if world.machine.kind == "host" and place == kept.place:
            continue  # there a place says all
        refuses("invalid_extent", partial(successor.restore, "weights", place, nbytes, key))
    again = successor.restore("weights", kept.place, kept.nbytes, kept.key)
    refuses("invalid_extent", lambda: successor.restore("weights", kept.place, kept.nbytes, kept.key))
    successor.trim()
    assert (successor.used, successor.pages) == ({"weights": 2 * PAGE, "kv": 0, "mailbox": 0}, 2 * PAGE)
    assert successor.check_integrity() == []
    assert (successor.id_of(again), successor.export(again).nbytes) == (owner.id_of(kept), 2 * PAGE)
    if world.machine.kind == "strict":  # else the offsets are there, and full of zeros
        for gone in (lost, handle):
            refuses("invalid_token", partial(world.user.import_, KeyToken(gone.key, gone.nbytes)))
    place = successor.reserve(2 * PAGE)
    successor.map(place, 0, again, True)
    assert successor.read_bytes(place.base, 4) == b"abc\0"
    both_kinds, new = successor.reserve(4 * PAGE), successor.create(PAGE, "weights")
    successor.map(both_kinds, 0, new, True)
    refuses("mixed_range", lambda: successor.map(both_kinds, PAGE, again, True))
    there = world.user.reserve(2 * PAGE)
    world.user.map(there, 0, seen, False)
    successor.write_bytes(place.base, b"xyz")
    assert world.user.read_bytes(there.base, 3) == b"xyz"
    successor.close()


def test_a_range_is_no_larger_than_the_backend_reserves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.owner, "range_bytes_max", 4 * PAGE)
    world.owner.reserve(4 * PAGE)
    refuses("range_too_large", lambda: world.owner.reserve(5 * PAGE))
    handles = [world.owner.create(3 * PAGE, "kv") for _ in range(3)]
    assert [handle.place for handle in handles] == [0, 4 * PAGE, 8 * PAGE]  # each in one range
    assert world.owner.create(PAGE, "kv").place == 3 * PAGE
    assert world.owner.check_integrity() == []
