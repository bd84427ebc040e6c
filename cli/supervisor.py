"""What to do when a child process ends: start it again after a pause, or give up. Pure: no clock, no process."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from elasticmoe.common.protocol.errors import EXIT_SUPERSEDED
from elasticmoe.common.wording import counted


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `restarts_max` quick restarts of one child within `window_s`; the pause doubles with each of them.

    Beyond that a vital child ends the deployment, and any other is tried again with pauses that double from
    `backoff_max_s` up to `failing_max_s`, which is less than `window_s`, until it has stayed up for `window_s`.
    """

    restarts_max: int = 5
    window_s: float = 60.0
    backoff_first_s: float = 0.1
    backoff_max_s: float = 5.0
    failing_max_s: float = 30.0
    superseded_s: float = 1.0


@dataclass(frozen=True, slots=True)
class ChildState:
    """What the supervisor remembers of one child: when it was restarted within the window, how often at all, and how
    often in a row beyond the limit."""

    restarts: tuple[float, ...] = ()
    num_restarts: int = 0
    num_failing: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """A child ended. `code`: negative for a signal; `starting`: before the deployment was ready for the first time;
    `is_vital`: nobody is served without it."""

    code: int
    starting: bool
    is_vital: bool


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the child again at `at` (same clock as `now`). `why`: which of its restarts this is, for people.
    `is_failing`: it does not stay up, and the deployment goes on without it for now."""

    at: float
    why: str
    is_failing: bool = False


@dataclass(frozen=True, slots=True)
class Fatal:
    """Stop the whole deployment."""

    reason: str


def decide(
    now: float, state: ChildState, exit: Exit, limits: Limits | None = None
) -> tuple[ChildState, Restart | Fatal]:
    """The child's new state and what to do about its end. `now`: seconds of any monotonic clock.

    A child that ends while the deployment starts is fatal at once: its cause is a setting or the machine, and a
    restart would hide the message. Later any end counts, whatever its code, for services do not end by themselves; but
    not that of one that another has taken over from, as of a scaler whose lease somebody else holds: as long as they
    do, it waits for its turn.
    """
    limits = limits or Limits()
    if exit.starting:
        return state, Fatal("it ended before the deployment was ready")
    recent = tuple(at for at in state.restarts if now - at < limits.window_s)
    number = state.num_restarts + 1
    if exit.code == EXIT_SUPERSEDED:
        why = "another has taken over from it, which counts as no failure; it is started again to wait"
        return ChildState(recent, number, state.num_failing), Restart(now + limits.superseded_s, why)
    is_failing = len(recent) >= limits.restarts_max or (state.num_failing > 0 and bool(recent))
    if not is_failing:
        at = now + min(limits.backoff_first_s * 2 ** len(recent), limits.backoff_max_s)
        why = f"restart {len(recent) + 1} of {limits.restarts_max}"
        return ChildState((*recent, at), number), Restart(at, why)
    if exit.is_vital:
        reason = f"it was restarted {counted(len(recent), 'time')} within {limits.window_s:g} s, which is the limit"
        return ChildState(recent, state.num_restarts, state.num_failing), Fatal(reason)
    at = now + min(limits.backoff_max_s * 2**state.num_failing, limits.failing_max_s)
    why = f"it does not stay up, and the deployment goes on without it; restart {number} in all"
    return ChildState((*recent, at), number, state.num_failing + 1), Restart(at, why, is_failing=True)


def describe_exit(code: int) -> str:
    """`exit code 3`, or `signal SIGKILL` for a negative code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
