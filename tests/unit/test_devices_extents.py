"""The free list against a model of one boolean per page."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common.devices.extents import FreeList

PAGES = 48


def extents_of(free: list[bool]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for at, is_free in enumerate(free):
        if is_free and found and sum(found[-1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        elif is_free:
            found.append((at, 1))
    return found


@given(st.lists(st.tuples(st.sampled_from(["allocate", "take", "release"]), st.integers(0, 60), st.integers(-1, 20))))
def test_free_list_agrees_with_a_model(steps: list[tuple[str, int, int]]) -> None:
    subject, model = FreeList(PAGES), [True] * PAGES
    for action, at, size in steps:
        part = range(at, at + size)
        inside = size > 0 and at + size <= PAGES
        if action == "allocate" and size > 0:
            first = next((s for s, n in extents_of(model) if n >= size), None)
            assert subject.allocate(size, PAGES) == first
            if first is not None:
                model[first : first + size] = [False] * size
        elif action == "take":
            if inside and all(model[i] for i in part):
                subject.take(at, size)
                model[at : at + size] = [False] * size
            else:
                with pytest.raises(ValueError, match="not free"):
                    subject.take(at, size)
        elif action == "release":
            if inside and not any(model[i] for i in part):
                subject.release(at, size)
                model[at : at + size] = [True] * size
            else:
                with pytest.raises(ValueError, match="not allocated"):
                    subject.release(at, size)
        assert subject.extents == extents_of(model)


def test_freed_neighbours_join_so_that_a_large_extent_fits_again() -> None:
    subject = FreeList(30)
    parts = [subject.allocate(10, 30) for _ in range(3)]
    assert parts == [0, 10, 20]
    assert subject.allocate(1, 30) is None
    for offset in (0, 20, 10):
        subject.release(offset, 10)
    assert subject.allocate(30, 30) == 0


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(5, 8))
def test_no_part_lies_in_two_windows_and_what_is_passed_over_stays_free(sizes: list[int], window: int) -> None:
    subject, taken = FreeList(PAGES), 0
    for size in sizes:
        before = subject.extents
        offset = subject.allocate(size, window)
        if offset is None:
            fits = (
                start <= at and at + size <= start + nbytes and at // window == (at + size - 1) // window
                for start, nbytes in before
                for at in range(PAGES)
            )
            assert not any(fits)
            continue
        taken += size
        assert offset // window == (offset + size - 1) // window
    assert sum(nbytes for _, nbytes in subject.extents) == PAGES - taken


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=20),
    st.integers(9, PAGES),
    st.sampled_from([1, 2, 4]),
)
def test_a_part_has_the_phase_that_was_asked_for_and_is_the_first_such_part(
    asked: list[tuple[int, int]], window: int, divisor: int
) -> None:
    subject = FreeList(PAGES)
    for size, rest in asked:
        free = {at for start, nbytes in subject.extents for at in range(start, start + nbytes)}
        fits = [
            at
            for at in range(PAGES - size + 1)
            if at % divisor == rest % divisor and at % window + size <= window and free.issuperset(range(at, at + size))
        ]
        assert subject.allocate(size, window, (divisor, rest % divisor)) == min(fits, default=None)
