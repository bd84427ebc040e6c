"""The admin surface: orders through the command queue, their refusals, views of operations, events, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.layout import RankId, Seat
from elasticmoe.common.protocol.errors import (
    Conflict,
    DeadlineExceeded,
    ElasticMoEError,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from elasticmoe.common.protocol.replies import Refused
from elasticmoe.common.protocol.scaler import RankLoad
from elasticmoe.common.store import Event
from elasticmoe.services.scaler.api import admin
from elasticmoe.services.scaler.api.admin import build_app
from elasticmoe.services.scaler.api.event_stream import LISTENERS_MAX, EventStream
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.requests import parse_rebalance, parse_scale
from elasticmoe.services.scaler.api.series import Series
from elasticmoe.services.scaler.api.snapshot import StatusCache, StatusSnapshot
from elasticmoe.services.scaler.control import admission
from elasticmoe.services.scaler.control.admission import (
    Accepted,
    CancelOperation,
    CommandAnswer,
    CommandQueue,
    Later,
    Order,
    SetPolicy,
    accept,
    cancelled,
    repeated,
)
from elasticmoe.services.scaler.metrics import Meters
from elasticmoe.services.scaler.operation.operation import NO_CALLER, CallerTrace, Request, planned_of
from elasticmoe.services.scaler.planning.plan import Target
from elasticmoe.services.scaler.policy.config import PolicyConfig
from elasticmoe.services.scaler.policy.record import PolicyRecord
from tests.unit.transitions import DOWN, SIZES, UP, World, operation_of


def snapshot_of(world: World, **changes: Any) -> StatusSnapshot:
    seen = world.seen()
    config = {"model": "/m", "standbys": 2}
    base = StatusSnapshot("serving", "nothing to do", None, world.layout, seen.cluster, 3, config)
    policy = PolicyRecord(1, PolicyConfig(), PolicyConfig())
    return msgspec.structs.replace(base, **{"policy": policy, **changes})


def load_of(free: int, total: int, tp: int = 0) -> RankLoad:
    return RankLoad(RankId(0, tp), "r", 1, 0, 0, 0, 0, free, total, False, None, 1, 1)


class Loop:
    """A scaler's loop that answers orders with `handle`, in a thread as the real one."""

    def __init__(self, handle: Callable[[Any], CommandAnswer]) -> None:
        self._woken = threading.Event()
        self._ended = False
        self.commands = CommandQueue(self._woken.set, SYSTEM_CLOCK)
        self._handle = handle
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            self._woken.wait(5)
            self._woken.clear()
            self.commands.serve(self._handle)

    def close(self) -> None:
        self._ended = True
        self._woken.set()
        self._thread.join(5)


PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


class Listener:
    """The app with everything behind it."""

    def __init__(self, snapshot: StatusSnapshot, run_dir: Path = Path("/nonexistent")) -> None:
        self.orders: list[Any] = []
        self.answer: Accepted | ElasticMoEError = Accepted(operation_of(None))
        self.loop = Loop(self._handle)
        self.status_cache, self.events, self.meters = StatusCache(snapshot), EventStream(), Meters()
        self.series, self.experts = Series("scaler:1"), ExpertLoads()
        self.app = build_app(
            self.status_cache,
            self.loop.commands,
            self.events,
            self.series,
            self.experts,
            self.meters,
            "secret",
            600.0,
            "scaler",
            run_dir,
        )

    def _handle(self, order: Any) -> CommandAnswer:
        self.orders.append(order)
        if isinstance(self.answer, ElasticMoEError):
            raise self.answer
        return PolicyRecord(2, order.config, order.config) if isinstance(order, SetPolicy) else self.answer

    def close(self) -> None:
        self.loop.close()

    async def call(self, method: str, path: str, body: Any = None, raw: bytes | None = None) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://scaler") as client:
            content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
            return await client.request(
                method, path, content=content, headers={"Authorization": "Bearer secret"}, timeout=10
            )


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener(snapshot_of(World(UP.before)))
    yield listener
    listener.close()


# ---- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"nonsense",
        b"{}",
        b'{"replicas": 0}',
        b'{"replicas": 65}',
        b'{"replicas": "2"}',
        b'{"replicas": true}',
        b'{"replicas": 2, "devices": ["host:0"]}',
        b'{"replicas": 2, "colour": 1}',
        b'{"devices": []}',
        b'{"devices": [""]}',
        b'{"devices": "host:0"}',
        b'{"remove": []}',
        b'{"remove": ["t1"]}',
        b'{"remove": [-1]}',
        b'{"remove": [1.5]}',
        b'{"replicas": 2, "op_id": ""}',
        b'{"replicas": 2, "op_id": "a/b"}',
        b'{"replicas": 2, "deadline_s": 0}',
        b'{"replicas": 2, "deadline_s": NaN}',
        b'{"replicas": 2, "deadline_s": 1e9}',
        b'{"replicas": 2, "dry_run": 1}',
        b'{"replicas": 2, "reason": "' + b"x" * 501 + b'"}',
        b"[" * 100_000,
    ],
)
async def test_bad_bodies_are_refused_before_the_loop_hears_of_them(listener: Listener, body: bytes) -> None:
    answer = await listener.call("POST", "/v1/scale", raw=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_request", "invalid_target", "invalid_json")
    assert listener.orders == []


def test_bodies_become_orders() -> None:
    order = parse_scale(b'{"remove": ["1", 2, "r1t0"], "op_id": "x", "dry_run": true, "deadline_s": 5}', 600.0)
    assert order == Order("x", Request(remove=(1, 2), deadline_s=5.0), Target(remove=(1, 2)), True)
    assert parse_scale(b'{"replicas": 3}', 600.0).request.deadline_s == 600.0
    lost = parse_scale(b'{"remove": ["r1"], "lost": true}', 600.0)
    assert lost.request.is_lost
    assert lost.target is not None
    assert lost.target.is_lost
    with pytest.raises(InvalidRequest, match="there is no remove"):
        parse_scale(b'{"replicas": 3, "lost": true}', 600.0)
    assert parse_rebalance(b"", 9.0) == Order("", Request(deadline_s=9.0), None)


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        ([], NO_CALLER),
        ([("traceparent", PARENT)], CallerTrace(PARENT)),
        ([("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")], CallerTrace(PARENT, "a=1,b=2")),
        ([("tracestate", "a=1")], NO_CALLER),
        ([("traceparent", PARENT), ("tracestate", "a=" + "x" * 511)], CallerTrace(PARENT)),
        ([("traceparent", PARENT), ("traceparent", PARENT)], NO_CALLER),
        ([("traceparent", "0" * 129)], NO_CALLER),
    ],
)
@pytest.mark.parametrize("path", ["/v1/scale", "/v1/rebalance"])
async def test_an_order_brings_its_caller_s_trace(
    listener: Listener, path: str, headers: list[tuple[str, str]], caller: CallerTrace
) -> None:
    transport = httpx.ASGITransport(app=listener.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://scaler") as client:
        sent = [("authorization", "Bearer secret"), *headers]
        body = b'{"replicas": 3}' if path == "/v1/scale" else b""
        answer = await client.post(path, content=body, headers=sent)
    assert answer.status_code == 202
    assert [order.caller for order in listener.orders] == [caller]


async def test_a_body_without_end_is_refused(listener: Listener) -> None:
    answer = await listener.call("POST", "/v1/scale", raw=b" " * (admin.BODY_BYTES_MAX + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


# ---- what becomes of an order ----------------------------------------------------------------------------------------


async def test_scaling_is_accepted_and_a_dry_run_shows_the_plan(listener: Listener) -> None:
    order = parse_scale(b'{"replicas": 3}', 600.0)
    operation = accept(order, "op-1", UP, planned_of(UP, SIZES), 5.0)
    listener.answer = Accepted(operation)
    answer = await listener.call("POST", "/v1/scale", {"replicas": 3})
    assert answer.status_code == 202
    assert (answer.json()["op_id"], answer.json()["phase"], answer.json()["legs"]) == ("op-1", "plan", 2)
    assert listener.orders == [order]
    listener.answer = Accepted(operation, UP, SIZES)
    answer = await listener.call("POST", "/v1/scale", {"replicas": 3, "dry_run": True})
    assert answer.status_code == 200
    plan = answer.json()
    assert (plan["kind"], len(plan["legs"]), plan["planned"]["joining"]) == ("scale_up", 2, ["r2t0"])
    assert plan["legs"][0]["copies"] == [["expert.0.0", "host:0", "host:1"]]
    assert plan["legs"][0]["moves"] == {
        "moves": [["host:0", "host:1", 1, 1, SIZES.experts[0]]],
        "pairs": 1,
        "records": 1,
        "bytes": SIZES.experts[0],
    }
    assert plan["planned"]["devices"]["host:1"]["bytes_in"] == 14


async def test_refusals_keep_their_code(listener: Listener) -> None:
    listener.answer = Conflict("operation a is in progress", code="operation_running")
    answer = await listener.call("POST", "/v1/scale", {"replicas": 3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "operation_running")
    answer = await listener.call("POST", "/v1/rebalance")
    assert answer.status_code == 409
    listener.answer = NotFound("no operation x", code="unknown_operation")
    answer = await listener.call("DELETE", "/v1/operations/x")
    assert (answer.status_code, listener.orders[-1]) == (404, CancelOperation("x"))


def test_an_op_id_names_one_operation() -> None:
    order = parse_scale(b'{"replicas": 3, "op_id": "op"}', 600.0)
    operation = accept(order, "op", UP, planned_of(UP, SIZES), 0.0)
    assert repeated(order, operation, []) is operation
    assert repeated(order, None, [operation]) is operation
    assert repeated(order, None, []) is None
    again = parse_scale(b'{"replicas": 3, "op_id": "op", "reason": "told again", "deadline_s": 5}', 900.0)
    assert repeated(again, None, [operation]) is operation, "whoever repeats an order need not know how it was told"
    with pytest.raises(Conflict, match="another target") as reused:
        repeated(parse_scale(b'{"replicas": 2, "op_id": "op"}', 600.0), None, [operation])
    assert reused.value.code == "op_id_reused"
    with pytest.raises(Conflict, match="operation op is in progress") as running:
        repeated(parse_scale(b'{"replicas": 2}', 600.0), operation, [])
    assert running.value.code == "operation_running"


def test_cancelling_depends_on_the_phase() -> None:
    operation = operation_of(UP)
    assert cancelled("op", operation, [], is_durable=True).is_cancelled
    commit = msgspec.structs.replace(operation, phase="commit")
    assert cancelled("op", commit, [], is_durable=False).is_cancelled
    with pytest.raises(Conflict, match="past the point of no return: leg 1, phase commit"):
        cancelled("op", commit, [], is_durable=True)
    late = msgspec.structs.replace(operation, phase="release")
    for current, ended, code in ((late, [], "committed"), (None, [operation], "operation_ended")):
        with pytest.raises(Conflict) as refused:
            cancelled("op", current, ended, is_durable=True)
        assert refused.value.code == code
    with pytest.raises(NotFound):
        cancelled("other", operation, [], is_durable=True)


async def test_a_loop_that_does_not_answer_is_waited_for_no_longer_than_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "ANSWER_S_MAX", 0.05)
    silent = CommandQueue(lambda: None, SYSTEM_CLOCK)
    with pytest.raises(DeadlineExceeded):
        await silent.ask(CancelOperation("x"))
    silent.serve(lambda _: pytest.fail("nobody waits for it any more"))
    waits = [asyncio.create_task(silent.ask(CancelOperation(str(i)))) for i in range(admission.ORDERS_MAX + 1)]
    done = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(done[-1], Overloaded)


async def test_an_order_that_cannot_be_carried_out_yet_is_tried_again() -> None:
    tries = iter([Later(Conflict("not yet")), Later(Conflict("not yet")), Accepted(operation_of(UP))])

    def handle(_: Order | CancelOperation) -> Accepted:
        answer = next(tries)
        if isinstance(answer, Later):
            raise answer
        return answer

    waiting = CommandQueue(lambda: None, SYSTEM_CLOCK)
    asked = asyncio.create_task(waiting.ask(CancelOperation("x")))
    for _ in range(3):
        assert not asked.done()
        await asyncio.sleep(0)
        waiting.serve(handle)
    assert (await asked).operation == operation_of(UP)


async def test_an_order_that_waits_too_long_gets_its_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "ANSWER_S_MAX", 5.0)
    monkeypatch.setattr(admission, "REFUSE_S", 5.0)

    def handle(_: Order | CancelOperation) -> Accepted:
        raise Later(Conflict("operation a is in progress", code="operation_running"))

    waiting = CommandQueue(lambda: None, SYSTEM_CLOCK)
    asked = asyncio.create_task(waiting.ask(CancelOperation("x")))
    await asyncio.sleep(0)
    waiting.serve(handle)
    with pytest.raises(Conflict, match="operation a"):
        await asked
    waiting.serve(lambda _: pytest.fail("it was answered"))


# ---- views -----------------------------------------------------------------------------------------------------------


async def test_operations_are_shown_with_the_hmms_progress(listener: Listener) -> None:
    world = World(UP.before)
    operation = world.run_to(operation_of(UP), "prepare")
    operation = world.step(operation)
    ended = msgspec.structs.replace(operation, op_id="old", phase="aborted", error=Refused("cancelled", "no"))
    listener.status_cache.snapshot = snapshot_of(world, operation=operation, ended=(ended,))
    listed = (await listener.call("GET", "/v1/operations")).json()["operations"]
    assert [(item["op_id"], item["outcome"]) for item in listed] == [("op", None), ("old", "cancelled")]
    assert listed[0]["progress"]["bytes_total"] == 1000
    assert listed[1]["progress"] is None
    one = await listener.call("GET", "/v1/operations/op")
    assert one.json()["phase"] == "prepare"
    assert (await listener.call("GET", "/v1/operations/none")).json()["error"]["code"] == "unknown_operation"
    listener.status_cache.snapshot = msgspec.structs.replace(
        listener.status_cache.snapshot, phase="starting", operation=None
    )
    unread = await listener.call("GET", "/v1/operations/op")
    assert (unread.status_code, unread.json()["error"]["code"]) == (503, "not_ready")  # the journal may know it


@pytest.mark.parametrize(("plan", "slot", "state"), [(UP, 2, "joining"), (DOWN, 1, "leaving")])
async def test_layout_and_devices_tell_who_joins_and_who_leaves(
    listener: Listener, plan: Any, slot: int, state: str
) -> None:
    world = World(plan.before)
    operation = world.run_to(operation_of(plan), "prepare")
    listener.status_cache.snapshot = snapshot_of(world, operation=operation, loads={0: load_of(3, 9)})
    devices = (await listener.call("GET", "/v1/devices")).json()["devices"]
    assert (devices[slot]["state"], devices[0]["state"], devices[3]["state"]) == (state, "used", "free")
    layout = (await listener.call("GET", "/v1/layout")).json()
    assert [rank["state"] for rank in layout["ranks"] if rank["slot"] == slot] == [state]
    assert layout["ranks"][0]["kv_blocks_free"] == 3


async def test_which_blocks_are_free_the_leader_knows(listener: Listener) -> None:
    world = World(UP.before)
    seats = tuple(Seat(RankId(0, tp), seat.slot, seat.device) for tp, seat in enumerate(world.layout.seats))
    layout = msgspec.structs.replace(world.layout, tp=2, seats=seats)
    loads = {0: load_of(3, 9), 1: load_of(0, 9, tp=1)}
    listener.status_cache.snapshot = snapshot_of(world, layout=layout, loads=loads)
    ranks = (await listener.call("GET", "/v1/layout")).json()["ranks"]
    assert [rank["kv_blocks_free"] for rank in ranks] == [3, None]
    text = (await listener.call("GET", "/metrics")).text
    for line in ('elasticmoe:kv_blocks{state="free"} 3.0', 'elasticmoe:kv_blocks{state="used"} 6.0'):
        assert line in text
    assert [rank[1:3] for rank in (await listener.call("GET", "/v1/now")).json()["ranks"]] == [[9, 3], [9, 3]]


async def test_metrics_never_reset(listener: Listener) -> None:
    world = World(DOWN.before)
    done = world.run(operation_of(DOWN))
    listener.meters.operation(done, "done")
    listener.meters.phase("prepare", 0.2)
    listener.status_cache.snapshot = snapshot_of(world, loads={0: load_of(3, 9), 2: load_of(4, 9)})
    text = (await listener.call("GET", "/metrics")).text
    for line in (
        'elasticmoe:scale_operations_total{kind="scale_down",outcome="done"} 1.0',
        'elasticmoe:scale_phase_seconds_count{phase="prepare"} 1.0',
        "elasticmoe:scale_pause_seconds_count 1.0",
        "elasticmoe:scale_bytes_moved_total 1000.0",
        'elasticmoe:kv_blocks{state="free"} 7.0',
        'elasticmoe:kv_blocks{state="used"} 11.0',
        "elasticmoe:epoch 2.0",
        'elasticmoe:experts_per_rank{rank="r0t0"} 2.0',
    ):
        assert line in text, line


async def test_everything_asks_for_the_token_and_pages_of_others_are_refused(listener: Listener) -> None:
    transport = httpx.ASGITransport(app=listener.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://scaler") as client:
        for method, path in (("POST", "/v1/scale"), ("GET", "/v1/events"), ("DELETE", "/v1/operations/x")):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_admin_token")
            answer = await client.request(method, path, headers={"Origin": "http://evil"})
            assert answer.status_code == 403
        assert (await client.get("/ready")).status_code == 200
    assert listener.orders == []


# ---- events ----------------------------------------------------------------------------------------------------------


def event(reason: str) -> Event:
    return Event("operation_phase", reason, 1, "scaler:a", 5.0, {"phase": "commit"})


async def test_events_go_on_where_a_listener_left_off() -> None:
    events = EventStream()
    events.fence = 4
    for reason in ("one", "two", "three"):
        events.publish(event(reason))
    stream = events.listen("4-1", 5.0)
    assert [(await anext(stream))[0] for _ in range(2)] == ["4-2", "4-3"]  # type: ignore[index]
    assert await anext(stream) is None, "that was the past"
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    threading.Thread(target=events.publish, args=(event("four"),)).start()
    found = await asyncio.wait_for(waiting, 5)
    assert found is not None
    assert (found[0], found[1].reason) == ("4-4", "four")
    quiet = events.listen("", 0.01)
    assert await anext(quiet) is None  # a heartbeat
    unknown = events.listen("3-99", 5.0)  # of an earlier scaler: all that is left
    assert (await anext(unknown))[0] == "4-1"  # type: ignore[index]
    for listening in (stream, quiet, unknown):
        await listening.aclose()  # type: ignore[attr-defined]


async def test_listeners_are_bounded_and_end_with_the_scaler() -> None:
    events = EventStream()
    streams = [events.listen("", 0.01) for _ in range(LISTENERS_MAX)]
    for stream in streams:
        assert await anext(stream) is None
    with pytest.raises(Overloaded, match="16 listeners"):
        await anext(events.listen("", 0.01))
    events.close()
    for stream in streams:
        assert [item async for item in stream] == []
    events.check()


async def test_the_stream_has_ids_and_kinds(listener: Listener) -> None:
    listener.events.publish(event("first"))
    task = asyncio.create_task(listener.call("GET", "/v1/events"))
    while not listener.events._listeners:
        await asyncio.sleep(0.001)
    after, is_taken = listener.events._after, asyncio.Event()

    def taken(*given: Any) -> Any:
        found = after(*given)
        if found:
            is_taken.set()
        return found

    listener.events._after = taken  # type: ignore[method-assign]
    listener.events.publish(event("second"))
    await asyncio.wait_for(is_taken.wait(), 60)
    listener.events.close()
    answer = await asyncio.wait_for(task, 60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.strip().split("\n\n")
    assert blocks[0] == ": events"
    assert blocks[1] == ": heartbeat", "there is no past without a Last-Event-ID"
    assert blocks[2].startswith("id: 0-2\nevent: operation_phase\ndata: {")
    assert json.loads(blocks[2].splitlines()[2][6:])["reason"] == "second"
