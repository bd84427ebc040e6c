"""What the scaler writes to the store, by a thread of its own: the loop never waits for the store.

The operation in progress is written at each change of its state; the loop asks `is_durable` before it sends a command
that needs the record. What the store does not take is kept and written later: the newest state of the operation, the
newest layout and policy, and events up to a bound. While there is nothing to write, it is checked that the store still
has what was written: one that was emptied or rolled back, or that a superseded scaler wrote to before its fencing epoch
was restored, is put right.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from elasticmoe.common.clock import Clock
from elasticmoe.common.failpoint import failpoint
from elasticmoe.common.layout import Layout, Served
from elasticmoe.common.protocol.errors import ElasticMoEError, Fenced, PayloadTooLarge, Unavailable
from elasticmoe.common.store import Event, Store, Writer
from elasticmoe.common.telemetry import get_logger
from elasticmoe.services.scaler.control.audit_log import AuditRecord, PlanMade
from elasticmoe.services.scaler.operation.operation import Operation
from elasticmoe.services.scaler.policy.record import PolicyRecord
from elasticmoe.services.scaler.store.reserve import DiskReserve, bytes_of

log = get_logger("scaler")

EVENTS_QUEUED_MAX = 1_000
DECISIONS_QUEUED_MAX = 100
PLANS_QUEUED_MAX = 8
RETRY_S = 0.5
VERIFY_S = 2.0  # a store that was emptied or rolled back gets the layout and the operation again after this time
CLOSE_S_MAX = 3.0
# A store that found no room looks every second whether there is some, puts that off by up to two while the disk still
# flushes, and is asked again every RETRY_S; as much again for a busy machine.
REOPEN_S = 7.0

StateMark = tuple[str, tuple[object, ...]]


class Journal:
    """Made and called by the loop's thread; `turn` and the functions that it is given are called by the journal's own,
    once `start` has been called. `note_epoch`: makes the epoch of a layout durable on this host, before it can be seen.
    Raises Unavailable."""

    def __init__(
        self,
        store: Store,
        holder: str,
        note_epoch: Callable[[int], None],
        on_fenced: Callable[[], None],
        on_written: Callable[[], None],
        reserve: DiskReserve,
        clock: Clock,
    ) -> None:
        """`reserve`: room for an operation's records, where the store's disk is this host's."""
        self._store = store
        self._note_epoch = note_epoch
        self._reserve = reserve
        self._clock = clock
        self._writer = Writer(holder, 0)
        self._on_fenced = on_fenced
        self._on_written = on_written
        self._lock = threading.Condition()
        self._operation: Operation | None = None
        self._ended: deque[Operation] = deque()
        self._layout: Layout | None = None
        self._policy: PolicyRecord | None = None
        self._events: deque[Event] = deque(maxlen=EVENTS_QUEUED_MAX)
        self._plans: deque[PlanMade] = deque(maxlen=PLANS_QUEUED_MAX)
        self._decisions: deque[AuditRecord] = deque(maxlen=DECISIONS_QUEUED_MAX)
        self._written: StateMark | None = None
        self._stored = ""  # what the store's mark is after our own last write
        self._announced = 0
        self._closing = False
        self._failing = False
        self._full = ""
        self._failure: ElasticMoEError | None = None  # of the last turn
        self._reserved_for = ""  # this operation
        self._given_up_at: float | None = None  # the reserve, for an operation that is still in progress
        self._last_layout: Layout | None = None
        self._last_operation: Operation | None = None
        self._last_policy: PolicyRecord | None = None
        self._instance = ""
        self._served: Served | None = None
        self._verified_at = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Let a thread of the journal's own take its turns, until `close`."""
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def act_under(self, fence: int) -> None:
        """Begin to write, with this fencing epoch. After the store's journal has been read: what it has from before and
        was not adopted is dropped."""
        with self._lock:
            self._writer = Writer(self._writer.holder, fence)
            self._lock.notify()

    def reserve(self, operation: Operation) -> None:
        """Take room for all records of an operation that is about to begin. Raises Unavailable `storage_full`."""
        with self._lock:
            self._reserve.take(bytes_of(operation))
            self._reserved_for, self._given_up_at = operation.op_id, None

    def put(self, operation: Operation) -> None:
        """Write the state of the operation in progress. Does not block."""
        with self._lock:
            self._operation = operation
            self._lock.notify()

    def end(self, operation: Operation) -> None:
        """Move the operation to those that ended. Does not block."""
        with self._lock:
            self._operation = None
            self._ended.append(operation)
            self._lock.notify()

    def announce(self, layout: Layout) -> None:
        """Make `layout` the one that routers see. Does not block."""
        with self._lock:
            self._layout = layout
            self._lock.notify()

    def keep(self, policy: PolicyRecord) -> None:
        """Keep the policy that is in force. Does not block."""
        with self._lock:
            self._policy = policy
            self._lock.notify()

    def is_kept(self, policy: PolicyRecord) -> bool:
        """Whether the store holds this policy, or one that came after it."""
        with self._lock:
            return self._last_policy is not None and self._last_policy.version >= policy.version

    def event(self, event: Event) -> None:
        """Append an event. Does not block; the oldest unwritten ones fall out beyond EVENTS_QUEUED_MAX."""
        with self._lock:
            self._events.append(event)
            self._lock.notify()

    def decision(self, decision: AuditRecord) -> None:
        """Keep a decision with what it was made from. Does not block; the oldest unwritten ones fall out beyond
        DECISIONS_QUEUED_MAX. A plan is written before the operation that it is of."""
        with self._lock:
            if isinstance(decision, PlanMade):
                self._plans.append(decision)
            else:
                self._decisions.append(decision)
            self._lock.notify()

    def is_durable(self, operation: Operation) -> bool:
        """Whether the store holds this state of the operation."""
        with self._lock:
            return self._written == _mark(operation)

    @property
    def announced_epoch(self) -> int:
        """Epoch of the layout that was announced last."""
        with self._lock:
            return self._announced

    def check_room(self) -> None:
        """Raises Unavailable `storage_full` while the store takes no writes for want of room."""
        with self._lock:
            if self._full:
                raise Unavailable(f"nothing can be journaled: {self._full}", code="storage_full")

    def check_takes(self) -> None:
        """Raises Unavailable while the store has not taken, or does not answer, what it was asked last."""
        self.check_room()
        with self._lock:
            if self._failure is not None:
                raise Unavailable(f"nothing can be kept: {self._failure.message}", code=self._failure.code)

    def no_room(self) -> str:
        """Why the store takes no writes, where that is for want of room and will not pass by itself: what was reserved
        has been given up, and the store did not find it."""
        with self._lock:
            at = self._given_up_at
            return "" if at is not None and self._clock.monotonic() - at < REOPEN_S else self._full

    def adopt(self, operation: Operation | None) -> None:
        """The operation in progress was read from the store just now: its state needs no writing, and what an earlier
        scaler has reserved for it stays so. None: there is none, and nothing stays reserved."""
        self._last_operation = operation
        if operation is None:
            self._free_reserve("")
            return
        with self._lock:
            self._written, self._reserved_for = _mark(operation), operation.op_id

    def adopt_kept(self, policy: PolicyRecord | None, instance: str, served: Served | None) -> None:
        """The store has these now: it gets them again where it loses them. None and empty: that is left alone."""
        self._last_policy, self._instance, self._served = policy, instance, served

    def close(self) -> None:
        """Write what is left as long as the store takes it, and end the thread."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S_MAX)

    def _run(self) -> None:
        wait_s: float | None = 0.0
        while wait_s is not None:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or (self._has_work() and not self._failing), wait_s)
                if self._closing and not self._has_work():
                    return
            wait_s = self.turn(self._clock.monotonic())
            if self._failing and self._closing:
                return

    def turn(self, now: float) -> float | None:
        """Write one thing, or look whether the store has what was written, where it is time for that. The next turn is
        due after so many seconds, and as soon as there is something to write unless the store has just failed; None:
        another scaler has taken over, and there is none."""
        self._failing = False
        try:
            if self._has_work():
                self._write()
            elif now - self._verified_at >= VERIFY_S:
                self._verified_at = now
                self._verify()
            with self._lock:
                self._failure = None
        except Fenced:
            self._on_fenced()
            return None
        except ElasticMoEError as error:
            log.warning("the store does not take the journal", because=error.message)
            self._note_failure(error)
            self._failing = True
            return RETRY_S
        return max(0.0, VERIFY_S - (now - self._verified_at))

    def _note_failure(self, error: ElasticMoEError) -> None:
        """Where the store has no room, leave it what was reserved."""
        is_full = error.code == "storage_full"
        with self._lock:
            self._full = error.message if is_full else ""
            self._failure = error
            is_given_up = is_full and self._reserve.give_up()
            if is_given_up:
                self._given_up_at = self._clock.monotonic()
        if is_given_up:
            log.warning("the store gets the room that was reserved for the operation")

    def _verify(self) -> None:
        """Write again what the store has lost, or what somebody else has put in its place."""
        if not self._writer.fence:
            return
        layout, operation = self._last_layout, self._last_operation
        if layout is not None and self._store.get_epoch() < layout.epoch:
            self._store.put_layout(self._writer, layout)  # raises where it was another scaler that wrote
            log.warning("the store had lost the layout; it was written again", epoch=layout.epoch)
        if self._store.journal_mark() != self._stored:
            self._keep_again()
            before, self._stored = self._stored, self._store.put_operation(self._writer, operation)
            if before:
                log.warning("the store had lost the journal; it was written again")
            if operation is None:
                self._free_reserve("")

    def _keep_again(self) -> None:
        if self._last_policy is not None:
            self._store.put_policy(self._writer, self._last_policy)
        if self._instance:
            self._store.put_instance(self._writer, self._instance)
        if self._served is not None:
            self._store.put_served(self._writer, self._served)

    def _free_reserve(self, op_id: str) -> None:
        """Nothing stays reserved for that operation; empty: for one of an earlier scaler that no journal knows."""
        with self._lock:
            if self._reserved_for == op_id:
                self._reserve.give_up()
                self._reserved_for = ""

    def _has_work(self) -> bool:
        state = self._operation or self._ended or self._layout or self._policy
        return bool((state or self._events or self._plans or self._decisions) and self._writer.fence)

    def _write(self) -> None:
        self._write_next()
        with self._lock:
            self._full = ""
            self._reserve_again()

    def _reserve_again(self) -> None:
        """The store has found room: what was given up for that is reserved for the operation's other records, if it can
        be. The lock is held."""
        operation = self._last_operation
        if self._given_up_at is None or operation is None:
            return
        if operation.op_id == self._reserved_for:
            with suppress(Unavailable):
                self._reserve.take(bytes_of(operation))
                self._given_up_at = None

    def _write_next(self) -> None:
        """Write one thing, the most urgent one; it is forgotten only when it is written."""
        with self._lock:
            ended = self._ended[0] if self._ended else None
            operation, layout, policy = self._operation, self._layout, self._policy
            event = self._events[0] if self._events else None
            is_plan_next, has_decisions = bool(self._plans and ended is None), bool(self._decisions)
        if is_plan_next:
            self._write_decision(self._plans)
        elif ended is not None:  # before the next operation begins
            failpoint(f"scaler.{ended.phase}.before")
            self._stored = self._store.end_operation(self._writer, ended)
            failpoint(f"scaler.{ended.phase}.after")
            self._last_operation = None
            with self._lock:
                self._ended.popleft()
            self._free_reserve(ended.op_id)
        elif operation is not None:
            place = f"scaler.leg{operation.leg + 1}.{operation.phase}"
            failpoint(f"{place}.before")
            if operation.plan is not None:
                self._note_epoch(operation.plan.after.epoch)
            self._stored = self._store.put_operation(self._writer, operation)
            failpoint(f"{place}.after")
            self._last_operation = operation
            with self._lock:
                self._written = _mark(operation)
                if self._operation is operation:
                    self._operation = None
            self._on_written()
        elif layout is not None:
            self._note_epoch(layout.epoch)
            self._store.put_layout(self._writer, layout)
            self._last_layout = layout
            with self._lock:
                self._announced = layout.epoch
                if self._layout is layout:
                    self._layout = None
            self._on_written()
        elif policy is not None:
            self._store.put_policy(self._writer, policy)
            # A store that is rolled back to before the policy then has another mark, and gets it again.
            self._stored = self._store.put_operation(self._writer, self._last_operation)
            with self._lock:
                self._last_policy = policy
                if self._policy is policy:
                    self._policy = None
            self._on_written()
        elif event is not None:
            self._store.append_event(self._writer, event)
            with self._lock:
                if self._events and self._events[0] is event:
                    self._events.popleft()
        elif has_decisions:
            self._write_decision(self._decisions)

    def _write_decision(self, queue: deque[PlanMade] | deque[AuditRecord]) -> None:
        with self._lock:
            decision = queue[0]
        try:
            self._store.append_decision(self._writer, decision)
        except PayloadTooLarge as error:
            log.warning("a decision is not kept", because=error.message)
        with self._lock:
            if queue and queue[0] is decision:
                queue.popleft()


def _mark(operation: Operation) -> StateMark:
    return operation.op_id, operation.mark
