"""A step's batch as accelerators read it: one small transfer of whole numbers, to addresses that stay.

Shape suffixes: N rows, S parts, M rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

Ints = npt.NDArray[np.int32]
T = TypeVar("T")
_SMALLEST: Final = 16  # entries of a field: kernels may count on addresses that are multiples of 16 bytes


class Form(NamedTuple):
    """Of a step that only decodes: how many rows are computed, and up to how many positions a sequence may have."""

    rows: int
    positions: int


class SentFields:
    """Fields of whole numbers on the host, and their copy on the device, in one buffer each. Each field keeps its
    address until one has outgrown its place. `num_moves`: how often that was so."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.num_moves = 0
        self._room: dict[str, int] = {}
        self._host = torch.empty(0, dtype=torch.int32)
        self._there = torch.empty(0, dtype=torch.int32, device=device)

    def send(self, fields: Mapping[str, Ints]) -> dict[str, torch.Tensor]:
        """The fields on the device, once what is queued is done. Those of the send before it are overwritten: its step
        must be over."""
        if any(len(values) > self._room.get(name, -1) for name, values in fields.items()):
            for name, values in fields.items():
                self._room[name] = max(self._room.get(name, 0), _SMALLEST, 1 << max(0, len(values) - 1).bit_length())
            self.num_moves += 1
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


def _padded(values_N: Ints, count: int, value: int = 0) -> Ints:
    return np.pad(values_N, (0, count - len(values_N)), constant_values=value) if len(values_N) < count else values_N
