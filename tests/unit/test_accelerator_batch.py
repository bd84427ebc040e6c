"""How a step is cut into tiles, and sent to addresses that stay."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe.services.worker.backends.accelerator.batch import SentFields
from elasticmoe.services.worker.backends.accelerator.triton_kernels.tiles import expert_tiles, query_tiles

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


@given(COUNTS, st.sampled_from([1, 2, 16]))
def test_tiles_of_experts_hold_each_row_once(counts: list[int], each: int) -> None:
    tiles = expert_tiles(np.array(counts, dtype=np.int32), each)
    rows = [(expert, row) for expert, first, end in tiles.tolist() for row in range(first, end)]
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert rows == [(expert, row) for row, expert in enumerate(owners)]
    assert all(first < end <= first + each for _, first, end in tiles.tolist())


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 99)), max_size=9), st.sampled_from([1, 4, 32]))
def test_tiles_of_queries_hold_each_row_once_and_none_of_two_parts(parts: list[tuple[int, int]], each: int) -> None:
    row_starts = np.cumsum([0, *(count for count, _ in parts)]).astype(np.int32)
    block_starts = np.arange(len(parts) + 1, dtype=np.int32) * 7
    firsts = np.array([first for _, first in parts], dtype=np.int32)
    tiles = query_tiles(row_starts, firsts, block_starts, each).tolist()
    got = [(row + i, position + i, table) for row, count, position, table in tiles for i in range(count)]
    want = [
        (start + i, parts[part][1] + i, 7 * part)
        for part, (start, end) in enumerate(pairwise(row_starts.tolist()))
        for i in range(end - start)
    ]
    assert got == want
    assert all(1 <= count <= each for _, count, _, _ in tiles)


def test_fields_keep_their_addresses_until_one_outgrows_its_place() -> None:
    transfer = SentFields(torch.device("cpu"))
    numbers = np.arange(40, dtype=np.int32)
    first = transfer.send({"a": numbers[:5], "b": numbers[:17]})
    addresses = {name: field.data_ptr() for name, field in first.items()}
    assert [first["a"].tolist(), first["b"].tolist()] == [list(range(5)), list(range(17))]
    for sizes in ((16, 1), (1, 32)):
        sent = transfer.send({"a": numbers[: sizes[0]], "b": numbers[: sizes[1]]})
        assert {name: field.data_ptr() for name, field in sent.items()} == addresses
        assert [len(sent["a"]), len(sent["b"])] == list(sizes)
        assert all(address % 16 == 0 for address in addresses.values())
    sent = transfer.send({"a": numbers[:17], "b": numbers})
    assert sent["b"].tolist() == numbers.tolist()
