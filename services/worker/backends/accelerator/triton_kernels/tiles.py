"""How a step's rows are cut into the tiles of fixed size that the kernels compute.

Shape suffixes: S parts, E experts, T tiles.
"""

from __future__ import annotations

import numpy as np

from elasticmoe.services.worker.backends.sent_fields import Int32s


def query_tiles(row_starts_S1: Int32s, firsts_S: Int32s, block_starts_S1: Int32s, each: int) -> Int32s:
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


def expert_tiles(counts_E: Int32s, each: int) -> Int32s:
    """[T, 3] expert, first row and end of tiles of up to `each` rows of one expert; rows are sorted by expert."""
    (expert_T,) = counts_E.nonzero()
    count_T = counts_E[expert_T]
    end_T = count_T.cumsum()
    first_T = end_T - count_T
    if len(count_T) and count_T.max() > each:  # else each expert is one tile, as in most steps that only decode
        tiles_T = -(-count_T // each)
        within_T = np.arange(tiles_T.sum()) - (tiles_T.cumsum() - tiles_T).repeat(tiles_T)
        expert_T, end_T = expert_T.repeat(tiles_T), end_T.repeat(tiles_T)
        first_T = first_T.repeat(tiles_T) + within_T * each
        end_T = np.minimum(first_T + each, end_T)
    tiles_T3 = np.empty((len(expert_T), 3), dtype=np.int32)
    tiles_T3[:, 0], tiles_T3[:, 1], tiles_T3[:, 2] = expert_T, first_T, end_T
    return tiles_T3
