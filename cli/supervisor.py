"""What to do when a child process ends: start it again after a pause, or give up. Pure: no clock, no process."""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """At most `restarts_max` restarts of one child within `window_s`; the pause doubles with each of them."""

    restarts_max: int = 5
    window_s: float = 60.0
    backoff_first_s: float = 0.1
    backoff_max_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ChildState:
    """What the supervisor remembers of one child: when it was restarted within the window, and how often at all."""

    restarts: tuple[float, ...] = ()
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class Exit:
    """A child ended. `code`: negative for a signal; `starting`: before the deployment was ready for the first time."""

    code: int
    starting: bool


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the child again at `at` (same clock as `now`); `number` of at most `limit` within the window."""

    at: float
    number: int
    limit: int


@dataclass(frozen=True, slots=True)
class Fatal:
    """Stop the whole deployment."""

    reason: str


def decide(
    now: float, state: ChildState, exit: Exit, limits: Limits | None = None
) -> tuple[ChildState, Restart | Fatal]:
    """The child's new state and what to do about its end. `now`: seconds of any monotonic clock.

    A child that ends while the deployment starts is fatal at once: its cause is a setting or the machine, and a
    restart would hide the message. Any end counts, whatever its code: services do not end by themselves.
    """
    limits = limits or Limits()
    if exit.starting:
        return state, Fatal("it ended before the deployment was ready")
    recent = tuple(at for at in state.restarts if now - at < limits.window_s)
    if len(recent) >= limits.restarts_max:
        return ChildState(recent, state.num_restarts), Fatal(
            f"it was restarted {len(recent)} times within {limits.window_s:g} s, which is the limit"
        )
    at = now + min(limits.backoff_first_s * 2 ** len(recent), limits.backoff_max_s)
    return ChildState((*recent, at), state.num_restarts + 1), Restart(at, len(recent) + 1, limits.restarts_max)


def describe_exit(code: int) -> str:
    """`exit code 3`, or `signal SIGKILL` for a negative code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
