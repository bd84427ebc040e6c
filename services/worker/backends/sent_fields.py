"""Whole numbers that the host has worked out in a step, on their way to the device: one small transfer, to addresses
that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

Int32s = npt.NDArray[np.int32]
_SMALLEST: Final = 16  # entries of a field: kernels may count on addresses that are multiples of 16 bytes


class SentFields:
    """Fields of whole numbers on the host, and their copy on the device, in one buffer each. Each field keeps its
    address until one has outgrown its place; `num_moves`: how often that was so. Where they need not stay (`is_packed`)
    what is sent lies together, and nothing else travels."""

    def __init__(self, device: torch.device, *, is_packed: bool = False) -> None:
        self._device, self._is_packed = device, is_packed
        self.num_moves = 0
        self._least: dict[str, int] = {}
        self._room: dict[str, int] = {}
        self._host = torch.empty(0, dtype=torch.int32)
        self._there = torch.empty(0, dtype=torch.int32, device=device)

    def reserve(self, **room: int) -> None:
        """Before the first send: entries that fields are to have room for."""
        self._least.update(room)

    def send(self, fields: Mapping[str, Int32s]) -> dict[str, torch.Tensor]:
        """The fields on the device, once what is queued is done. Those of the send before it are overwritten: its step
        must be over."""
        if any(len(values) > self._room.get(name, -1) for name, values in fields.items()):
            for name, values in fields.items():
                least = self._room.get(name, self._least.get(name, _SMALLEST))
                self._room[name] = max(least, 1 << max(0, len(values) - 1).bit_length())
            self.num_moves += 1
            size = sum(self._room.values())
            self._host = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type != "cpu")
            self._there = torch.empty(size, dtype=torch.int32, device=self._device)
        at, sent = 0, {}
        host = self._host.numpy()
        for name, room in self._room.items():
            count = len(fields[name]) if name in fields else 0
            if name in fields:
                host[at : at + count] = fields[name]
                sent[name] = self._there[at : at + count]
            at += -(-count // _SMALLEST) * _SMALLEST if self._is_packed else room
        self._there[:at].copy_(self._host[:at], non_blocking=True)
        return sent
