"""Virtual time: an event heap, actors that pause, crash and come back, and the network between them.

Everything random comes from one generator, so a seed gives the same run every time. Seconds are virtual throughout.
"""

from __future__ import annotations

import heapq
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from elasticmoe.common.protocol.codec import Message, Received
from elasticmoe.common.protocol.errors import DeadlineExceeded
from elasticmoe.common.protocol.replies import Refused
from tests.clocks import PlayedClock

EVENTS_SHOWN = 50
EVENTS_MAX = 200_000


class Violation(BaseException):
    """A promise was broken. No guard of the product against its own defects catches it."""


class Crashed(Exception):
    """The process that was executing has been killed."""


class Faults(msgspec.Struct, frozen=True):
    """What the network does to a message. `delay_max`: the longest, for the share `slow` of them; the others take a few
    milliseconds. Messages between two places keep their order unless `reorders`."""

    loss: float = 0.0
    doubled: float = 0.0
    delay_max: float = 0.0
    slow: float = 0.0
    reorders: bool = False


CALM = Faults()


class Actor(ABC):
    """A process. `life` counts its incarnations: what was to happen in an earlier one does not happen."""

    def __init__(self, sim: Sim, name: str) -> None:
        self.sim = sim
        self.name = name
        self.life = 0
        self.is_alive = True
        self.paused_until = 0.0
        self.is_blocked = False
        self.put_off: list[Any] = []

    @property
    def is_paused(self) -> bool:
        """It is stopped, as by SIGSTOP."""
        return self.paused_until > self.sim.now

    def pause(self, seconds: float) -> None:
        """Stop it for a while."""
        self.sim.note(f"{self.name} paused for {seconds:.2f} s")
        self.paused_until = max(self.paused_until, self.sim.now + seconds)

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        """Do something later, in this life."""
        self.sim.push(self.sim.now + seconds, self, self.life, what, args)

    def aside(self, seconds: float, what: Callable[[], None]) -> None:
        """As `after`, by a thread of its own: it goes on while the process's loop waits for an answer."""
        self.sim.push(self.sim.now + seconds, None, 0, self._aside, (self.life, what))

    def _aside(self, life: int, what: Callable[[], None]) -> None:
        if life != self.life or not self.is_alive:
            return
        if self.is_paused:
            self.sim.push(self.paused_until, None, 0, self._aside, (life, what))
        else:
            what()

    def end(self) -> None:
        """It is killed."""
        self.is_alive = False
        self.life += 1
        self.put_off.clear()

    @abstractmethod
    def receive(self, sender: str, message: Received[Any]) -> None:
        """A message has come."""


class Sim:
    """Owns time, the random generator, the addresses and the log of the last events."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self.clock = PlayedClock(lambda: self.now)
        self.log: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self.actors: dict[str, Actor] = {}  # by address
        self.faults: dict[str, Faults] = {}  # by plane: control, data, signals, `signals of SENDER`
        self.num_events = 0
        self._verbose = verbose
        self._heap: list[tuple[float, int, Actor | None, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._last: dict[tuple[str, str], float] = {}
        self._answers: dict[tuple[str, int], list[Received[Any]]] = {}
        self._seq = 0

    def note(self, text: str) -> None:
        """Remember an event for the report of a failure."""
        line = f"{self.now:9.3f}  {text}"
        self.log.append(line)
        if self._verbose:
            print(line)

    # ---- time

    def push(self, at: float, owner: Actor | None, life: int, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Let `what` happen at `at`, unless its owner has ended by then."""
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, owner, life, what, args))

    def step(self) -> None:
        """The next event."""
        at, count, owner, life, what, args = heapq.heappop(self._heap)
        self.now = max(self.now, at)
        if owner is not None:
            if owner.life != life or not owner.is_alive:
                return
            if owner.paused_until > self.now:
                heapq.heappush(self._heap, (owner.paused_until, count, owner, life, what, args))
                return
            if owner.is_blocked:
                owner.put_off.append((count, life, what, args))
                return
        self.num_events += 1
        if self.num_events > EVENTS_MAX:
            raise Violation(f"more than {EVENTS_MAX} events: something goes round in circles")
        what(*args)

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._heap and self._heap[0][0] <= until:
            self.step()
        self.now = max(self.now, until)

    # ---- network

    def send(self, source: str, target: str, message: Received[Any], plane: str = "control") -> None:
        """A message on its way, or two, or none."""
        faults = self.faults.get(plane, CALM)
        draw = self.rng.random
        if faults.loss and draw() < faults.loss:
            self.note(f"lost: {source} -> {target} {_text(message.body)}")
            return
        for _ in range(2 if faults.doubled and draw() < faults.doubled else 1):
            delay = 0.001 + 0.004 * draw()
            if faults.slow and draw() < faults.slow:
                delay += faults.delay_max * draw()
            at = self.now + delay
            if not faults.reorders:
                at = self._last[source, target] = max(at, self._last.get((source, target), 0.0))
            self.push(at, None, 0, self._deliver, (source, target, message))

    def _deliver(self, source: str, target: str, message: Received[Any]) -> None:
        actor = self.actors.get(target)
        if actor is None or not actor.is_alive:
            return
        if actor.paused_until > self.now:
            self.push(actor.paused_until, None, 0, self._deliver, (source, target, message))
            return
        waiting = self._answers.get((target, message.seq)) if message.seq else None
        if waiting is not None:
            waiting.append(message)
            return
        if actor.is_blocked:
            self._count += 1
            actor.put_off.append((self._count, actor.life, actor.receive, (source, message)))
            return
        if self._verbose:
            self.note(f"{source} -> {target} {_text(message.body)}")
        actor.receive(source, message)

    def next_seq(self) -> int:
        """A number for a message."""
        self._seq += 1
        return self._seq

    def call(self, caller: Actor, source: str, target: str, epoch: int, body: Message, deadline_s: float) -> Any:
        """Ask and wait, as the scaler's clients do, while everything else goes on. Raises the refusal, or
        DeadlineExceeded, or Crashed when the caller was killed meanwhile."""
        seq, life = self.next_seq(), caller.life
        answers: list[Received[Any]] = []
        self._answers[source, seq] = answers
        self.send(source, target, Received(epoch, source, seq, body))
        deadline = self.now + deadline_s
        caller.is_blocked = True
        while not answers and self._heap and self._heap[0][0] <= deadline and caller.life == life:
            self.step()
        del self._answers[source, seq]
        if caller.life != life:
            raise Crashed
        if not answers:
            self.now = max(self.now, deadline)
        if caller.paused_until > self.now:
            while self._heap and self._heap[0][0] <= caller.paused_until and caller.life == life:
                self.step()
            if caller.life != life:
                raise Crashed
        caller.is_blocked = False
        for count, of, what, args in caller.put_off:
            heapq.heappush(self._heap, (self.now, count, caller, of, what, args))
        caller.put_off = []
        if not answers:
            raise DeadlineExceeded(f"{target} did not answer within {deadline_s:g} s")
        if isinstance(answers[0].body, Refused):
            answers[0].body.raise_()
        return answers[0].body


def _text(body: object) -> str:
    return f"{type(body).__name__} {getattr(body, 'op_id', None) or getattr(body, 'request_id', '') or ''}"


class Push:
    """An end by which windows of load go to the scaler, with all that may happen to a message."""

    def __init__(self, sim: Sim, source: str) -> None:
        self._sim, self._source = sim, source

    def push(self, body: Message) -> bool:
        """See elasticmoe.common.endpoints."""
        plane = f"signals of {self._source}"
        if plane not in self._sim.faults:
            plane = "signals" if "signals" in self._sim.faults else "control"
        self._sim.send(self._source, "signals", Received(0, self._source, 0, body), plane)
        return True

    def close(self) -> None:
        """See elasticmoe.common.endpoints."""
