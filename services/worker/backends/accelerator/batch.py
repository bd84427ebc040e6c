"""A step's batch as accelerators read it: one small transfer of whole numbers, to addresses that stay.

Shape suffixes: N rows, S parts, M rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from elasticmoe.services.worker.backends.sent_fields import Int32s, SentFields
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

T = TypeVar("T")


class Form(NamedTuple):
    """Of a step that only decodes: how many rows are computed, and up to how many positions a sequence may have."""

    rows: int
    positions: int


class AcceleratorBatch:
    """A batch on the device, and what the host knows of it.

    On the device, int32: `token_ids`, `positions`, `blocks` and `places` in them where each row's k and v belong [N],
    `logit_rows` [M], all parts' `block_ids`. On the host: `batch`, as it came, and as numpy's int32 `row_starts` and
    `block_starts` [S + 1], `kv_lens` and first positions `firsts` [S], all parts' `block_list`, and `row_blocks` and
    `row_places` [N]. `kv`: the cache's blocks, mapped or not. `positions_max`: that a sequence has or may have.

    With a `form`, N and M are its rows. Those behind the batch's own are padding: token 0 at position -1, whose k and v
    belong nowhere (block -1).
    """

    def __init__(
        self, batch: Batch, cache: KvCache, transfers: Mapping[str, SentFields], form: Form | None = None
    ) -> None:
        """The batch over the cache's mapped blocks. Raises ValueError for another block. `transfers`: to fill one after
        the other, by what goes there."""
        size, num_blocks = cache.geometry.block_size, cache.num_blocks
        block_ids = np.array(batch.blocks, dtype=np.int32)
        bad = (block_ids < 0) | (block_ids >= num_blocks)
        if bad.any():
            raise ValueError(f"block {int(block_ids[bad][0])} is not one of the {num_blocks} blocks")
        self.batch, self.kv, self._transfers = batch, cache.blocks, transfers
        self.form = form
        self.num_rows, self.num_logits = (form.rows,) * 2 if form else (batch.num_rows, batch.num_logits)
        self.row_starts, self.kv_lens, self.block_starts = (
            np.array(values, dtype=np.int32) for values in (batch.row_starts, batch.kv_lens, batch.block_starts)
        )
        counts_S = np.diff(self.row_starts)
        self.positions_max = form.positions if form else int(self.kv_lens.max(initial=0))
        self.firsts = self.kv_lens - counts_S
        positions = np.arange(batch.num_rows, dtype=np.int32) + np.repeat(self.firsts - self.row_starts[:-1], counts_S)
        self.block_list = block_ids
        self.row_blocks = block_ids[np.repeat(self.block_starts[:-1], counts_S) + positions // size]
        self.row_places = positions % size
        sent = transfers["batch"].send(
            {
                "token_ids": _padded(np.array(batch.token_ids, dtype=np.int32), self.num_rows),
                "positions": _padded(positions, self.num_rows, -1),
                "blocks": _padded(self.row_blocks, self.num_rows, -1),
                "places": _padded(self.row_places, self.num_rows),
                "logit_rows": _padded(np.array(batch.logit_rows, dtype=np.int32), self.num_logits),
                "block_ids": block_ids,
            }
        )
        self.token_ids, self.positions = sent["token_ids"], sent["positions"]
        self.blocks, self.places = sent["blocks"], sent["places"]
        self.logit_rows, self.block_ids = sent["logit_rows"], sent["block_ids"]
        self._made: dict[str, tuple[object, Any]] = {}

    def once(self, name: str, key: object, make: Callable[[SentFields], T]) -> T:
        """What `make` makes of this step with the transfer `name`: made when it is first asked for by this `key`, which
        all layers do alike."""
        if name not in self._made or self._made[name][0] != key:
            self._made[name] = key, make(self._transfers[name])
        made: T = self._made[name][1]
        return made


def _padded(values_N: Int32s, count: int, value: int = 0) -> Int32s:
    return np.pad(values_N, (0, count - len(values_N)), constant_values=value) if len(values_N) < count else values_N
