"""What every model is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from elasticmoe.services.worker.backends.base import ComputeBackend
from elasticmoe.services.worker.exchange.base import Exchange
from elasticmoe.services.worker.model.batch import Batch


class StepTimes(NamedTuple):
    """Where a forward pass spent its time, in nanoseconds.

    `total_ns` = math and Python + `exchange_ns`; `wait_ns` is the part of `exchange_ns` spent waiting for other ranks.
    """

    total_ns: int
    exchange_ns: int
    wait_ns: int


class Model(Protocol):
    """A model over one rank's memory. For one thread at a time."""

    backend: ComputeBackend
    """What computes it, and what tokens are chosen from its logits with."""

    times: StepTimes
    """Of the last forward pass that was completed."""

    def forward(self, batch: Batch, exchange: Exchange) -> torch.Tensor:
        """Compute one step: write its KV, return the wanted logits, float32 [batch.num_logits, vocab], where the
        backend computes. Nothing of it is in flight then. All ranks of a replica compute the same batch; the first one
        gets the logits, and the others none, [0, vocab].

        The caller has begun the exchange's step. The logits belong to the model and are valid until the next call; the
        caller may change them. Raises ValueError for a batch beyond the model's limits or with a bad token or block id;
        StepAborted and StepTimedOut pass through (see Exchange). A step may be repeated: the same batch gives the same
        KV and logits, bit by bit, whatever other parts are in it.
        """
