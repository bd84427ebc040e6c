"""The one place that knows the compute backends by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from elasticmoe.common.layout import Compute
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.worker.backends.accelerator.backend import AcceleratorBackend
from elasticmoe.services.worker.backends.accelerator.npu_kernels.kernel_set import NpuKernels
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.backends.torch import TorchBackend

TellWaiting = Callable[[bool], None] | None


def _open_triton(tell_waiting: TellWaiting, device: torch.device) -> ComputeBackend:
    try:  # here, since Triton is imported where its device is
        from elasticmoe.services.worker.backends.accelerator.triton_kernels.kernel_set import TritonKernels
    except ImportError as error:
        missing = error.name or "a part of it"
        text = f"--compute triton needs triton, and {missing} cannot be imported: install elasticmoe[cuda]"
        raise ConfigError(text, code="no_compute") from None
    return AcceleratorBackend(TritonKernels(device), tell_waiting, device)


def _open_torch_npu(tell_waiting: TellWaiting, device: torch.device) -> ComputeBackend:
    return AcceleratorBackend(NpuKernels(device), tell_waiting, device)


BACKENDS: dict[Compute, Callable[[TellWaiting, torch.device], ComputeBackend]] = {
    "host": HostBackend,
    "torch": TorchBackend,
    "triton": _open_triton,
    "torch_npu": _open_torch_npu,
}


def open_backend(
    name: Compute, tell_waiting: TellWaiting = None, device: torch.device = torch.device("cpu")
) -> ComputeBackend:
    """A backend for one rank. `device`: where its memory's tensors are, as the rank's Device says; which backends
    compute on which devices says COMPUTES (common/layout.py). `tell_waiting`: see ComputeBackend. Raises ConfigError
    no_compute where a package, or an operator of one, is missing that it needs."""
    return BACKENDS[name](tell_waiting, device)
