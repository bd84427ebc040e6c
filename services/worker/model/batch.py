"""One step's work in the form that kernels read: a few int32 arrays in one buffer.

Rows are the step's tokens: those of the first part, then those of the second, and so on. N rows, S parts, M logits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

INT_BYTES = 4
assert array("i").itemsize == INT_BYTES


class Part(NamedTuple):
    """Consecutive tokens of one sequence: `token_ids` at positions `start`, `start` + 1, ...

    `blocks`: the sequence's KV block ids by position, enough for all tokens up to and with these; what comes before
    `start` was written by earlier steps. `num_logits`: of how many of the last rows the logits are wanted: 1 to choose
    the next token, 0 in the midst of a prompt, all for prompt log probabilities.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    num_logits: int


class Batch:
    """The parts of one step. Immutable. No parts is a valid batch: the rank computes other ranks' tokens only.

    `num_rows`, `num_parts`, `num_logits` are N, S, M; the logits of a part follow those of the part before it. The
    `*_addr` are addresses of int32 arrays that live as long as the batch:
    `token_ids` [N] · `row_starts` [S + 1] first row of each part, and N · `kv_lens` [S] tokens of the sequence once
    this step is written · `block_starts` [S + 1] where a part's ids start in `blocks` · `blocks` [...] ·
    `logit_rows` [M] rows whose logits are wanted, ascending.

    Raises ValueError for a part without tokens, with too few blocks, or with more logits than tokens. Token ids and
    block ids are checked by the kernels.
    """

    __slots__ = (
        "_buffer",
        "block_starts_addr",
        "blocks_addr",
        "kv_lens_addr",
        "logit_rows_addr",
        "num_logits",
        "num_parts",
        "num_rows",
        "row_starts_addr",
        "token_ids_addr",
    )

    def __init__(self, parts: Sequence[Part], block_size: int) -> None:
        token_ids, blocks, logit_rows = array("i"), array("i"), array("i")
        row_starts, kv_lens, block_starts = array("i", [0]), array("i"), array("i", [0])
        for ids, start, table, num_logits in parts:
            token_ids.extend(ids)
            end = len(token_ids)
            count = end - row_starts[-1]
            kv_len = start + count
            used = -(-kv_len // block_size)
            if count == 0 or start < 0 or len(table) < used or not 0 <= num_logits <= count:
                raise ValueError(
                    f"part of {count} tokens from {start} with {num_logits} logits and {len(table)} blocks of {block_size}"
                )
            row_starts.append(end)
            kv_lens.append(kv_len)
            blocks.extend(table if len(table) == used else table[:used])
            block_starts.append(len(blocks))
            logit_rows.extend(range(end - num_logits, end))
        self.num_rows = len(token_ids)
        self.num_parts = len(kv_lens)
        self.num_logits = len(logit_rows)
        arrays = (row_starts, kv_lens, block_starts, token_ids, blocks, logit_rows)
        self._buffer = array("i")
        offsets = []
        for values in arrays:
            offsets.append(len(self._buffer) * INT_BYTES)
            self._buffer.extend(values)
        base = self._buffer.buffer_info()[0]
        (
            self.row_starts_addr,
            self.kv_lens_addr,
            self.block_starts_addr,
            self.token_ids_addr,
            self.blocks_addr,
            self.logit_rows_addr,
        ) = (base + offset for offset in offsets)
