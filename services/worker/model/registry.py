"""From a model's spec to the code that computes it: the decoder, which takes its parts by the spec, or the oracle."""

from __future__ import annotations

from elasticmoe.common.families import ORACLE
from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.model.base import Model, StepTimes
from elasticmoe.services.worker.model.decoder import Decoder
from elasticmoe.services.worker.model.oracle import OracleModel
from elasticmoe.services.worker.model.weights import RankWeights

__all__ = ["Model", "StepTimes", "build_model"]


def build_model(backend: ComputeBackend, weights: RankWeights, max_tokens: int) -> Model:
    """The model of `weights.spec`, with buffers for steps of at most `max_tokens` rows.

    Keeps `backend` and `weights`. Raises ValueError for a tensor of a wrong shape or dtype.
    """
    model = OracleModel if weights.spec.family == ORACLE.name else Decoder
    return model(backend, weights, max_tokens)
