"""One step's work in the form that compute backends read: a few int32 arrays.

Rows are the step's tokens: those of the first part, then those of the second, and so on. N rows, S parts, M logits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

assert array("i").itemsize == 4


class BatchPart(NamedTuple):
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

    `num_rows`, `num_parts`, `num_logits` are N, S, M; the logits of a part follow those of the part before it. Arrays
    of int32, whose memory stays where it is as long as the batch lives:
    `token_ids` [N] · `row_starts` [S + 1] first row of each part, and N · `kv_lens` [S] tokens of the sequence once
    this step is written · `block_starts` [S + 1] where a part's ids start in `blocks` · `blocks` [...] ·
    `logit_rows` [M] rows whose logits are wanted, ascending.

    Raises ValueError for a part without tokens, with too few blocks, or with more logits than tokens. Token ids and
    block ids are checked by the compute backend.

    `encode` and `decode` are for the ranks of one replica, which all compute the batch of their leader.
    """

    __slots__ = (
        "block_starts",
        "blocks",
        "kv_lens",
        "logit_rows",
        "num_logits",
        "num_parts",
        "num_rows",
        "row_starts",
        "token_ids",
    )

    def __init__(self, parts: Sequence[BatchPart], block_size: int) -> None:
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
                    f"part of {count} tokens from {start}, {num_logits} logits, {len(table)} blocks of {block_size}"
                )
            row_starts.append(end)
            kv_lens.append(kv_len)
            blocks.extend(table if len(table) == used else table[:used])
            block_starts.append(len(blocks))
            logit_rows.extend(range(end - num_logits, end))
        self.num_rows, self.num_parts, self.num_logits = len(token_ids), len(kv_lens), len(logit_rows)
        self.token_ids = token_ids
        self.row_starts = row_starts
        self.kv_lens = kv_lens
        self.block_starts = block_starts
        self.blocks = blocks
        self.logit_rows = logit_rows

    def encode(self) -> bytes:
        """All of it: N, S, M and the number of block ids, then the arrays."""
        counts = array("i", [self.num_rows, self.num_parts, self.num_logits, len(self.blocks)])
        return b"".join(
            part.tobytes()
            for part in (
                counts,
                self.token_ids,
                self.row_starts,
                self.kv_lens,
                self.block_starts,
                self.blocks,
                self.logit_rows,
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Batch:
        """Undo `encode`. Raises ValueError where there are more or fewer numbers than the first ones say."""
        numbers = array("i", data)
        num_rows, num_parts, num_logits, num_blocks = numbers[:4]
        sizes = (num_rows, num_parts + 1, num_parts, num_parts + 1, num_blocks, num_logits)
        if min(sizes) < 0 or 4 + sum(sizes) != len(numbers):
            raise ValueError(f"a batch of {len(numbers)} numbers, which says that it has {4 + sum(sizes)}")
        arrays, at = [], 4
        for size in sizes:
            arrays.append(numbers[at : at + size])
            at += size
        batch = cls([], 1)
        batch.num_rows, batch.num_parts, batch.num_logits = num_rows, num_parts, num_logits
        (batch.token_ids, batch.row_starts, batch.kv_lens, batch.block_starts, batch.blocks, batch.logit_rows) = arrays
        return batch
