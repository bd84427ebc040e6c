"""A step's batch as accelerators read it: one small transfer of whole numbers, to addresses that stay.

Shape suffixes: N rows, S parts, M rows whose logits are wanted, T tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from elasticmoe.services.worker.backends.accelerator.kernels import Queries
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

Ints = npt.NDArray[np.int32]
_SMALLEST: Final = 16  # entries of a field: kernels may count on addresses that are multiples of 16 bytes


class SentFields:
    """Fields of whole numbers on the host, and their copy on the device, in one buffer each. Each field keeps its
    address until one has outgrown its place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room: dict[str, int] = {}
        self._host = torch.empty(0, dtype=torch.int32)
        self._there = torch.empty(0, dtype=torch.int32, device=device)

    def send(self, fields: Mapping[str, Ints]) -> dict[str, torch.Tensor]:
        """The fields on the device, once what is queued is done. Those of the send before it are overwritten: its step
        must be over."""
        if any(len(values) > self._room.get(name, 0) for name, values in fields.items()):
            for name, values in fields.items():
                self._room[name] = max(self._room.get(name, 0), _SMALLEST, 1 << max(0, len(values) - 1).bit_length())
            size = sum(self._room.values())
            self._host = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type != "cpu")
            self._there = torch.empty(size, dtype=torch.int32, device=self._device)
        at, sent = 0, {}
        host = self._host.numpy()
        for name, room in self._room.items():
            if name in fields:
                count = len(fields[name])
                host[at : at + count] = fields[name]
                sent[name] = self._there[at : at + count]
            at += room
        self._there.copy_(self._host, non_blocking=True)
        return sent


class AcceleratorBatch:
    """A batch on the device, and what the host knows of it.

    On the device, int32: `token_ids`, `positions`, `blocks` and `places` in them where each row's k and v belong [N],
    `logit_rows` [M], all parts' `block_ids`. `batch`: as it came; `kv`: the cache's blocks, mapped or not.
    """

    def __init__(self, batch: Batch, cache: KvCache, transfers: Mapping[str, SentFields]) -> None:
        """The batch over the cache's mapped blocks. Raises ValueError for another block. `transfers`: to fill one after
        the other, by what goes there."""
        size, num_blocks = cache.geometry.block_size, cache.num_blocks
        block_ids = np.array(batch.blocks, dtype=np.int32)
        bad = (block_ids < 0) | (block_ids >= num_blocks)
        if bad.any():
            raise ValueError(f"block {int(block_ids[bad][0])} is not one of the {num_blocks} blocks")
        self.batch, self.kv, self._transfers = batch, cache.blocks, transfers
        self.num_rows, self.num_logits = batch.num_rows, batch.num_logits
        self._row_starts, kv_lens, self._block_starts = (
            np.array(values, dtype=np.int32) for values in (batch.row_starts, batch.kv_lens, batch.block_starts)
        )
        counts_S = np.diff(self._row_starts)
        self._firsts_S = kv_lens - counts_S
        self._longest = int(kv_lens.max(initial=0))
        offsets_S = self._firsts_S - self._row_starts[:-1]
        positions = np.arange(batch.num_rows, dtype=np.int32) + np.repeat(offsets_S, counts_S)
        sent = transfers["batch"].send(
            {
                "token_ids": np.array(batch.token_ids, dtype=np.int32),
                "positions": positions,
                "blocks": block_ids[np.repeat(self._block_starts[:-1], counts_S) + positions // size],
                "places": positions % size,
                "logit_rows": np.array(batch.logit_rows, dtype=np.int32),
                "block_ids": block_ids,
            }
        )
        self.token_ids, self.positions = sent["token_ids"], sent["positions"]
        self.blocks, self.places = sent["blocks"], sent["places"]
        self.logit_rows, self.block_ids = sent["logit_rows"], sent["block_ids"]
        self._queries: Queries | None = None
        self._queries_per_tile = 0

    def queries(self, each: int) -> Queries:
        """The rows in tiles of up to `each` positions; sent when it is first asked for, which all layers do alike."""
        if self._queries is None or self._queries_per_tile != each:
            tiles_T4 = query_tiles(self._row_starts, self._firsts_S, self._block_starts, each)
            sent = self._transfers["tiles"].send({"tiles": tiles_T4.reshape(-1)})
            first_rows = [*tiles_T4[:, 0].tolist(), self.num_rows]
            self._queries = Queries(
                sent["tiles"], self.block_ids, self.positions, self.num_rows, self._longest, first_rows
            )
            self._queries_per_tile = each
        return self._queries


def query_tiles(row_starts_S1: Ints, firsts_S: Ints, block_starts_S1: Ints, each: int) -> Ints:
    """[T, 4] first row, rows, first position and start in the block ids of tiles of up to `each` rows, none of two
    parts."""
    counts_S = np.diff(row_starts_S1)
    tiles_S = -(-counts_S // each)
    part_T = np.repeat(np.arange(len(counts_S)), tiles_S)
    within_T = (np.arange(len(part_T)) - np.repeat(np.cumsum(tiles_S) - tiles_S, tiles_S)) * each
    tiles_T4 = np.stack(
        [
            row_starts_S1[:-1][part_T] + within_T,
            np.minimum(counts_S[part_T] - within_T, each),
            firsts_S[part_T] + within_T,
            block_starts_S1[:-1][part_T],
        ],
        1,
    )
    return tiles_T4.astype(np.int32)


def expert_tiles(counts_E: Ints, each: int) -> Ints:
    """[T, 3] expert, first row and end of tiles of up to `each` rows of one expert; rows are sorted by expert."""
    tiles_E = -(-counts_E // each)
    ends_E = np.cumsum(counts_E)
    expert_T = np.repeat(np.arange(len(counts_E)), tiles_E)
    within_T = (np.arange(len(expert_T)) - np.repeat(np.cumsum(tiles_E) - tiles_E, tiles_E)) * each
    first_T = (ends_E - counts_E)[expert_T] + within_T
    return np.stack([expert_T, first_T, np.minimum(first_T + each, ends_E[expert_T])], 1).astype(np.int32)
