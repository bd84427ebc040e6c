"""A step's batch as the torch backend reads it.

Shape suffixes: as in torch.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache


class TorchBatch(NamedTuple):
    """A batch as tensors: `token_ids`, `positions` and the cache's `blocks` and `places` in them, where each row's k
    and v belong, [N]; `tables[row]` [ceil(L / T)] block ids of the row's sequence up to its position; `logit_rows` [M].
    """

    num_rows: int
    token_ids: torch.Tensor
    positions: list[int]
    blocks: torch.Tensor
    places: torch.Tensor
    tables: list[torch.Tensor]
    logit_rows: list[int]
    kv: torch.Tensor


def lay_out(batch: Batch, cache: KvCache, device: torch.device) -> TorchBatch:
    """The batch over the cache's mapped blocks. Raises ValueError for another block."""
    size, num_blocks = cache.geometry.block_size, cache.num_blocks
    for block in batch.blocks:
        if not 0 <= block < num_blocks:
            raise ValueError(f"block {block} is not one of the {num_blocks} blocks")

    def ids(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    positions: list[int] = []
    tables: list[torch.Tensor] = []
    all_blocks = ids(batch.blocks.tolist())
    for part, kv_len in enumerate(batch.kv_lens):
        table = all_blocks[batch.block_starts[part] : batch.block_starts[part + 1]]
        for position in range(kv_len - (batch.row_starts[part + 1] - batch.row_starts[part]), kv_len):
            positions.append(position)
            tables.append(table[: position // size + 1])
    return TorchBatch(
        batch.num_rows,
        ids(batch.token_ids.tolist()),
        positions,
        ids([int(table[-1]) for table in tables]),
        ids([position % size for position in positions]),
        tables,
        batch.logit_rows.tolist(),
        cache.blocks,
    )


def cached(step: TorchBatch, layer: int, row: int, length: int) -> torch.Tensor:
    """The planes of the row's sequence at its first `length` positions, [planes, G, L, W] in float32."""
    read = step.kv[step.tables[row], layer]
    blocks, planes, heads, size, width = read.shape
    joined = read.permute(1, 2, 0, 3, 4).reshape(planes, heads, blocks * size, width)
    return joined[:, :, :length].float().contiguous()
