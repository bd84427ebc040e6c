"""What the simulated deployment is made of. Pure data."""

from __future__ import annotations

import msgspec

from elasticmoe.services.scaler.policy.step_model import StepModel

# An accelerator of the middle range: 10 000 prompt tokens per second at the most, 20 ms for a step with little to do.
STEP = StepModel(a=0.020, b=1e-4, c=5e-8, d=3e-4)


class DeploymentModel(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of the deployment, which has `devices` devices.

    step: what a step takes, at every width
    step_tokens_max: prompt tokens that a step computes at the most (chunked prefill)
    sequences_max: that a replica computes at a time
    memory_tokens: memory of a replica, as tokens of KV; `expert_tokens`: what all experts together take of it. Each of
        w replicas holds a w-th of the experts, and has memory_tokens - expert_tokens / w for KV
    """

    step: StepModel = STEP
    step_tokens_max: int = 512
    sequences_max: int = 256
    memory_tokens: int = 240_000
    expert_tokens: int = 80_000
    devices: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what no deployment is."""
        for name in ("step_tokens_max", "sequences_max", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; 1 is the least")
        if min(self.step.a, self.step.b, self.step.c, self.step.d) < 0 or self.step.a == 0:
            raise ValueError(f"{self.step}: no coefficient may be below 0, and a has to be above it")
        if self.kv_tokens(1) < 1:
            raise ValueError(f"{self.memory_tokens} tokens of memory leave none for KV beside {self.expert_tokens}")

    def kv_tokens(self, width: int) -> int:
        """Tokens that one of `width` replicas' KV holds."""
        return self.memory_tokens - self.expert_tokens // width


class Actuation(msgspec.Struct, frozen=True):
    """How a change of size comes about. `delay_s`: from the order until new replicas serve; their devices are held from
    the order on. A shrink is done at once: streams move."""

    delay_s: float = 1.0
