"""The store against a real Valkey server: leases, fencing epochs that never fall, the layout, the journal, outages."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

import common.store
from cli.embedded_store import is_answering, server_binary
from common.config import HmmConfig
from common.layout import Seat, initial_layout
from common.protocol.errors import ConfigError, Fenced, PayloadTooLarge, Unavailable
from common.store import OPERATIONS_MAX, AsyncStore, Event, Store, store_of

LAYOUT = initial_layout([3], ["host:0", "host:1"])


class Server:
    """A Valkey server on a Unix socket of its own."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "store.sock"
        self.url = f"unix://:secret@{self.socket}"
        self._directory = directory
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [server_binary(), "--port", "0", "--unixsocket", str(self.socket), "--requirepass", "secret", "--save", ""],
            cwd=self._directory,
            stdout=subprocess.DEVNULL,
        )
        while not is_answering(self.socket, "secret"):
            assert self._process.poll() is None, "the server ended"

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    store = Store(server.url, "test")
    yield store
    store.close()


def test_lease_has_one_holder_and_epochs_rise(store: Store) -> None:
    assert store.acquire_lease("a", 60_000, 0) == 1
    assert store.acquire_lease("b", 60_000, 0) == "a"
    assert store.renew_lease("a", 60_000, 1) is True
    assert store.renew_lease("b", 60_000, 1) is False
    store.release_lease("b")
    assert store.acquire_lease("b", 60_000, 0) == "a"
    store.release_lease("a")
    assert store.acquire_lease("b", 60_000, 0) == 2


def test_epochs_rise_above_what_a_resource_has_seen_also_after_the_store_was_wiped(
    store: Store, server: Server
) -> None:
    assert store.acquire_lease("a", 60_000, 0) == 1
    with redis.Redis.from_url(server.url) as raw:
        raw.flushall()
    assert store.acquire_lease("b", 60_000, 7) == 8


def test_lease_expires_and_may_be_taken_back_while_nobody_has_it(store: Store, server: Server) -> None:
    store.acquire_lease("a", 60_000, 0)
    with redis.Redis.from_url(server.url) as raw:
        raw.delete("elasticmoe:test:lease")
    assert store.renew_lease("a", 60_000, 1) is True
    assert store.acquire_lease("b", 60_000, 0) == "a"


def test_a_lease_is_not_taken_back_after_somebody_else_has_had_it(store: Store) -> None:
    store.acquire_lease("a", 60_000, 0)
    store.release_lease("a")
    assert store.acquire_lease("b", 60_000, 0) == 2
    store.release_lease("b")
    assert store.renew_lease("a", 60_000, 1) is False
    assert store.renew_lease("b", 60_000, 2) is True


def test_layout_and_journal_come_back(store: Store) -> None:
    assert store.get_layout() is None
    assert store.get_epoch() == 0
    store.put_layout(LAYOUT)
    assert store.get_layout() == LAYOUT
    assert store.get_epoch() == 1
    first = Event("decision", "because", 1, "scaler:a", 5.0, {"x": "1"})
    second = msgspec.structs.replace(first, reason="because of that")
    store.append_event(first)
    store.append_event(second)
    assert store.events(10) == [second, first]
    assert store.events(1) == [second]


class Work(msgspec.Struct, frozen=True):
    name: str
    phase: int = 0


WORK = msgspec.msgpack.Decoder(Work)


def test_the_operation_in_progress_ends_among_the_last_ones(store: Store) -> None:
    assert store.get_operation(WORK) is None
    assert store.ended_operations(WORK) == []
    store.put_operation("a", Work("one"))
    store.put_operation("a", Work("one", 1))
    assert store.get_operation(WORK) == Work("one", 1)
    store.end_operation("a", Work("one", 2))
    assert store.get_operation(WORK) is None
    for number in range(OPERATIONS_MAX):
        store.end_operation("a", Work(str(number)))
    ended = store.ended_operations(WORK)
    assert (len(ended), ended[0], ended[-1]) == (OPERATIONS_MAX, Work(str(OPERATIONS_MAX - 1)), Work("0"))


def test_a_scaler_that_lost_the_lease_writes_no_operation(store: Store) -> None:
    store.acquire_lease("b", 60_000, 0)
    store.put_operation("b", Work("new"))
    for write in (store.put_operation, store.end_operation):
        with pytest.raises(Fenced):
            write("a", Work("stale"))
    assert store.get_operation(WORK) == Work("new")
    assert store.ended_operations(WORK) == []


def test_operations_of_another_version_are_refused_or_left_out(store: Store, server: Server) -> None:
    store.end_operation("a", Work("kept"))
    with redis.Redis.from_url(server.url) as raw:
        raw.set("elasticmoe:test:operation", msgspec.msgpack.encode({"nom": "x"}))
        raw.lpush("elasticmoe:test:operations", b"\xc1")
    with pytest.raises(Unavailable) as caught:
        store.get_operation(WORK)
    assert caught.value.code == "store_corrupt"
    assert store.ended_operations(WORK) == [Work("kept")]


def test_a_value_that_could_not_be_read_back_is_not_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.store.VALUE_BYTES_MAX", 100)
    with pytest.raises(PayloadTooLarge, match="limit of 100"):
        store.put_operation("a", Work("x" * 200))


def test_values_that_are_not_ours_are_refused(store: Store, server: Server) -> None:
    with redis.Redis.from_url(server.url) as raw:
        raw.set("elasticmoe:test:layout", b"\xc1")
    with pytest.raises(Unavailable, match="not valid") as caught:
        store.get_layout()
    assert caught.value.code == "store_corrupt"


def start_watch(watcher: AsyncStore) -> tuple[asyncio.Queue[tuple[int, tuple[Seat, ...]]], asyncio.Task[None]]:
    """Epochs and seats of the layouts as they are seen, and the task that watches."""
    seen: asyncio.Queue[tuple[int, tuple[Seat, ...]]] = asyncio.Queue()

    async def watch() -> None:
        async for layout in watcher.watch_layout():
            seen.put_nowait((layout.epoch, layout.seats))

    return seen, asyncio.create_task(watch())


async def end_watch(task: asyncio.Task[None], watcher: AsyncStore) -> None:
    """End a watch and close its store."""
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await watcher.close()


async def test_routers_see_each_new_layout_also_across_an_outage(server: Server) -> None:
    watcher = AsyncStore(server.url, "test")
    seen, task = start_watch(watcher)
    store = Store(server.url, "test")
    store.put_layout(LAYOUT)
    assert (await asyncio.wait_for(seen.get(), 10))[0] == 1
    await asyncio.to_thread(server.stop)
    with pytest.raises(Unavailable):
        await watcher.get_layout()
    await asyncio.to_thread(server.start)
    store.put_layout(LAYOUT)  # the store was emptied and knows an old epoch: nothing new
    store.put_layout(msgspec.structs.replace(LAYOUT, epoch=2))
    assert (await asyncio.wait_for(seen.get(), 10))[0] == 2
    await end_watch(task, watcher)
    store.close()


async def test_news_of_a_layout_wake_a_router_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.store, "POLL_SECONDS", 3.0)  # so that it cannot be the polling
    monkeypatch.setattr(common.store, "LAYOUTS_MAX", 2)
    watcher, store = AsyncStore(server.url, "test"), Store(server.url, "test")
    for epoch in range(1, 6):
        store.put_layout(msgspec.structs.replace(LAYOUT, epoch=epoch))
    seen, task = start_watch(watcher)
    assert await asyncio.wait_for(seen.get(), 10) == (5, LAYOUT.seats)
    for epoch in range(6, 10):
        start = time.monotonic()
        await asyncio.to_thread(store.put_layout, msgspec.structs.replace(LAYOUT, epoch=epoch))
        assert (await asyncio.wait_for(seen.get(), 10))[0] == epoch
        assert time.monotonic() - start < 1.0
    with redis.Redis.from_url(server.url) as raw:
        assert raw.xlen("elasticmoe:test:layouts") == 2
    await end_watch(task, watcher)
    store.close()


@pytest.mark.parametrize("is_other_type", [False, True])
async def test_without_the_news_a_layout_is_found_by_polling(server: Server, is_other_type: bool) -> None:
    watcher, store = AsyncStore(server.url, "test"), Store(server.url, "test")
    store.put_layout(LAYOUT)
    seen, task = start_watch(watcher)
    assert (await asyncio.wait_for(seen.get(), 10))[0] == 1
    with redis.Redis.from_url(server.url) as raw:
        raw.delete("elasticmoe:test:layouts")
        if is_other_type:
            raw.set("elasticmoe:test:layouts", b"x")
        raw.set("elasticmoe:test:layout", msgspec.msgpack.encode(msgspec.structs.replace(LAYOUT, epoch=2)))
        raw.set("elasticmoe:test:epoch", 2)
        assert (await asyncio.wait_for(seen.get(), 10))[0] == 2
        raw.config_resetstat()
        await asyncio.sleep(1.0)
        assert raw.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"] < 12  # it does not spin
    await end_watch(task, watcher)
    store.close()


def test_outage_is_one_typed_error(tmp_path: Path) -> None:
    store = Store(f"unix://{tmp_path}/nobody.sock", "test")
    for call in (store.ping, store.get_layout, lambda: store.acquire_lease("a", 1000, 0)):
        with pytest.raises(Unavailable, match="store does not answer") as caught:
            call()
        assert caught.value.code == "store_unavailable"
        assert caught.value.retryable
    store.close()


def test_bad_url_and_missing_password_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="store URL"):
        Store("http://x", "test")
    with pytest.raises(ConfigError, match=r"store\.password cannot be read"):
        store_of(HmmConfig(run_dir=str(tmp_path)))
