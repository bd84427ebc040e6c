"""From a model's architecture to the code that computes it.

To add a family: its geometry and records in `common/families.py`, its parts in this package, a line in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from common.protocol.errors import ConfigError

from services.worker.exchange.base import Exchange
from services.worker.model.batch import Batch
from services.worker.model.weights import RankWeights


class StepTimes(NamedTuple):
    """Where the last forward pass spent its time, in nanoseconds: `total_ns` = math and Python + `exchange_ns`;
    `wait_ns` is the part of `exchange_ns` spent waiting for other ranks."""

    total_ns: int
    exchange_ns: int
    wait_ns: int


class Model(Protocol):
    """A model over one rank's memory. For one thread at a time."""

    times: StepTimes

    def forward(self, batch: Batch, exchange: Exchange) -> torch.Tensor:
        """Compute one step: write its KV, return the wanted logits, float32 [batch.num_logits, vocab].

        The caller has begun the exchange's step. The logits belong to the model and are valid until the next call; the
        caller may change them. Raises ValueError for a batch beyond the model's limits or with a bad token or block id;
        BusAborted and BusTimeout pass through (see Exchange). A step may be repeated: the same batch gives the same KV
        and logits, bit by bit, whatever other parts are in it.
        """


def build_model(weights: RankWeights, max_tokens: int) -> Model:
    """The model of `weights.spec`, with buffers for steps of at most `max_tokens` rows.

    Keeps `weights`. Raises ConfigError for an architecture without code, ValueError for tensors of a wrong shape or dtype.
    """
    builder = BUILDERS.get(weights.spec.architecture)
    if builder is None:
        raise ConfigError(f"architecture {weights.spec.architecture!r} cannot be computed; known: {sorted(BUILDERS)}")
    return builder(weights, max_tokens)


BUILDERS: dict[str, Callable[[RankWeights, int], Model]] = {}
