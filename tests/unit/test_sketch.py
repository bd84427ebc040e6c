"""Sketches of times: how exact they are, and that several add up to one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common import sketch
from elasticmoe.common.protocol.limits import SKETCH_BUCKETS

TIMES = st.floats(sketch.MIN_S, sketch.MAX_S)


def counted(times: list[float]) -> sketch.Counts:
    counts = sketch.Sketch()
    for seconds in times:
        counts.add(seconds)
    return counts.take()


@given(TIMES)
def test_a_bucket_stands_for_its_times_within_the_error(seconds: float) -> None:
    bucket = sketch.index(seconds)
    assert 0 <= bucket < SKETCH_BUCKETS
    assert abs(sketch.value(bucket) - seconds) <= sketch.RELATIVE_ERROR * seconds * (1 + 1e-9)


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (-1.0, 0), (0.001, 0), (1e9, SKETCH_BUCKETS - 1), (math.inf, SKETCH_BUCKETS - 1)]
)
def test_what_is_out_of_the_range_is_in_the_bucket_at_its_end(seconds: float, bucket: int) -> None:
    assert sketch.index(seconds) == bucket


def test_what_is_no_number_has_no_bucket() -> None:
    with pytest.raises(ValueError, match="not a number"):
        sketch.index(math.nan)


@given(st.lists(st.lists(TIMES, max_size=20), max_size=5))
def test_sketches_of_several_add_up_to_that_of_all(parts: list[list[float]]) -> None:
    assert sketch.merge(counted(part) for part in parts) == counted([seconds for part in parts for seconds in part])


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=40))
def test_joint_sketches_know_which_requests_keep_both(pairs: list[tuple[float, float]]) -> None:
    joint = sketch.JointSketch()
    for first, second in pairs:
        joint.add(first, second)
    found = sketch.share_within(joint.take(), 1.0, 0.1)
    close = [(sketch.value(sketch.index(a)), sketch.value(sketch.index(b))) for a, b in pairs]
    assert found == pytest.approx(sum(a <= 1.0 and b <= 0.1 for a, b in close) / len(pairs))


def test_of_nothing_nothing_is_known() -> None:
    assert sketch.share_within((), 1.0, 1.0) is None
    assert sketch.merge(()) == ()


def test_taking_begins_anew() -> None:
    counts = sketch.Sketch()
    counts.add(1.0, 3)
    counts.add(0.01)
    assert [num for _, num in counts.take()] == [1, 3]
    assert counts.take() == ()
