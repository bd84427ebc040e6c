"""The one place that knows the compute backends by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from elasticmoe.common.layout import Compute
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.backends.torch import TorchBackend

BACKENDS: dict[Compute, type[HostBackend | TorchBackend]] = {"host": HostBackend, "torch": TorchBackend}


def open_backend(
    name: Compute, tell_waiting: Callable[[bool], None] | None = None, device: torch.device = torch.device("cpu")
) -> ComputeBackend:
    """A backend for one rank. `device`: where its memory's tensors are, as the rank's Device says; which backends
    compute on which devices says COMPUTES (common/layout.py). `tell_waiting`: see ComputeBackend."""
    return BACKENDS[name](tell_waiting, device)
