"""Interface of compute backends: buffers, operations, the choice of tokens, and waiting for what was queued.

An operation is made once, from tensors whose shapes, dtypes and contiguity are checked then. A step calls it with the
number of rows and looks at no tensor again. The maker keeps the tensors alive for as long as it uses the operation.

An operation is queued when it returns, and done in the order of the queue; a backend that computes at once says
`is_synchronous`. The exchange between ranks reads and writes host memory: what goes there passes through a Mirror.

Every backend holds two rules (ADR 8, ADR 26): a row's result depends, bit by bit, on its own input, its sequence's KV
and the weights alone, and of equals the lower id comes first. Two backends agree only nearly, so that all ranks of a
deployment have the same.

Shape suffixes: N rows of a step, H hidden, W width of a linear's output, C width of qkv, Q width of the queries, D
head_dim, E experts, K experts per token, I expert width, R rows for the own experts, V vocabulary, M rows whose logits
are wanted, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from elasticmoe.common.model_spec import AttentionSpec, MoeSpec
from elasticmoe.common.protocol.rank import Sampling
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

Operation = Callable[[int], None]
"""Called with the number of rows N; writes the output that it is bound to."""

StepBatch = Any
"""What the same backend's `check_batch` made of a step's batch: nobody else looks into it."""

BatchOperation = Callable[[StepBatch], None]
"""Called with the step's batch; writes the output that it is bound to."""


class Mirror(NamedTuple):
    """A buffer of a step that the exchange reads or writes at `host`, and operations at `device`; one and the same
    tensor where the device computes in host memory."""

    device: torch.Tensor
    host: torch.Tensor


class ComputeBackend(ABC):
    """One rank's. For one thread at a time.

    `device`: where its tensors lie. `is_synchronous`: nothing is ever in flight when an operation has returned.
    """

    name: str
    device: torch.device
    is_synchronous: bool

    def __init__(self, tell_waiting: Callable[[bool], None] | None = None) -> None:
        """`tell_waiting` is called when the rank begins to wait for the device, and when it goes on; not where
        `is_synchronous`."""
        self._tell_waiting = tell_waiting

    # ---- buffers and the queue

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer of the caller's. Raises what torch raises where there is no memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
        """A buffer for the exchange."""
        device = self.empty(*shape, dtype=dtype)
        return Mirror(device, device if self.is_synchronous else torch.empty(shape, dtype=dtype))

    def download(self, *mirrors: Mirror) -> Operation:
        """The first N rows of each come to the host; blocks until they, and all that was queued before, are there."""
        if self.is_synchronous:
            return _is_there

        def run(n: int) -> None:
            for mirror in mirrors:
                mirror.host[:n].copy_(mirror.device[:n], non_blocking=True)
            self.fence()

        return run

    def upload(self, mirror: Mirror) -> Operation:
        """The first N rows go to the device; those at the host stay as they are until the next fence."""
        if self.is_synchronous:
            return _is_there

        def run(n: int) -> None:
            mirror.device[:n].copy_(mirror.host[:n], non_blocking=True)

        return run

    def fence(self) -> None:
        """Block until all that was queued is done. Others see meanwhile that this rank waits for its device."""
        if self.is_synchronous:
            return
        if self._tell_waiting is None:
            self._synchronize()
            return
        self._tell_waiting(True)
        try:
            self._synchronize()
        finally:
            self._tell_waiting(False)

    @abstractmethod
    def _synchronize(self) -> None:
        """Block until all that was queued is done. Not called where `is_synchronous`."""

    # ---- a step

    @abstractmethod
    def check_batch(self, batch: Batch, cache: KvCache) -> StepBatch:
        """The batch over the blocks that are mapped now, for the operations of this step; cache and mapping stay as
        they are meanwhile. Raises ValueError for a block beyond the mapped ones."""

    # ---- operations of a decoder

    @abstractmethod
    def embed(self, table_VH: torch.Tensor, out_NH: torch.Tensor) -> BatchOperation:
        """out = the rows of the table that the batch's tokens name. Raises ValueError for a token beyond the table."""

    @abstractmethod
    def linear(
        self, x_NH: torch.Tensor, w_WH: torch.Tensor, out_NW: torch.Tensor, *, accumulate: bool = False
    ) -> Operation:
        """out = x · w, or out += x · w."""

    @abstractmethod
    def rms_norm(
        self,
        x_NH: torch.Tensor,
        delta_NH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        out_NH: torch.Tensor,
    ) -> Operation:
        """x += delta (where there is one); out = x / rms(x) * weight."""

    @abstractmethod
    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOperation:
        """out = the norm of x + delta, of the rows whose logits are wanted."""

    @abstractmethod
    def rope_table(self, spec: AttentionSpec, out_ND: torch.Tensor) -> BatchOperation:
        """out = cosines and sines of each row's position, for `store_kv`."""

    @abstractmethod
    def store_kv(
        self,
        spec: AttentionSpec,
        layer: int,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms_D: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> BatchOperation:
        """Norm (q's and k's weights, where the model has them) and rotate q and k in place; write k and v to the
        cache."""

    @abstractmethod
    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NQ: torch.Tensor) -> BatchOperation:
        """out = causal attention of the queries in qkv to the cache."""

    @abstractmethod
    def route(
        self, x_NH: torch.Tensor, gate_EH: torch.Tensor, moe: MoeSpec, ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> Operation:
        """Softmax over x · gate; ids (int32) and weights of the top k experts, best first, of equals the lower id
        first. A row with NaN gets distinct experts all the same."""

    @abstractmethod
    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """Called with the exchange's rows [>= R, H] and counts [E], both in host memory, and R: each row becomes its
        expert's output, in place, and is there when it returns.

        w13 [E, 2 I, H] and w2 [E, H, I] may have gaps between experts; those without rows are not touched: they may be
        unmapped.
        """

    @abstractmethod
    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Operation:
        """out = w2 · (silu(gate) * up), gate and up the halves of w13 · x: one expert that takes every row."""

    # ---- operations of other models

    @abstractmethod
    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOperation:
        """Write kv [N, 2 D] to the cache; then, from what that holds, out = the sum of kv[j] * base^(position - j) over
        positions j up to the row's own, modulo `modulus` (below 2^16): exact, so that every cached value counts.

        All values are whole numbers below the modulus in float32, the cache is float32 with one head.
        """

    # ---- the choice of tokens, from rows of float32 logits

    @abstractmethod
    def greatest(self, logits_BV: torch.Tensor) -> list[int]:
        """Index of each row's greatest, the first of equals; -1 for a row that is not finite."""

    @abstractmethod
    def draw(self, logits_BV: torch.Tensor, row: int, sampling: Sampling, uniform: float) -> int:
        """The token of one row that `uniform`, in [0, 1), falls on, in the order of ids; -1 where a logit is not
        finite.

        Of softmax(logits / temperature): tokens with at least min_p times the greatest probability; of these the top_k
        greatest (0: all); of these the fewest that make up top_p of them (1: all), one at least. Raises ValueError for
        a temperature outside 1e-6 to 1e6, for shares and numbers outside their ranges and for NaN.
        """

    @abstractmethod
    def log_total(self, row_V: torch.Tensor) -> float:
        """log of the sum of e^logit; NaN if a logit is not finite."""

    @abstractmethod
    def top_tokens(self, row_V: torch.Tensor, count: int) -> list[int]:
        """The `count` greatest, best first; of equals the lower id first."""


def inverse_frequencies(spec: AttentionSpec) -> torch.Tensor:
    """float32 [D / 2]: how fast each pair of a head's elements rotates with the position. The same bits for all."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    return 1.0 / torch.pow(spec.rope.theta, exponents)


def _is_there(n: int) -> None:
    """Nothing to copy: the device computes in host memory."""
