"""Products of a step's rows with the experts that this rank holds, by the experts' slots.

Shape suffixes: E experts, R rows for the own experts, H hidden, I expert width.
"""

from __future__ import annotations

import numpy as np
import torch

from elasticmoe.services.worker.backends.accelerator.batch import SentFields
from elasticmoe.services.worker.backends.accelerator.kernels import Kernels, RowGroups


class Experts:
    """Of one layer. w13 [E, 2 I, H] and w2 [E, H, I] may have gaps; slots of experts without rows are not touched."""

    def __init__(self, kernels: Kernels, w13_E: torch.Tensor, w2_E: torch.Tensor) -> None:
        self._kernels, self._w13_E, self._w2_E = kernels, w13_E, w2_E
        self._transfer = SentFields(w13_E.device)

    def compute(self, rows_RH: torch.Tensor, counts_E: torch.Tensor) -> None:
        """Each row becomes its expert's output, in place, in the device's memory or the host's, once what is queued is
        done. The step before must be over."""
        if not len(rows_RH):
            return
        device = self._w13_E.device
        counts = counts_E.numpy().astype(np.int32)
        groups = RowGroups(counts, self._transfer.send(self._kernels.group_fields(counts)))
        x_RH = rows_RH.to(device, non_blocking=True)
        middle_RI = torch.empty(len(rows_RH), self._w2_E.shape[2], device=device)
        out_RH = torch.empty_like(x_RH)
        self._kernels.expert_products(x_RH, self._w13_E, middle_RI, groups, is_gated=True)
        self._kernels.expert_products(middle_RI, self._w2_E, out_RH, groups, is_gated=False)
        rows_RH.copy_(out_RH, non_blocking=True)
