"""Samplers that tests run on: those of the backends of a CPU, and one that has no float64, as NPUs have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.backends.choice import Chosen, Judged, TokenChoice
from elasticmoe.services.worker.backends.factory import open_backend
from elasticmoe.services.worker.backends.torch import TorchBackend
from tests.devices.npu_operators import Float32Only
from tests.unit.backends import ON_CPU


class Float32Backend(TorchBackend):
    """Chooses as on a device without float64. Whatever is made of float64 meanwhile becomes float32."""

    def __init__(self) -> None:
        super().__init__()
        self.has_float64, self.sampler = False, open_backend("host")

    def choose(self, logits_BV: torch.Tensor, choices: Sequence[TokenChoice]) -> list[Chosen]:
        """See ComputeBackend."""
        with Float32Only():
            return super().choose(logits_BV, choices)

    def judge(self, logits_NV: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[Judged]:
        """See ComputeBackend."""
        with Float32Only():
            return super().judge(logits_NV, tokens, num_top)


SAMPLERS: dict[str, Callable[[], ComputeBackend]] = {**ON_CPU, "no_float64": Float32Backend}
"""By their names."""
