"""The one place that knows the compute backends by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from elasticmoe.common.layout import Activations, Compute, check_activations
from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.worker.backends.accelerator.backend import AcceleratorBackend
from elasticmoe.services.worker.backends.accelerator.graphs import TorchRecorder
from elasticmoe.services.worker.backends.accelerator.npu_kernels.kernel_set import NpuKernels
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.backends.tensors import TensorBackend
from elasticmoe.services.worker.backends.torch import TorchBackend

TellWaiting = Callable[[bool], None] | None


def _open_triton(tell_waiting: TellWaiting, device: torch.device, graphs: bool) -> ComputeBackend:
    try:  # here, since Triton is imported where its device is
        from elasticmoe.services.worker.backends.accelerator.triton_kernels.kernel_set import TritonKernels
    except ImportError as error:
        missing = error.name or "a part of it"
        text = f"--compute triton needs triton, and {missing} cannot be imported: install elasticmoe[cuda]"
        raise ConfigError(text, code="no_compute") from None
    recorder = TorchRecorder(device) if graphs and device.type == "cuda" else None
    return AcceleratorBackend(TritonKernels(device), tell_waiting, device, recorder)


class BackendOptions(NamedTuple):
    """`graphs`: steps may be captured, where that can be done. `threads`: that compute in this process, where the
    backend can have several; what cannot be started is done without. `activations`: what bfloat16 weights are
    multiplied by. `shares_cores`: `threads` changes with the number of ranks (ComputeBackend.use_threads)."""

    graphs: bool = True
    threads: int = 1
    activations: Activations = "float32"
    shares_cores: bool = False

    @property
    def rounds(self) -> bool:
        """Whether they are rounded."""
        return self.activations == "bfloat16"


BACKENDS: dict[Compute, Callable[[TellWaiting, torch.device, BackendOptions], ComputeBackend]] = {
    "host": lambda tell_waiting, device, options: HostBackend(
        tell_waiting, device, options.threads, rounds=options.rounds, shares_cores=options.shares_cores
    ),
    "torch": lambda tell_waiting, device, options: TorchBackend(tell_waiting, device, rounds=options.rounds),
    "triton": lambda tell_waiting, device, options: _open_triton(tell_waiting, device, options.graphs),
    "torch_npu": lambda tell_waiting, device, _: AcceleratorBackend(NpuKernels(device), tell_waiting, device),
}


def open_backend(
    name: Compute,
    tell_waiting: TellWaiting = None,
    device: torch.device = torch.device("cpu"),
    options: BackendOptions = BackendOptions(),
) -> ComputeBackend:
    """A backend for one rank. `device`: where its memory's tensors are, as the rank's Device says; which backends
    compute on which devices says COMPUTES (common/layout.py). `tell_waiting`: see ComputeBackend. Raises ConfigError
    no_compute where a package, or an operator of one, is missing that it needs, or where it cannot round and is to."""
    check_activations(name, options.activations)
    backend = BACKENDS[name](tell_waiting, device, options)
    if isinstance(backend, TensorBackend) and not backend.has_float64:
        backend.sampler = HostBackend()
    return backend
