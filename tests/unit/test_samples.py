"""The arithmetic of the leak tests: what leaks has a slope, and what does not has none."""

from __future__ import annotations

import pytest

from tests.procs.samples import OTHER, PRIVATE_KIB_MAX, Sample, growing, slope

EACH = 5  # cycles between two samples


def test_slope_is_that_of_the_best_line() -> None:
    assert slope([7.0]) == 0.0
    assert slope([3.0, 3.0, 3.0]) == 0.0
    assert slope([1.0, 3.0, 5.0, 7.0]) == pytest.approx(2.0)
    assert slope([0.0, 1.0, 0.0]) == 0.0


@pytest.mark.parametrize(("what", "per_cycle"), [("descriptors of hmm", 1.0), ("keys", 0.2), ("threads of pool", -0.2)])
def test_what_is_counted_may_not_grow_or_shrink(what: str, per_cycle: float) -> None:
    samples = [Sample({what: round(20 + n * per_cycle * EACH), "keys of another": 4}, {}) for n in range(20)]
    assert growing(samples, EACH) == {what: pytest.approx(per_cycle)}
    kept = [Sample({what: int(n >= 10)}, {}) for n in range(20)]
    assert list(growing(kept, EACH)) == [what]
    passing = [Sample({what: int(n == 10)}, {}) for n in range(20)]
    assert growing(passing, EACH) == {}


def test_private_memory_may_take_one_arena_more() -> None:
    arena = [Sample({}, {"hmm": 9_000 + 1_024 * (n >= 10)}) for n in range(20)]
    assert growing(arena, EACH) == {}
    leak = [Sample({}, {"hmm": round(9_000 + 1.1 * PRIVATE_KIB_MAX * EACH * n), OTHER: 900 * n}) for n in range(20)]
    assert growing(leak, EACH) == {"KiB of hmm": pytest.approx(1.1 * PRIVATE_KIB_MAX, rel=0.01)}


def test_differences_name_both() -> None:
    before, now = Sample({"a": 1, "b": 2, "c": 3}, {}), Sample({"a": 1, "b": 5, "d": 4}, {})
    assert now.differs(before) == {"b": (2, 5), "c": (3, 0), "d": (0, 4)}
