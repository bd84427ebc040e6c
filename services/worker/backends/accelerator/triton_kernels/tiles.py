"""How a step's rows are cut into the tiles of fixed size that the kernels compute.

Shape suffixes: S parts, E experts, T tiles.
"""

from __future__ import annotations

import numpy as np

from elasticmoe.services.worker.backends.accelerator.batch import Ints


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
