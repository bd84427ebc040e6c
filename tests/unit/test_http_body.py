"""A request's body: bounded by itself, and large ones together, which keep no small one out."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import pytest

from elasticmoe.common.http.body import SMALL_BYTES, Body
from elasticmoe.common.protocol.errors import Overloaded
from elasticmoe.services.router.dispatch.admission import ByteBudget


def body_of(budget: ByteBudget, *chunks: bytes) -> Body:
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    return Body(receive, 1 << 20, 5.0, budget)


async def test_large_bodies_share_a_budget_and_small_ones_pass_beside_them() -> None:
    budget = ByteBudget(100_000)
    large = body_of(budget, b"x" * 60_000, b"x" * 60_000, b"x" * 45_536)
    await large.read({})
    assert budget.num_held == 100_000 == 165_536 - SMALL_BYTES
    small = [body_of(budget, b"y" * SMALL_BYTES) for _ in range(5)]
    for body in small:
        await body.read({})
    assert budget.num_held == 100_000
    beyond = body_of(budget, b"z" * SMALL_BYTES, b"z")
    with pytest.raises(Overloaded, match="the limit is 100000"):
        await beyond.read({})
    for body in (beyond, large, *small):
        body.release()
    assert budget.num_held == 0


async def test_what_was_read_is_replayed_once() -> None:
    body = body_of(ByteBudget(10), b"ab", b"c")
    await body.read({})
    assert (await body.replay())["body"] == b"abc"
