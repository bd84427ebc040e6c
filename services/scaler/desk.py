"""Between the admin listener's threads and the scaler's loop: orders go in through a bounded queue, answers come back
as futures, and events go out to listeners."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from queue import Empty, Full, Queue

import msgspec

from common.protocol.errors import DeadlineExceeded, ElasticMoEError, Overloaded
from common.store import Event
from common.telemetry import get_logger
from services.scaler.operation import Operation
from services.scaler.orders import Order
from services.scaler.plan import Plan

log = get_logger("scaler")

ORDERS_MAX = 32
ANSWER_S_MAX = 15.0
LISTENERS_MAX = 16
EVENTS_KEPT = 1_000


class Accepted(msgspec.Struct, frozen=True):
    """What became of an order: an operation, or the plan of a dry run with the operation that it would be."""

    operation: Operation
    plan: Plan | None = None


class Cancel(msgspec.Struct, frozen=True):
    """An order to cancel the operation `op_id`."""

    op_id: str


class Desk:
    """Orders, from any thread to the loop's. `wake` lets the loop look."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queue: Queue[tuple[Order | Cancel, float, Future[Accepted]]] = Queue(ORDERS_MAX)

    async def ask(self, order: Order | Cancel) -> Accepted:
        """Hand an order in and wait for what becomes of it. Raises its refusal, Overloaded, or DeadlineExceeded."""
        future: Future[Accepted] = Future()
        try:
            self._queue.put_nowait((order, time.monotonic() + ANSWER_S_MAX, future))
        except Full:
            raise Overloaded(f"{ORDERS_MAX} orders wait already") from None
        self._wake()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), ANSWER_S_MAX)
        except TimeoutError:
            text = f"the scaler did not answer within {ANSWER_S_MAX:g} s; GET /v1/operations tells what it does"
            raise DeadlineExceeded(text) from None

    def serve(self, handle: Callable[[Order | Cancel], Accepted]) -> None:
        """Let `handle` answer all orders that wait. The loop's thread."""
        while True:
            try:
                order, deadline, future = self._queue.get_nowait()
            except Empty:
                return
            # Nobody waits any more for an order that was cancelled meanwhile: it is not carried out.
            if time.monotonic() > deadline or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(handle(order))
            except ElasticMoEError as error:
                future.set_exception(error)
            except Exception as error:  # no order may end the scaler
                log.exception("order failed")
                future.set_exception(ElasticMoEError(f"the order could not be carried out: {type(error).__name__}"))


class Feed:
    """The newest events, numbered, for any number of listeners up to LISTENERS_MAX."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[tuple[str, Event]] = deque(maxlen=EVENTS_KEPT)
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._num_events = 0
        self._num_listeners = 0
        self._closed = False
        self.fence = 0

    def publish(self, event: Event) -> None:
        """Show an event to all listeners. Any thread; does not block."""
        with self._lock:
            self._num_events += 1
            self._events.append((f"{self.fence}-{self._num_events}", event))
        self._notify()

    def close(self) -> None:
        """End all listeners' streams."""
        self._closed = True
        self._notify()

    def _notify(self) -> None:
        with self._lock:
            for loop, event in self._listeners.values():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)

    def _after(self, last_id: str) -> list[tuple[str, Event]]:
        with self._lock:
            events = list(self._events)
        for index, (event_id, _) in enumerate(events):
            if event_id == last_id:
                return events[index + 1 :]
        return events  # an id of an earlier scaler, or one that has fallen out: all that is left

    def check(self) -> None:
        """Raises Overloaded when no further listener is taken."""
        if len(self._listeners) >= LISTENERS_MAX:
            raise Overloaded(f"{LISTENERS_MAX} listeners are connected already", code="too_many_listeners")

    async def listen(self, last_id: str, heartbeat_s: float) -> AsyncIterator[tuple[str, Event] | None]:
        """Events after the one of `last_id`, as they come; None where none came for `heartbeat_s`. With an empty
        `last_id` only what comes from now on. Raises Overloaded as `check` does."""
        self.check()
        changed = asyncio.Event()
        with self._lock:
            self._num_listeners += 1
            key = self._num_listeners
            self._listeners[key] = (asyncio.get_running_loop(), changed)
            if not last_id and self._events:
                last_id = self._events[-1][0]
        try:
            while not self._closed:
                changed.clear()
                for event_id, event in self._after(last_id):
                    last_id = event_id
                    yield event_id, event
                try:
                    await asyncio.wait_for(changed.wait(), heartbeat_s)
                except TimeoutError:
                    yield None
        finally:
            with self._lock:
                self._listeners.pop(key, None)
