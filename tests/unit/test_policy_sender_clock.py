"""A sender's moments by our clock, without clocks that agree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.services.scaler.policy.sender_clock import MEMORY_S, SAMPLES_MAX, SenderClock


def test_a_late_message_is_seen_as_late() -> None:
    clock = SenderClock()
    for second in range(5):
        clock.heard(1_000.0 + second, 50.0 + second + 0.002)
    assert clock.heard(1_005.0, 63.0) == pytest.approx(55.002)


def test_a_clock_that_runs_slower_is_followed() -> None:
    clock = SenderClock()
    for second in range(1_000):
        found = clock.heard(second * (1 - 1e-4), float(second))
    assert found == pytest.approx(999.0, abs=2e-4 * MEMORY_S)


@given(
    st.lists(st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 9.0)), min_size=1, max_size=100),
    st.floats(-1e6, 1e6),
)
def test_a_moment_is_never_told_earlier_than_it_was(steps: list[tuple[float, float]], distance: float) -> None:
    """By more than rounding: and no later than by the fastest delivery of those seen."""
    clock, sent = SenderClock(), 1e6
    delays, arrived = [], -math.inf
    for pause, delay in steps:
        sent += pause
        delay = max(delay, arrived - sent)  # messages arrive in the order in which they are looked at
        arrived = sent + delay
        delays.append(delay)
        found = clock.heard(sent + distance, arrived)
        assert sent - 1e-6 <= found <= arrived + 1e-6
        assert len(clock.least) <= SAMPLES_MAX
    if sum(pause for pause, _ in steps) + 9.0 < MEMORY_S:
        assert found == pytest.approx(sent + min(delays), abs=1e-6)
