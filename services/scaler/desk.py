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
REFUSE_S = 1.0  # what waits is refused so long before its client gives up
LISTENERS_MAX = 16
EVENTS_KEPT = 1_000


class Accepted(msgspec.Struct, frozen=True):
    """What became of an order: an operation, or the plan of a dry run with the operation that it would be."""

    operation: Operation
    plan: Plan | None = None


class Cancel(msgspec.Struct, frozen=True):
    """An order to cancel the operation `op_id`."""

    op_id: str


class Later(Exception):
    """The order cannot be carried out yet: it is tried again in each turn, and refused with `error` at last."""

    def __init__(self, error: ElasticMoEError) -> None:
        super().__init__(error.message)
        self.error = error


class Desk:
    """Orders, from any thread to the loop's. `wake` lets the loop look. `_waiting` belongs to the loop's thread."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queue: Queue[_Entry] = Queue(ORDERS_MAX)
        self._waiting: list[_Entry] = []

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
        entries, self._waiting = self._waiting, []
        for entry in entries:
            self._serve(entry, handle)
        while True:
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return
            self._serve(entry, handle)

    def _serve(self, entry: _Entry, handle: Callable[[Order | Cancel], Accepted]) -> None:
        order, deadline, future = entry
        # Nobody waits any more for an order that was cancelled meanwhile: it is not carried out.
        if time.monotonic() > deadline or future.cancelled():
            return
        accepted: Accepted | ElasticMoEError
        try:
            accepted = handle(order)
        except Later as later:
            if time.monotonic() < deadline - REFUSE_S and len(self._waiting) < ORDERS_MAX:
                self._waiting.append(entry)
                return
            accepted = later.error
        except ElasticMoEError as error:
            accepted = error
        except Exception as error:  # no order may end the scaler
            log.exception("order failed")
            accepted = ElasticMoEError(f"the order could not be carried out: {type(error).__name__}")
        if not future.set_running_or_notify_cancel():
            return
        if isinstance(accepted, ElasticMoEError):
            future.set_exception(accepted)
        else:
            future.set_result(accepted)


_Entry = tuple[Order | Cancel, float, Future[Accepted]]  # with the monotonic time at which nobody waits any more


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
        """Events after the one of `last_id`, as they come; None after those that there are already, and where none came
        for `heartbeat_s`. With an empty `last_id` only what comes from now on. Raises Overloaded as `check` does."""
        self.check()
        changed = asyncio.Event()
        with self._lock:
            self._num_listeners += 1
            key = self._num_listeners
            self._listeners[key] = (asyncio.get_running_loop(), changed)
            if not last_id and self._events:
                last_id = self._events[-1][0]
        try:
            is_first = True
            while not self._closed:
                changed.clear()
                for event_id, event in self._after(last_id):
                    last_id = event_id
                    yield event_id, event
                if is_first:
                    is_first = False
                    yield None
                try:
                    await asyncio.wait_for(changed.wait(), heartbeat_s)
                except TimeoutError:
                    yield None
        finally:
            with self._lock:
                self._listeners.pop(key, None)
