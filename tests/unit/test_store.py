"""The store against a real Valkey server: leases, fencing epochs that never fall, the layout, the journal, outages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

import elasticmoe.common.store
import tests.sim.store
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.layout import Layout, Seat, initial_layout
from elasticmoe.common.protocol.errors import ConfigError, Fenced, PayloadTooLarge, Unavailable
from elasticmoe.common.store import OPERATIONS_MAX, AsyncStore, Event, Store, Writer, store_of
from tests.procs.waiting import wait_until
from tests.unit.stores import Server

LAYOUT = initial_layout([3], ["host:0", "host:1"])
A = Writer("a", 1)


@pytest.fixture
def store(server: Server) -> Iterator[Store]:
    store = Store(server.url, "test")
    yield store
    store.close()


def test_lease_has_one_holder_and_epochs_rise(store: Store) -> None:
    assert store.acquire_lease("a", 60_000, 0) == 1
    assert store.acquire_lease("b", 60_000, 0) == "a"
    assert store.renew_lease(Writer("a", 1), 60_000) is True
    assert store.renew_lease(Writer("b", 1), 60_000) is False
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
    assert store.renew_lease(Writer("a", 1), 60_000) is True
    assert store.acquire_lease("b", 60_000, 0) == "a"


@pytest.mark.parametrize("is_for_ever", [False, True])
def test_a_lease_lasts_no_longer_than_it_was_given_for(store: Store, server: Server, is_for_ever: bool) -> None:
    """As after the server's wall clock went back."""
    store.acquire_lease("a", 60_000, 0)
    with redis.Redis.from_url(server.url) as raw:
        assert store.acquire_lease("b", 60_000, 0) == "a"
        raw.pexpire("elasticmoe:test:lease", 108_000)  # another holder's time may differ
        assert store.acquire_lease("b", 60_000, 0) == "a"
        assert raw.pttl("elasticmoe:test:lease") > 60_000
        if is_for_ever:
            raw.persist("elasticmoe:test:lease")
        else:
            raw.pexpire("elasticmoe:test:lease", 3_600_000)
        assert store.acquire_lease("b", 60_000, 0) == "a"
        assert 0 < raw.pttl("elasticmoe:test:lease") <= 60_000
    assert store.renew_lease(A, 60_000) is True


def test_a_lease_is_not_taken_back_after_somebody_else_has_had_it(store: Store) -> None:
    store.acquire_lease("a", 60_000, 0)
    store.release_lease("a")
    assert store.acquire_lease("b", 60_000, 0) == 2
    store.release_lease("b")
    assert store.renew_lease(Writer("a", 1), 60_000) is False
    assert store.renew_lease(Writer("b", 2), 60_000) is True


def test_layout_and_journal_come_back(store: Store) -> None:
    assert store.get_layout() is None
    assert store.get_epoch() == 0
    store.put_layout(A, LAYOUT)
    assert store.get_layout() == LAYOUT
    assert store.get_epoch() == 1
    first = Event("decision", "because", 1, "scaler:a", 5.0, {"x": "1"})
    second = msgspec.structs.replace(first, reason="because of that")
    store.append_event(A, first)
    store.append_event(A, second)
    assert store.events(10) == [second, first]
    assert store.events(1) == [second]


class Work(msgspec.Struct, frozen=True):
    name: str
    phase: int = 0


WORK = msgspec.msgpack.Decoder(Work)


def test_the_operation_in_progress_ends_among_the_last_ones(store: Store) -> None:
    assert store.get_operation(WORK) is None
    assert store.ended_operations(WORK) == []
    store.put_operation(A, Work("one"))
    store.put_operation(A, Work("one", 1))
    assert store.get_operation(WORK) == Work("one", 1)
    store.end_operation(A, Work("one", 2))
    assert store.get_operation(WORK) is None
    for number in range(OPERATIONS_MAX):
        store.end_operation(A, Work(str(number)))
    ended = store.ended_operations(WORK)
    assert (len(ended), ended[0], ended[-1]) == (OPERATIONS_MAX, Work(str(OPERATIONS_MAX - 1)), Work("0"))


WRITES: dict[str, Callable[[Store, Writer], object]] = {
    "operation": lambda store, by: store.put_operation(by, Work("stale")),
    "no operation": lambda store, by: store.put_operation(by, None),
    "end": lambda store, by: store.end_operation(by, Work("stale")),
    "layout": lambda store, by: store.put_layout(by, msgspec.structs.replace(LAYOUT, epoch=9)),
    "event": lambda store, by: store.append_event(by, Event("decision", "stale", 1, by.holder, 0.0)),
}


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_superseded_scaler_writes_nothing(store: Store, write: str, is_held: bool) -> None:
    assert store.acquire_lease("a", 60_000, 0) == 1
    store.release_lease("a")
    new = Writer("b", 2)
    assert store.acquire_lease("b", 60_000, 0) == 2
    store.put_operation(new, Work("new"))
    store.put_layout(new, LAYOUT)
    mark = store.journal_mark()
    if not is_held:
        store.release_lease("b")  # or it ran out in an outage
    with pytest.raises(Fenced, match="another scaler"):
        WRITES[write](store, A)
    assert (store.get_operation(WORK), store.ended_operations(WORK)) == (Work("new"), [])
    assert (store.get_layout(), store.get_epoch(), store.events(10)) == (LAYOUT, 1, [])
    assert store.journal_mark() == mark
    WRITES[write](store, new)
    assert (store.journal_mark() != mark) == (write in ("operation", "no operation", "end"))


def test_the_higher_epoch_wins_in_a_store_that_was_emptied(store: Store, server: Server) -> None:
    new = Writer("b", 2)
    for come_back in (lambda: store.renew_lease(new, 60_000), lambda: store.put_operation(new, Work("new"))):
        with redis.Redis.from_url(server.url) as raw:
            raw.flushall()
        assert store.renew_lease(A, 60_000) is True  # nothing tells the store that there was a higher one
        store.put_operation(A, Work("stale"))
        come_back()
        assert store.renew_lease(A, 60_000) is False
        with pytest.raises(Fenced):
            store.put_operation(A, Work("stale"))
        assert store.renew_lease(new, 60_000) is True
        assert store.acquire_lease("c", 60_000, 0) == "b"
        store.release_lease("b")
        assert store.acquire_lease("c", 60_000, 0) == 3


def test_an_epoch_that_is_no_number_counts_as_lost(store: Store, server: Server) -> None:
    with redis.Redis.from_url(server.url) as raw:
        raw.set("elasticmoe:test:fence", "x")
        assert store.renew_lease(Writer("b", 2), 60_000) is True
        raw.set("elasticmoe:test:fence", "x")
    assert store.acquire_lease("b", 60_000, 2) == 3


class Still:
    """Time that stands still, for the simulation's store."""

    now = 0.0

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("seed", range(5))
def test_the_simulations_store_answers_as_the_real_one_does(store: Store, server: Server, seed: int) -> None:
    rng, simulated = random.Random(seed), tests.sim.store.Store(Still())  # type: ignore[arg-type]
    writers = [Writer(name, fence) for name in "abc" for fence in range(1, 5)]

    def outcome(call: Callable[[Any], object]) -> list[object]:
        answers = []
        for one in (store, simulated):
            try:
                answers.append(call(one))
            except Fenced as error:
                answers.append(error.message)
        return answers

    with redis.Redis.from_url(server.url) as raw:
        for number in range(400):
            by, minimum, draw = rng.choice(writers), rng.randrange(4), rng.random()
            work = Work(f"{number}")
            if draw < 0.05:
                raw.flushall()
                simulated.wipe()
            elif draw < 0.15:
                raw.delete("elasticmoe:test:lease")  # as when it runs out
                simulated.lease_until = 0.0
            calls: list[Callable[[Any], object]] = [
                lambda one, by=by, least=minimum: one.acquire_lease(by.holder, 60_000, least),
                lambda one, by=by: one.renew_lease(by, 60_000),
                lambda one, by=by: one.release_lease(by.holder),
                lambda one, by=by, work=work: bool(one.put_operation(by, work)),
                lambda one, by=by: bool(one.put_operation(by, None)),
                lambda one, by=by, work=work: bool(one.end_operation(by, work)),
                lambda one, by=by, epoch=number: one.put_layout(by, msgspec.structs.replace(LAYOUT, epoch=epoch + 1)),
                lambda one, by=by: one.append_event(by, Event("decision", "x", 1, by.holder, 0.0)),
            ]
            real, mirrored = outcome(rng.choice(calls))
            assert real == mirrored, f"call {number}"
            assert store.get_operation(WORK) == simulated.get_operation(), f"call {number}"
            assert store.get_epoch() == simulated.get_epoch()
            assert bool(store.journal_mark()) == bool(simulated.journal_mark())
            assert len(store.ended_operations(WORK)) == min(OPERATIONS_MAX, len(simulated.ended_operations()))


def test_operations_of_another_version_are_refused_or_left_out(store: Store, server: Server) -> None:
    store.end_operation(A, Work("kept"))
    with redis.Redis.from_url(server.url) as raw:
        raw.set("elasticmoe:test:operation", msgspec.msgpack.encode({"nom": "x"}))
        raw.lpush("elasticmoe:test:operations", b"\xc1")
    with pytest.raises(Unavailable) as caught:
        store.get_operation(WORK)
    assert caught.value.code == "store_corrupt"
    assert store.ended_operations(WORK) == [Work("kept")]


def test_a_value_that_could_not_be_read_back_is_not_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe.common.store.VALUE_BYTES_MAX", 100)
    with pytest.raises(PayloadTooLarge, match="limit of 100"):
        store.put_operation(A, Work("x" * 200))


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
        async for layout in watcher.watch():
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
    store.put_layout(A, LAYOUT)
    assert (await asyncio.wait_for(seen.get(), 60))[0] == 1
    await asyncio.to_thread(server.stop)
    with pytest.raises(Unavailable):
        await watcher.get_layout()
    await asyncio.to_thread(server.start)
    store.put_layout(A, LAYOUT)  # the store was emptied and knows an old epoch: nothing new
    store.put_layout(A, msgspec.structs.replace(LAYOUT, epoch=2))
    assert (await asyncio.wait_for(seen.get(), 60))[0] == 2
    await end_watch(task, watcher)
    store.close()


def test_each_thread_has_a_connection_of_its_own_and_a_name_for_it(server: Server) -> None:
    loop, lease = (store := Store(server.url, "test", "loop")), store.another("lease")
    for _ in range(3):
        loop.ping()
        lease.ping()
    loop.put_layout(A, LAYOUT)
    assert lease.get_epoch() == LAYOUT.epoch, "the same deployment"
    with redis.Redis.from_url(server.url) as asking:
        names = sorted(client["name"] for client in asking.client_list())
    assert names == ["", "lease", "loop"]
    loop.close()
    lease.close()


async def test_news_of_a_layout_wake_a_router_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elasticmoe.common.store, "POLL_SECONDS", 60.0)  # so that it cannot be the polling
    monkeypatch.setattr(elasticmoe.common.store, "LAYOUTS_MAX", 2)
    watcher, store = AsyncStore(server.url, "test"), Store(server.url, "test")
    for epoch in range(1, 6):
        store.put_layout(A, msgspec.structs.replace(LAYOUT, epoch=epoch))
    seen, task = start_watch(watcher)
    assert await asyncio.wait_for(seen.get(), 60) == (5, LAYOUT.seats)
    for epoch in range(6, 10):
        await asyncio.to_thread(store.put_layout, A, msgspec.structs.replace(LAYOUT, epoch=epoch))
        assert (await asyncio.wait_for(seen.get(), 60))[0] == epoch
    with redis.Redis.from_url(server.url) as raw:
        assert raw.xlen("elasticmoe:test:layouts") == 2
        # A cancel on the way there may be noticed only where the waiting ends, after the 60 s.
        await asyncio.to_thread(wait_until, lambda: raw.info("clients")["blocked_clients"] == 1, "it waits for more")
    await end_watch(task, watcher)
    store.close()


@pytest.mark.parametrize("is_other_type", [False, True])
async def test_without_the_news_a_layout_is_found_by_polling(server: Server, is_other_type: bool) -> None:
    watcher, store = AsyncStore(server.url, "test"), Store(server.url, "test")
    store.put_layout(A, LAYOUT)
    seen, task = start_watch(watcher)
    assert (await asyncio.wait_for(seen.get(), 60))[0] == 1
    with redis.Redis.from_url(server.url) as raw:
        raw.delete("elasticmoe:test:layouts")
        if is_other_type:
            raw.set("elasticmoe:test:layouts", b"x")
        raw.set("elasticmoe:test:layout", msgspec.msgpack.encode(msgspec.structs.replace(LAYOUT, epoch=2)))
        raw.set("elasticmoe:test:epoch", 2)
        assert (await asyncio.wait_for(seen.get(), 60))[0] == 2
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
        store_of(HmmConfig(run_dir=str(tmp_path)), "")


def test_a_server_at_its_limit_of_memory_takes_what_replaces_a_record(store: Store, server: Server) -> None:
    """So an operation that has begun can end, and routers see its layout; nothing new begins."""
    store.acquire_lease("a", 10_000, 0)
    store.put_layout(A, LAYOUT)
    store.put_operation(A, LAYOUT)
    client = redis.Redis.from_url(server.url)
    client.config_set("maxmemory", 1)
    layouts = msgspec.msgpack.Decoder(Layout)
    later = msgspec.structs.replace(LAYOUT, epoch=2)
    mark = store.put_operation(A, later)
    assert (store.get_operation(layouts), store.journal_mark()) == (later, mark)
    store.put_layout(A, later)
    assert (store.get_layout(), store.get_epoch()) == (later, 2)
    store.end_operation(A, later)
    assert (store.get_operation(layouts), store.ended_operations(layouts)) == (None, [later])
    with pytest.raises(Unavailable) as refused:
        store.put_operation(A, later)
    assert refused.value.code == "storage_full"
    client.close()
