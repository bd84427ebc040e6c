"""Between the admin listener's threads and the scaler's loop: orders go in through a bounded queue, answers come back
as futures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, Full, Queue

from elasticmoe.common.clock import Clock
from elasticmoe.common.protocol.errors import (
    DeadlineExceeded,
    ElasticMoEError,
    Overloaded,
)
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.control.admission import Accepted, CancelOperation, Later, Order

log = get_logger("scaler")
ORDERS_MAX = 32
ANSWER_S_MAX = 15.0
REFUSE_S = 1.0  # what waits is refused so long before its client gives up


class CommandQueue:
    """Orders, from any thread to the loop's. `wake` lets the loop look. `_waiting` belongs to the loop's thread."""

    def __init__(self, wake: Callable[[], None], clock: Clock) -> None:
        self._wake = wake
        self._clock = clock
        self._queue: Queue[_Entry] = Queue(ORDERS_MAX)
        self._waiting: list[_Entry] = []

    async def ask(self, order: Order | CancelOperation) -> Accepted:
        """Hand an order in and wait for what becomes of it. Raises its refusal, Overloaded, or DeadlineExceeded."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.put(order)), ANSWER_S_MAX)
        except TimeoutError:
            text = f"the scaler did not answer within {ANSWER_S_MAX:g} s; GET /v1/operations tells what it does"
            raise DeadlineExceeded(text) from None

    def put(self, order: Order | CancelOperation) -> Future[Accepted]:
        """Hand an order in: what becomes of it, for at most ANSWER_S_MAX. One whose future is cancelled before it is
        carried out is not. Raises Overloaded."""
        future: Future[Accepted] = Future()
        try:
            self._queue.put_nowait((order, self._clock.monotonic() + ANSWER_S_MAX, future))
        except Full:
            raise Overloaded(f"{ORDERS_MAX} orders wait already") from None
        self._wake()
        return future

    def serve(self, handle: Callable[[Order | CancelOperation], Accepted]) -> None:
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

    def _serve(self, entry: _Entry, handle: Callable[[Order | CancelOperation], Accepted]) -> None:
        order, deadline, future = entry
        # Nobody waits any more for an order that was cancelled meanwhile: it is not carried out.
        if self._clock.monotonic() > deadline or future.cancelled():
            return
        accepted: Accepted | ElasticMoEError
        try:
            accepted = handle(order)
        except Later as later:
            if self._clock.monotonic() < deadline - REFUSE_S and len(self._waiting) < ORDERS_MAX:
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


_Entry = tuple[
    Order | CancelOperation, float, Future[Accepted]
]  # with the monotonic time at which nobody waits any more
