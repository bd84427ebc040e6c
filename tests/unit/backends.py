"""The compute backends that tests run on, and one that computes as late as an accelerator may."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from elasticmoe.common.layout import COMPUTES
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.services.worker.backends.answers import WeightedSum, add_up
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror, Op
from elasticmoe.services.worker.backends.choice import TokenChoice
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.backends.torch import TorchBackend

ON_CPU: dict[str, Callable[..., ComputeBackend]] = {name: partial(open_backend, name) for name in COMPUTES["host"]}
"""What computes on a CPU, by its name."""


def draw(backend: ComputeBackend, row_V: torch.Tensor, sampling: Sampling, uniform: float) -> int:
    """The token that a number falls on. Raises what its choice raises."""
    (chosen,) = backend.choose(row_V[None].clone(), [TokenChoice(sampling, uniform, None, -1)])
    if chosen.error is not None:
        raise chosen.error
    return chosen.token


_QUEUED = (
    "embed",
    "linear",
    "rms_norm",
    "final_norm",
    "rope_table",
    "store_kv",
    "attention",
    "store_latent",
    "latent_attention",
    "route",
    "feed_forward",
    "shared_experts",
    "clear",
    "square",
    "scale_by_squares",
    "whole_number_attention",
)


class QueuedBackend(TorchBackend):
    """Nothing is computed before a fence, and host memory is not the device's: what reads a result without having
    waited for it reads what was there before."""

    name = "queued"

    def __init__(self, tell_waiting: Callable[[bool], None] | None = None) -> None:
        super().__init__(tell_waiting)
        self.is_synchronous = False
        self.num_fences = 0
        self._queue: list[Callable[[], None]] = []

    def __getattribute__(self, name: str) -> Any:
        """Operations that are queued when they are called."""
        found = super().__getattribute__(name)
        return self._queueing(found) if name in _QUEUED else found

    def _queueing(self, make: Callable[..., Callable[..., None]]) -> Callable[..., Callable[..., None]]:
        def made(*tensors: Any, **options: Any) -> Callable[..., None]:
            run = make(*tensors, **options)
            return lambda *args: self._queue.append(lambda: run(*args))

        return made

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See ComputeBackend. Full of what no result is."""
        return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)

    def weighted_sum(self, total: WeightedSum, n: int) -> None:
        """See ComputeBackend."""
        self._queue.append(lambda: add_up(total, n))

    def download(self, *mirrors: Mirror) -> Op:
        """See ComputeBackend."""

        def run(n: int) -> None:
            for mirror in mirrors:
                self._queue.append(lambda mirror=mirror: mirror.host[:n].copy_(mirror.device[:n]))  # type: ignore[misc]
            self.fence()

        return run

    def upload(self, mirror: Mirror) -> Op:
        """See ComputeBackend. The host's rows are read as late as they may be."""
        return lambda n: self._queue.append(lambda: mirror.device[:n].copy_(mirror.host[:n]))

    def _synchronize(self) -> None:
        self.num_fences += 1
        while self._queue:
            self._queue.pop(0)()
