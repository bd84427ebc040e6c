"""What both stand-in drivers do of themselves: they count right whoever asks at once, and a fault is seen."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe.common.devices.driver import CopyPart, Driver
from elasticmoe.common.protocol.errors import DeviceError, DoesNotFit
from tests.devices import breaches, standins
from tests.devices.breaches import PAGE, mapped
from tests.unit.threads import at_once

PAGES = 8
TURNS = 2_000


@pytest.fixture(params=standins.KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("STANDIN_BYTES", str(PAGES * PAGE))
    with standins.memory(monkeypatch) as made:
        yield made


def driver_of(kind: str, folder: Path) -> Driver:
    """Of one more process."""
    made = standins.process(kind, folder)._of_this_process()
    made.open(0)
    return made


def test_memory_that_is_being_made_is_not_taken_for_nobodys(kind: str, folder: Path) -> None:
    """As where another process counts what there is."""
    driver, other = driver_of(kind, folder), standins.loaded(standins.process(kind, folder))
    address, is_over = driver.reserve(0, PAGE), threading.Event()

    def come_and_go() -> None:
        try:
            for _ in range(TURNS):
                handle = driver.create(0, PAGE)
                driver.map(0, [(address, PAGE, handle)])
                driver.unmap(0, address, PAGE)
                driver.release(0, handle)
        finally:
            is_over.set()

    def count() -> None:
        while not is_over.is_set():
            assert other.standin_used(0) <= PAGE

    assert at_once(come_and_go, count) == [None, None]
    assert other.standin_used(0) == 0


def test_a_device_gives_all_that_it_has_and_no_more_to_several_at_once(kind: str, folder: Path) -> None:
    drivers = [driver_of(kind, folder) for _ in range(2)]

    def take_all(driver: Driver) -> list[int]:
        taken: list[int] = []
        try:
            while True:
                taken.append(driver.create(0, PAGE))
        except DoesNotFit:
            return taken

    for _ in range(TURNS // PAGES):
        taken = at_once(*(partial(take_all, driver) for driver in drivers))
        assert sum(map(len, taken)) == PAGES
        for driver, handles in zip(drivers, taken, strict=True):
            for handle in handles:
                driver.release(0, handle)


def test_a_child_that_is_forked_in_a_turn_does_not_keep_it(kind: str, folder: Path) -> None:
    """As one that lives on without another program in it."""
    for number in range(5_000):
        (folder / f"other.{number}").touch()  # so that a turn, which looks at each file, lasts longer than a fork
    library, is_over, children = standins.loaded(standins.process(kind, folder)), threading.Event(), list[int]()

    def count() -> None:
        while not is_over.is_set():
            library.standin_used(0)

    counting = threading.Thread(target=count, daemon=True)
    stays, ends = os.pipe()
    counting.start()
    try:
        for _ in range(20):
            child = os.fork()
            if not child:
                os.close(ends)
                os.read(stays, 1)  # until the test is over
                os._exit(0)
            children.append(child)
        is_over.set()
        counting.join(20.0)
        assert not counting.is_alive(), "it waits for its turn"
    finally:
        is_over.set()
        os.close(ends)
        os.close(stays)
        for child in children:
            os.waitpid(child, 0)
        counting.join(20.0)


@pytest.mark.parametrize("is_target", [True, False])
def test_what_is_mapped_anew_takes_no_part_in_an_earlier_copy(kind: str, folder: Path, is_target: bool) -> None:
    driver = driver_of(kind, folder)
    (src, _), (dst, _) = mapped(driver), mapped(driver)
    event, changed = driver.copy(0, [CopyPart(dst, src, PAGE, 0, 0)]), dst if is_target else src
    driver.unmap(0, changed, PAGE)
    driver.map(0, [(changed, PAGE, driver.create(0, PAGE))])
    driver.allow(0, changed, PAGE, True)
    with pytest.raises(DeviceError) as caught:
        driver.wait(0, event)
    assert caught.value.code == "driver_failed"


def test_a_device_that_has_failed_does_no_work_at_all(kind: str, folder: Path) -> None:
    driver = driver_of(kind, folder)
    (src, _), (dst, _) = mapped(driver), mapped(driver)
    with pytest.raises(DeviceError):
        breaches.unmap_in_flight(SimpleNamespace(owner=driver, user=driver))
    buffer = ctypes.create_string_buffer(8)
    host = ctypes.addressof(buffer)
    acts: list[Callable[[], object]] = [
        lambda: driver.zero(0, dst, PAGE),
        lambda: driver.copy(0, [CopyPart(dst, src, PAGE, 0, 0)]),
        lambda: driver.to_device(0, dst, host, 8),
        lambda: driver.to_host(0, host, src, 8),
        lambda: driver.drain(0),
    ]
    for act in acts:
        with pytest.raises(DeviceError) as caught:
            act()
        assert caught.value.code == "driver_failed"
