"""Turns: everybody gets one, nobody waits for another's whole line, and none is lost."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.common.protocol.errors import Overloaded
from elasticmoe.services.router.text.fair import FairQueue, FairTurns


def drain(queue: FairQueue[int]) -> list[int]:
    found = []
    while (entry := queue.pop()) is not None:
        found.append(entry)
    return found


def test_clients_take_turns() -> None:
    queue: FairQueue[int] = FairQueue()
    for entry in range(5):
        queue.push("a", entry)
    queue.push("b", 10)
    queue.push("b", 11)
    assert len(queue) == 7
    assert drain(queue) == [0, 10, 1, 11, 2, 3, 4]
    assert len(queue) == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60))
def test_each_entry_comes_out_once_and_in_its_clients_order(steps: list[tuple[str, bool]]) -> None:
    queue: FairQueue[int] = FairQueue()
    pushed: dict[str, list[int]] = {}
    expected = set()
    for number, (client, stays) in enumerate(steps):
        queue.push(client, number)
        if stays:
            pushed.setdefault(client, []).append(number)
            expected.add(number)
        else:
            queue.discard(client, number)
            queue.discard(client, number)
    found = drain(queue)
    assert set(found) == expected
    assert len(found) == len(expected)
    for line in pushed.values():
        assert [entry for entry in found if entry in line] == line
    for position, entry in enumerate(found):  # no client has two more turns than another that waits
        waiting = {client: [e for e in line if e in found[position:]] for client, line in pushed.items()}
        assert waiting[steps[entry][0]][0] == entry


def test_no_more_than_allowed_hold_a_turn() -> None:
    async def run() -> int:
        turns, holding, most = FairTurns(2, 5.0), 0, 0

        async def one(client: str) -> None:
            nonlocal holding, most
            await turns.take(client)
            holding += 1
            most = max(most, holding)
            await asyncio.sleep(0)
            holding -= 1
            turns.give_back()

        await asyncio.gather(*(one(random.choice("abc")) for _ in range(50)))
        await turns.take("x")
        await turns.take("y")  # both turns came back
        return most

    assert asyncio.run(run()) == 2


def test_a_turn_that_does_not_come() -> None:
    async def run() -> None:
        turns = FairTurns(1, 0.05)
        await turns.take("a")
        with pytest.raises(Overloaded, match=r"waited 0\.05 s for its turn") as caught:
            await turns.take("b")
        assert caught.value.code == "queue_full"
        turns.give_back()
        await turns.take("b")

    asyncio.run(run())


def test_whoever_is_cancelled_leaves_the_turn_to_others() -> None:
    async def run() -> None:
        turns = FairTurns(1, 5.0)
        await turns.take("a")
        waiting = [asyncio.create_task(turns.take(client)) for client in "bcd"]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        turns.give_back()  # to c
        waiting[1].cancel()  # at the same moment
        await asyncio.wait_for(waiting[2], 1.0)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, asyncio.CancelledError, type(None)]
        turns.give_back()
        await turns.take("e")

    asyncio.run(run())
