"""Attention of whole numbers over the cache, exactly: what models have that check every cached value.

Shape suffixes: L positions of a sequence, P planes, W a plane's width, E = P x W.
"""

from __future__ import annotations

import torch

from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch


class WholeNumbers:
    """Sums of what the cache holds times powers of `base` by distance, modulo `modulus` (below 2^16)."""

    def __init__(self, modulus: int, base: int, device: torch.device) -> None:
        self._modulus, self._base = modulus, base
        self._powers = [1]  # by distance
        self._powers_L = torch.ones(1, dtype=torch.int64, device=device)

    def run(self, step: AcceleratorBatch, layer: int, out_NE: torch.Tensor) -> None:
        """Rows of `out`: of each row's own position. What a row adds to the one before it is one term, so that a part
        reads its cache once."""
        batch, block_ids = step.batch, step.block_ids
        for part, kv_len in enumerate(batch.kv_lens):
            first_row, end_row = batch.row_starts[part], batch.row_starts[part + 1]
            table = block_ids[batch.block_starts[part] : batch.block_starts[part + 1]].long()
            read = step.kv[:, layer, :, 0][table]
            blocks, planes, size, width = read.shape
            kv_LE = read.transpose(1, 2).reshape(blocks * size, planes * width)[:kv_len].long()
            first = kv_len - (end_row - first_row)
            mixed_E = (kv_LE[: first + 1] * self._by_distance(first + 1)[:, None]).sum(0) % self._modulus
            out_NE[first_row] = mixed_E
            for row in range(first_row + 1, end_row):
                mixed_E = (mixed_E * self._base + kv_LE[first + row - first_row]) % self._modulus
                out_NE[row] = mixed_E

    def _by_distance(self, count: int) -> torch.Tensor:
        """Powers for positions 0 to `count` - 1, the last of which has distance 0."""
        if count > len(self._powers_L):
            while len(self._powers) < 2 * count:
                self._powers.append(self._powers[-1] * self._base % self._modulus)
            self._powers_L = torch.tensor(self._powers, dtype=torch.int64, device=self._powers_L.device)
        return self._powers_L[:count].flip(0)
