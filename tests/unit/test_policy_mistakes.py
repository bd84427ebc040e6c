"""Each mistake that users of other autoscalers reported: not made, and made as soon as its safeguard is out."""

from __future__ import annotations

from unittest import mock

import pytest

from tests.unit.policy_mistakes import MISTAKES


@pytest.mark.parametrize("name", MISTAKES)
def test_the_policy_does_not_make_it(name: str) -> None:
    MISTAKES[name].scenario()


@pytest.mark.parametrize("name", MISTAKES)
def test_without_its_safeguard_it_is_made(name: str) -> None:
    mistake = MISTAKES[name]
    with mock.patch.object(mistake.where, mistake.place, mistake.instead), pytest.raises(AssertionError):
        mistake.scenario()


def test_all_thirteen_are_there() -> None:
    assert [int(name.split()[0]) for name in MISTAKES] == list(range(1, 14))
