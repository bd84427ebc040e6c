"""The one place that knows the compute backends by name."""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe.common.layout import Compute
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.backends.torch import TorchBackend

BACKENDS: dict[Compute, type[HostBackend | TorchBackend]] = {"host": HostBackend, "torch": TorchBackend}


def open_backend(name: Compute, tell_waiting: Callable[[bool], None] | None = None) -> ComputeBackend:
    """A backend for one rank on a device of this host. `tell_waiting`: see ComputeBackend."""
    return BACKENDS[name](tell_waiting)
