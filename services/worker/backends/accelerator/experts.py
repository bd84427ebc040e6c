"""Products of a step's rows with the experts that this rank holds, by the experts' slots.

Shape suffixes: E experts, R rows for the own experts, H hidden, I expert width.
"""

from __future__ import annotations

import numpy as np
import torch

from elasticmoe.services.worker.backends.accelerator.kernels import Kernels, RowGroups
from elasticmoe.services.worker.backends.sent_fields import SentFields


class ExpertRooms:
    """Buffers on the device that all layers' experts share: they are computed one after the other. Each keeps its
    address until there are more rows than it has room for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rooms: dict[tuple[str, int], torch.Tensor] = {}

    def get(self, name: str, rows: int, width: int) -> torch.Tensor:
        """float32 [>= rows, width]."""
        room = self._rooms.get((name, width))
        if room is None or len(room) < rows:
            room = self._rooms[name, width] = torch.empty((rows, width), dtype=torch.float32, device=self._device)
        return room


class Experts:
    """Of one layer. w13 [E, 2 I, H] and w2 [E, H, I] may have gaps; slots of experts without rows are not touched."""

    def __init__(self, kernels: Kernels, w13_E: torch.Tensor, w2_E: torch.Tensor, rooms: ExpertRooms) -> None:
        self._kernels, self._w13_E, self._w2_E, self._rooms = kernels, w13_E, w2_E, rooms
        self._transfer = SentFields(w13_E.device)

    def compute(self, rows_RH: torch.Tensor, counts_E: torch.Tensor, num_rows: int) -> None:
        """Each of the first rows becomes its expert's output, in place, in the device's memory or the host's, once what
        is queued is done. The step before must be over. Room is made for all rows that there may be."""
        if not num_rows:
            return
        room, (hidden, width) = len(rows_RH), self._w2_E.shape[1:]
        counts = counts_E.numpy().astype(np.int32)
        groups = RowGroups(counts, self._transfer.send(self._kernels.group_fields(counts)))
        is_there = rows_RH.device == self._w13_E.device
        x_RH = (rows_RH if is_there else self._rooms.get("rows", room, hidden))[:num_rows]
        if not is_there:
            x_RH.copy_(rows_RH[:num_rows], non_blocking=True)
        middle_RI = self._rooms.get("middle", room, width)[:num_rows]
        self._kernels.expert_products(x_RH, self._w13_E, middle_RI, groups, is_gated=True)
        self._kernels.expert_products(middle_RI, self._w2_E, x_RH, groups, is_gated=False)
        if not is_there:
            rows_RH[:num_rows].copy_(x_RH, non_blocking=True)
