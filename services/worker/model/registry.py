"""From a model's architecture to the code that computes it.

To add a family: its geometry and records in `common/families`, its parts in this package, a line in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe.common.protocol.errors import ConfigError
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.model.attention import GroupedQueryAttention
from elasticmoe.services.worker.model.base import Model, StepTimes
from elasticmoe.services.worker.model.decoder import Decoder
from elasticmoe.services.worker.model.moe import RoutedExperts
from elasticmoe.services.worker.model.oracle import OracleModel
from elasticmoe.services.worker.model.weights import RankWeights

__all__ = ["Model", "StepTimes", "build_model"]


def build_model(backend: ComputeBackend, weights: RankWeights, max_tokens: int) -> Model:
    """The model of `weights.spec`, with buffers for steps of at most `max_tokens` rows.

    Keeps `backend` and `weights`. Raises ConfigError for an architecture without code, ValueError for a tensor of a
    wrong shape or dtype.
    """
    builder = BUILDERS.get(weights.spec.architecture)
    if builder is None:
        raise ConfigError(f"architecture {weights.spec.architecture!r} cannot be computed; known: {sorted(BUILDERS)}")
    return builder(backend, weights, max_tokens)


def _softmax_decoder(backend: ComputeBackend, weights: RankWeights, max_tokens: int) -> Model:
    return Decoder(backend, weights, max_tokens, attention=GroupedQueryAttention, experts=RoutedExperts)


BUILDERS: dict[str, Callable[[ComputeBackend, RankWeights, int], Model]] = {
    "MixtralForCausalLM": _softmax_decoder,
    "Qwen3MoeForCausalLM": _softmax_decoder,
    "OracleMoeForCausalLM": OracleModel,
}
