"""How many rows came for each expert of a rank, of some of its steps: what the exchange has counted anyway for the
experts' operation is added up once in SAMPLED_EVERY steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

SAMPLED_EVERY = 8


class ExpertRows(NamedTuple):
    """Of `num_steps` sampled steps: (layer × the most experts of a layer + expert, rows) of experts that had some."""

    num_steps: int
    rows: tuple[tuple[int, int], ...]


class ExpertRowCounter:
    """Counts of one rank, since they were taken last. `num_experts[layer]`: the model's, 0 for dense ones."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._counts_LE = torch.zeros((len(num_experts), max(num_experts, default=0)), dtype=torch.int64)
        self._num_begun = self._num_sampled = 0
        self._is_sampled = False

    def begin_step(self) -> None:
        """A step begins; whether it is one that is counted."""
        self._is_sampled = self._num_begun % SAMPLED_EVERY == 0
        self._num_begun += 1
        self._num_sampled += self._is_sampled

    def count(self, layer: int, counts_E: torch.Tensor) -> None:
        """What came for a layer's experts."""
        if self._is_sampled:
            self._counts_LE[layer] += counts_E

    def take(self) -> ExpertRows:
        """What was counted, once."""
        flat = self._counts_LE.view(-1)
        at = flat.nonzero().view(-1)
        taken = ExpertRows(self._num_sampled, tuple(zip(at.tolist(), flat[at].tolist(), strict=True)))
        flat.zero_()
        self._num_sampled = 0
        return taken
