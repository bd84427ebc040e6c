"""KV blocks whose number changes, against a model that knows only owners and contents."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.protocol.errors import Overloaded
from elasticmoe.services.worker.engine.blocks import BlockManager

SIZE = 2


class Model:
    """Sequences with their tables, and what each block really holds: the tokens up to and with its own."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, SIZE)
        self.tables: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
        self.content: dict[int, tuple[int, ...]] = {}

    def begin(self, tokens: list[int]) -> None:
        matched = self.blocks.match(tokens)
        for index, block in enumerate(matched):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        try:
            fresh = self.blocks.allocate(self.blocks.blocks_for(len(tokens)) - len(matched))
        except Overloaded:
            self.blocks.release(matched)
            return
        assert all(block < self.blocks.num_blocks for block in fresh)
        assert not set(fresh) & {block for _, table in self.tables for block in table}
        table = matched + fresh
        for index in range(len(matched), len(table)):
            self.content[table[index]] = tuple(tokens[: (index + 1) * SIZE])
        self.blocks.register(table, tokens, len(matched), len(tokens) // SIZE)
        self.tables.append((tokens, table))

    def relocate(self, count: int) -> None:
        for old in self.blocks.blocks_to_vacate[:count]:
            new = self.blocks.relocate(old)
            if new is None:
                assert self.blocks.num_free == 0
                return
            assert new < self.blocks.num_blocks
            self.content[new] = self.content.pop(old)
            for _, table in self.tables:
                table[:] = [new if block == old else block for block in table]

    def check(self) -> None:
        assert self.blocks.check_integrity([table for _, table in self.tables]) == []
        owned = {block for _, table in self.tables for block in table}
        beyond = sorted(block for block in owned if block >= self.blocks.num_blocks)
        assert self.blocks.blocks_to_vacate == beyond
        assert self.blocks.num_free == self.blocks.num_blocks - len(owned) + len(beyond)
        for tokens, table in self.tables:
            for index, block in enumerate(table):
                assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_random_use(seed: int) -> None:
    rng = random.Random(seed)
    model = Model(rng.randrange(1, 24))
    for _ in range(120):
        what = rng.random()
        if what < 0.4:
            model.begin([rng.randrange(2) for _ in range(rng.randrange(1, 14))])
        elif what < 0.6 and model.tables:
            _, table = model.tables.pop(rng.randrange(len(model.tables)))
            model.blocks.release(table)
        elif what < 0.7:
            model.blocks.grow(model.blocks.num_blocks + rng.randrange(6))
        elif what < 0.8:
            model.blocks.shrink(rng.randrange(1, model.blocks.num_blocks + 1))
        else:
            model.relocate(rng.randrange(4))
        model.check()
    for _, table in model.tables:
        model.blocks.release(table)
    model.tables.clear()
    model.check()
    assert model.blocks.num_free == model.blocks.num_blocks


def test_bad_numbers() -> None:
    blocks = BlockManager(4, SIZE)
    for number in (0, 5):
        with pytest.raises(ValueError):
            blocks.shrink(number)
    with pytest.raises(ValueError):
        blocks.grow(3)
    with pytest.raises(AssertionError):
        blocks.relocate(3)


def test_cached_block_is_found_at_its_new_place() -> None:
    blocks = BlockManager(4, SIZE)
    first = blocks.allocate(2)
    table = blocks.allocate(2)
    blocks.register(table, [1, 2, 3, 4], 0, 2)
    blocks.release(first)
    blocks.shrink(2)
    places = {old: blocks.relocate(old) for old in blocks.blocks_to_vacate}
    assert sorted(places) == [2, 3]
    moved = [places[block] for block in table]
    assert blocks.match([1, 2, 3, 4, 5]) == moved
    assert blocks.check_integrity([moved, moved]) == []  # type: ignore[list-item]
