"""The store against a real Valkey server: leases, fencing epochs that never fall, the layout, the journal, outages."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from cli.embedded_store import is_answering, server_binary
from common.config import HmmConfig
from common.layout import initial_layout
from common.protocol.errors import ConfigError, Unavailable
from common.store import AsyncStore, Event, Store, store_of

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
    assert store.renew_lease("a", 60_000) is True
    assert store.renew_lease("b", 60_000) is False
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
    assert store.renew_lease("a", 60_000) is True
    assert store.acquire_lease("b", 60_000, 0) == "a"


def test_layout_and_journal_come_back(store: Store) -> None:
    assert store.get_layout() is None
    store.put_layout(LAYOUT)
    assert store.get_layout() == LAYOUT
    first = Event("decision", "because", 1, "scaler:a", 5.0, {"x": "1"})
    second = msgspec.structs.replace(first, reason="because of that")
    store.append_event(first)
    store.append_event(second)
    assert store.events(10) == [second, first]
    assert store.events(1) == [second]


def test_values_that_are_not_ours_are_refused(store: Store, server: Server) -> None:
    with redis.Redis.from_url(server.url) as raw:
        raw.set("elasticmoe:test:layout", b"\xc1")
    with pytest.raises(Unavailable, match="not valid") as caught:
        store.get_layout()
    assert caught.value.code == "store_corrupt"


async def test_routers_see_each_new_layout_also_across_an_outage(server: Server) -> None:
    watcher = AsyncStore(server.url, "test")
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def watch() -> None:
        async for layout in watcher.watch_layout():
            seen.put_nowait(layout.epoch)

    task = asyncio.create_task(watch())
    store = Store(server.url, "test")
    store.put_layout(LAYOUT)
    assert await asyncio.wait_for(seen.get(), 10) == 1
    await asyncio.to_thread(server.stop)
    with pytest.raises(Unavailable):
        await watcher.get_layout()
    await asyncio.to_thread(server.start)
    store.put_layout(LAYOUT)  # the store was emptied and knows an old epoch: nothing new
    store.put_layout(msgspec.structs.replace(LAYOUT, epoch=2))
    assert await asyncio.wait_for(seen.get(), 10) == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await watcher.close()
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
