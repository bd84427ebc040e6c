"""The newest events, shown to listeners as they come."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator

from elasticmoe.common.protocol.errors import Overloaded
from elasticmoe.common.store import Event

LISTENERS_MAX = 16
EVENTS_KEPT = 1_000


class EventStream:
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
