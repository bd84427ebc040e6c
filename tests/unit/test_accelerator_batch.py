"""How a step is cut into tiles, and sent to addresses that stay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from elasticmoe.services.worker.backends.accelerator.experts import ExpertRooms, Experts
from elasticmoe.services.worker.backends.accelerator.kernels import Kernels, RowGroups
from elasticmoe.services.worker.backends.accelerator.triton_kernels.tiles import expert_tiles, query_tiles
from elasticmoe.services.worker.backends.sent_fields import SentFields

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


class Copying:
    """Kernels whose products copy what fits, and which note where they read and write."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def group_fields(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        return {"counts": counts}

    def expert_products(
        self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, groups: RowGroups, **_: bool
    ) -> None:
        self.addresses += [x.data_ptr(), out.data_ptr(), groups.sent["counts"].data_ptr()]
        width = min(x.shape[1], out.shape[1])
        out[:, :width].copy_(x[:, :width])


def test_experts_use_the_same_memory_in_each_step() -> None:
    """However many rows come, and of all layers: nothing is allocated once there is room for the largest step."""
    kernels, rooms = Copying(), ExpertRooms(torch.device("cpu"))
    w13_E, w2_E = torch.zeros(3, 10, 4), torch.zeros(3, 4, 5)
    layers = [Experts(cast(Kernels, kernels), w13_E, w2_E, rooms) for _ in range(2)]
    rows_RH = torch.arange(32.0).view(8, 4)
    seen, num_made = [], []
    for counts in ([1, 0, 2], [0, 8, 0], [0, 0, 0], [3, 1, 1]):
        kernels.addresses, counts_E = [], torch.tensor(counts, dtype=torch.int32)
        with Allocations() as made:
            for layer in layers:
                layer.compute(rows_RH, counts_E, sum(counts))
        num_made.append(made.count)
        seen.append(kernels.addresses)
    assert seen[2] == []
    assert seen[0] == seen[1] == seen[3]
    assert num_made[0] > 0
    assert num_made[1:] == [0, 0, 0]
    first, second = seen[0][:6], seen[0][6:]
    assert first[:2] + first[3:5] == second[:2] + second[3:5], "layers share rooms"
    assert first[0] == first[4] == rows_RH.data_ptr(), "what lies on the device is computed in place"
    assert rows_RH.tolist() == torch.arange(32.0).view(8, 4).tolist()


class Allocations(TorchDispatchMode):
    """Counts tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        owned = [one for one in (args if isinstance(args, tuple) else ()) if isinstance(one, torch.Tensor)]
        if isinstance(out, torch.Tensor):
            storages = {one.untyped_storage().data_ptr() for one in owned}
            self.count += out.untyped_storage().data_ptr() not in storages
        return out


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


def test_packed_fields_lie_together_and_nothing_else_travels() -> None:
    transfer = SentFields(torch.device("cpu"), is_packed=True)
    numbers = np.arange(90, dtype=np.int32)
    transfer.send({"a": numbers, "b": numbers})
    sent = transfer.send({"a": numbers[:3], "b": numbers[5:22]})
    assert [sent["a"].tolist(), sent["b"].tolist()] == [numbers[:3].tolist(), numbers[5:22].tolist()]
    assert sent["b"].data_ptr() - sent["a"].data_ptr() == 16 * 4
    assert transfer.num_moves == 1


def test_a_first_step_without_rows_has_its_fields_too() -> None:
    """A rank that has no sequence takes part in the others' steps."""
    transfer = SentFields(torch.device("cpu"))
    empty = np.zeros(0, dtype=np.int32)
    sent = transfer.send({"a": empty, "b": empty})
    assert {name: field.tolist() for name, field in sent.items()} == {"a": [], "b": []}
    addresses = transfer.send({"a": np.ones(3, dtype=np.int32), "b": empty})
    assert addresses["a"].tolist() == [1, 1, 1]
