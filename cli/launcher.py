"""Starts the processes of a deployment, keeps them running and stops them. One thread, no decision of its own.

What happens when a child ends is decided in `supervisor.py`; this is the shell around it: processes, signals, clock.
All children are started by the main thread, because their ties to our life (see `child.py`) are to the thread that did.
What they leave behind when they end, such as a pool's ranks, becomes ours (`orphans.py`).
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from elasticmoe.cli.children import Child, ChildSpec
from elasticmoe.cli.console import Console
from elasticmoe.cli.logs import LOOK_S, Logs
from elasticmoe.cli.orphans import Orphans
from elasticmoe.cli.probes import Progress
from elasticmoe.cli.supervisor import ChildState, Exit, Fatal, Limits, decide, describe_exit
from elasticmoe.common.protocol.errors import DeadlineExceeded, ElasticMoEError
from elasticmoe.common.record import DownRecord, ProcessRecord
from elasticmoe.common.ties import take_in_orphans
from elasticmoe.common.wording import counted

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PROBE_INTERVAL_S = 0.1
_ANSWER_INTERVAL_S = 0.02  # of those that others start after: they take a tenth of a second
_IDLE_S = LOOK_S  # nothing is due but a look at the logs; an exit or a signal wakes us
_KILL_SECONDS_MAX = 10.0
_STRAY_GRACE_S = 1.0  # of processes that nobody is known to leave behind
_COMING_UP_S = 10.0

State = Literal["starting", "serving", "stopping"]


class Probing(Protocol):
    """What the launcher needs of `probes.Probe`."""

    def progress(self) -> Progress | None:
        """None when the deployment is ready."""

    def close(self) -> None:
        """Let go of connections. Idempotent."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run; it stops in the reverse order. `answers(spec)`: whether the process can be used: one that nobody
    starts after always can.

    `record`: called with the state, the living processes and those that are to be started again at each change, and
    again after a while where it answers that it could not write them. `listeners`: sockets that children serve, by
    name; they are closed when the launcher stops.
    """

    specs: Sequence[ChildSpec]
    environment: Mapping[str, str]
    directory: Path
    probe: Probing
    answers: Callable[[ChildSpec], bool]
    record: Callable[[State, tuple[ProcessRecord, ...], tuple[DownRecord, ...]], bool]
    listeners: Mapping[str, socket.socket]
    logs: Logs
    ready_seconds_max: float = 600.0
    limits: Limits = field(default_factory=Limits)


class StopRequested(Exception):
    """A signal asked for the end while the deployment was starting."""


class Launcher:
    """One run of a plan. Owns all children from `start` until `stop` returns. `num_unclean`: children that did not end
    as they should; `has_served`: the deployment was ready."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._specs = {spec.name: spec for spec in plan.specs}
        self._children: dict[str, Child] = {}
        self._states = {name: ChildState() for name in self._specs}
        self._due: dict[str, float] = {}
        self._down: dict[str, DownRecord] = {}
        self._look_at = 0.0
        self._state: State = "starting"
        self._num_signals = 0
        self._num_interrupts = 0
        self._asked: dict[str, float] = {}  # to end, before their turn: each with its age then
        self._is_recorded = True
        self._orphans = Orphans(lambda: {child.pid for child in self._children.values()})
        self._selector = selectors.DefaultSelector()
        self.num_unclean = 0
        self.has_served = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Record SIGTERM, SIGINT and SIGHUP instead of dying by them, and SIGCHLD; a handler does nothing but wake the
        loop."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: self._orphans.note_end())
        self._selector.register(reader, selectors.EVENT_READ, reader)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._selector.close()
            reader.close()
            writer.close()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._num_signals += 1
        self._num_interrupts += number == signal.SIGINT

    def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises StopRequested, DeadlineExceeded, or ElasticMoEError (`start_failed`) with the child's last line.
        """
        take_in_orphans()
        deadline = time.monotonic() + self._plan.ready_seconds_max
        self._start_all(deadline)
        phase = "the deployment was not ready"
        while (progress := self._plan.probe.progress()) is not None:
            self._console.progress(progress.phase, progress.bytes_done, progress.bytes_total)
            self._pause(deadline, f"{phase} ({progress.phase})")
        self._plan.probe.close()  # else the listeners keep its connections until they time out
        self._turn(0)  # a child that ended meanwhile ended while starting
        self._console.close()
        self._state = "serving"
        self.has_served = True
        self._record()

    def _start_all(self, deadline: float) -> None:
        """Each child as soon as those answer that it starts after."""
        waiting, silent = list(self._plan.specs), set(self._specs)
        while True:
            silent -= {name for name in silent & set(self._children) if self._plan.answers(self._specs[name])}
            for spec in [spec for spec in waiting if silent.isdisjoint(spec.after)]:
                self._console.progress(f"starting {spec.name}")
                self._spawn(spec.name)
                waiting.remove(spec)
            if not waiting:
                return
            late = {name for spec in waiting for name in spec.after} & silent & set(self._children)
            self._pause(deadline, f"{', '.join(sorted(late))} did not answer", _ANSWER_INTERVAL_S)

    def _pause(self, deadline: float, text: str, seconds: float = _PROBE_INTERVAL_S) -> None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{text} within {self._plan.ready_seconds_max:g} s", code="start_timeout")
        self._turn(seconds)
        if self._num_signals:
            raise StopRequested

    def supervise(self) -> None:
        """Keep the children running until a signal asks for the end. Raises ElasticMoEError (`child_failed`)."""
        while not self._num_signals:
            now = time.monotonic()
            for name in [name for name, due in self._due.items() if due <= now]:
                del self._due[name]
                self._spawn(name)
            if not self._is_recorded:
                self._record()
            self._turn(min([_IDLE_S, *(max(0.0, due - now) for due in self._due.values())]))

    def _turn(self, timeout_s: float) -> None:
        """Wait for exits and signals, and handle the exits."""
        now = time.monotonic()
        if now >= self._look_at:
            self._plan.logs.look()
            self._look_at = now + LOOK_S
        if (reap_at := self._orphans.reap_at) is not None:
            timeout_s = min(timeout_s, max(0.0, reap_at - now))
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, str):
                self._on_exit(key.data)
            else:
                try:
                    key.data.recv(4096)
                except BlockingIOError:
                    pass  # another wake-up took the bytes
        if (reap_at := self._orphans.reap_at) is not None and time.monotonic() >= reap_at:
            self._orphans.reap()

    def _spawn(self, name: str) -> None:
        try:
            child = Child(
                self._specs[name],
                self._plan.environment,
                self._plan.directory,
                self._log_path(name),
                self._plan.listeners,
            )
        except OSError as error:
            self._decide(name, 127, f"cannot be started: {error.strerror}")
            return
        self._children[name] = child
        self._down.pop(name, None)
        self._selector.register(child.pidfd, selectors.EVENT_READ, name)
        self._record()

    def _log_path(self, name: str) -> Path:
        return self._plan.directory / "logs" / f"{name}.log"

    def _on_exit(self, name: str) -> None:
        child = self._children.pop(name)
        self._selector.unregister(child.pidfd)
        last_line = child.last_line()
        self._decide(name, child.reap(), last_line)
        self._record()

    def _decide(self, name: str, code: int, last_line: str) -> None:
        now = time.monotonic()
        event = Exit(code, starting=self._state == "starting", is_vital=self._specs[name].is_vital)
        self._states[name], decision = decide(now, self._states[name], event, self._plan.limits)
        ended = f"{name} ended with {describe_exit(code)}"
        said = f"; its last line: {last_line}" if last_line else "; it logged nothing"
        if isinstance(decision, Fatal):
            # While it starts, the child's own words are the explanation; later the rule that was broken is part of it.
            reason = "" if event.starting else f" and {decision.reason}"
            raise ElasticMoEError(ended + reason + said, code="start_failed" if event.starting else "child_failed")
        self._due[name] = decision.at
        pause_s = decision.at - now
        restarts = self._states[name].num_restarts
        self._down[name] = DownRecord(name, restarts, ended + said, time.time() + pause_s, decision.is_failing)
        self._console.line(f"{ended}; {decision.why} in {pause_s:.1f} s{said}")

    def _record(self) -> None:
        living = [name for name in self._specs if name in self._children]
        records = tuple(self._children[name].record(self._states[name].num_restarts) for name in living)
        self._is_recorded = self._plan.record(self._state, records, tuple(self._down.values()))

    def stop(self) -> None:
        """Stop all children in reverse order: SIGTERM, then SIGKILL after the child's grace. Idempotent.

        A further Ctrl-C meanwhile kills what is left at once; a further SIGTERM changes nothing, so that two `down` do
        no harm. Counts in `num_unclean` the children that were killed or ended with another exit code than 0.
        """
        self._state = "stopping"
        self._down.clear()
        self._record()
        for listener in self._plan.listeners.values():
            listener.close()  # who connects from now on is refused as soon as the children have stopped listening
        self._num_interrupts = 0
        self._asked.clear()
        for spec in reversed(self._specs.values()):
            if spec.name in self._children:
                self._console.progress(f"stopping {spec.name}")
                self._stop_child(spec)
            if spec.is_outlived:
                self._stop_orphans(spec.name, spec.grace_s)
            self._ask_ahead()
        self._stop_orphans("a child", _STRAY_GRACE_S)
        self._console.close()

    def _ask_ahead(self) -> None:
        """Ask those to end that nobody needs any more, who are waited for in their turn."""
        for name, child in self._children.items():
            needed_by = self._specs[name].ends_after
            if needed_by and self._children.keys().isdisjoint(needed_by) and name not in self._asked:
                self._asked[name] = child.age_s
                child.terminate()

    def _stop_child(self, spec: ChildSpec) -> None:
        child = self._children[spec.name]
        self._selector.unregister(child.pidfd)
        if spec.name not in self._asked:
            child.terminate()
        if not self._wait(child, spec.grace_s):
            self._console.line(f"{spec.name} did not end within {spec.grace_s:g} s of SIGTERM; killed")
            child.kill()
            child.wait(_KILL_SECONDS_MAX)
        last_line, age_s = child.last_line(), self._asked.get(spec.name, child.age_s)
        code = child.reap()
        del self._children[spec.name]
        # A process that still imports its modules has no handler yet; to die by the signal is its clean end.
        if code != 0 and not (code == -signal.SIGTERM and age_s < _COMING_UP_S):
            self.num_unclean += 1
            self._console.line(f"{spec.name} ended with {describe_exit(code)}; its last line: {last_line}")

    def _stop_orphans(self, name: str, grace_s: float) -> None:
        if not self._orphans.living():
            return
        self._console.progress(f"ending what {name} has left behind")
        killed = self._orphans.end(grace_s, lambda: bool(self._num_interrupts))
        if killed and not self._num_interrupts:
            self.num_unclean += killed
            self._console.line(f"killed {counted(killed, 'process', 'processes')} that {name} had left behind")

    def _wait(self, child: Child, grace_s: float) -> bool:
        """Whether `child` ended in time; an interrupt cuts the time short."""
        deadline = time.monotonic() + grace_s
        while not self._num_interrupts and (left_s := deadline - time.monotonic()) > 0:
            if child.wait(min(left_s, 0.2)):  # a signal's handler runs between the turns
                return True
        return child.wait(0)
