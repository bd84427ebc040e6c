"""Interface of compute backends: buffers, operations, the choice of tokens, and waiting for what was queued.

An operation is made once, from tensors whose shapes, dtypes and contiguity are checked then. A step calls it with the
number of rows and looks at no tensor again. The maker keeps the tensors alive for as long as it uses the operation.

An operation is queued when it returns, and done in the order of the queue; a backend that computes at once says
`is_synchronous`. What the exchange between ranks takes and gives is a Mirror: some of it passes through host memory.

Every backend holds two rules (ADR 8, ADR 26): a row's result depends, bit by bit, on its own input, its sequence's KV
and the weights alone, and of equals the lower id comes first. Two backends agree only nearly, so that all ranks of a
deployment have the same.

Shape suffixes: N rows of a step, H hidden, W width of a linear's output, C width of qkv or of latent and shared key, Q
width of the queries, O width of what attention gives, D elements that rotate, E experts, K experts per token, I expert
width, R rows for the own experts, V vocabulary, M rows whose logits are wanted, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from elasticmoe.common.devices.torch_devices import has_float64
from elasticmoe.common.model_spec import AttentionSpec, LatentAttentionSpec, ModelSpec, MoeSpec, RopeSpec
from elasticmoe.services.worker.backends.answers import WeightedSum, add_up
from elasticmoe.services.worker.backends.choice import Chosen, Judged, TokenChoice
from elasticmoe.services.worker.model.batch import Batch
from elasticmoe.services.worker.model.weights import KvCache

Op = Callable[[int], None]
"""Called with the number of rows N; writes the output that it is bound to."""

StepBatch = Any
"""What the same backend's `check_batch` made of a step's batch. Others look at its `num_rows` alone: how many rows are
computed, which are the batch's and perhaps some behind them that are nobody's."""

BatchOp = Callable[[StepBatch], None]
"""Called with the step's batch; writes the output that it is bound to."""


class Mirror(NamedTuple):
    """A buffer of a step that operations read or write at `device`, and others at `host`, which is in host memory, or
    in memory that devices share; one and the same tensor where there is no difference."""

    device: torch.Tensor
    host: torch.Tensor


class ComputeBackend(ABC):
    """One rank's. For one thread at a time.

    `device`: where its tensors lie. `is_synchronous`: nothing is ever in flight when an operation has returned.
    `has_float64`: tensors there may be float64.
    """

    name: str

    def __init__(
        self, tell_waiting: Callable[[bool], None] | None = None, device: torch.device = torch.device("cpu")
    ) -> None:
        """`tell_waiting` is called when the rank begins to wait for the device, and when it goes on; not where
        `is_synchronous`, as on a CPU."""
        self._tell_waiting = tell_waiting
        self.device = device
        self.is_synchronous = device.type == "cpu"
        self.has_float64 = has_float64(device)

    @property
    def computes_by(self) -> str:
        """What an operator can compare: its kernels, and all that a rank chose for itself on this machine."""
        return self.name

    def use_threads(self, count: int) -> None:  # noqa: B027 - most have none of their own
        """Let so many threads compute from now on, between two steps: other ranks have come or gone. Results do not
        depend on it (ADR 44)."""

    # ---- buffers and the queue

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A buffer of the caller's. Raises what torch raises where there is no memory."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def mirror(self, *shape: int, dtype: torch.dtype = torch.float32) -> Mirror:
        """A buffer for the exchange."""
        device = self.empty(*shape, dtype=dtype)
        return Mirror(device, device if self.is_synchronous else torch.empty(shape, dtype=dtype))

    def download(self, *mirrors: Mirror) -> Op:
        """The first N rows of each come to its other side; blocks until they, and all that was queued before, are
        there."""
        mirrors = tuple(mirror for mirror in mirrors if mirror.host is not mirror.device)
        if self.is_synchronous and not mirrors:
            return _is_there

        def run(n: int) -> None:
            for mirror in mirrors:
                mirror.host[:n].copy_(mirror.device[:n], non_blocking=True)
            self.fence()

        return run

    def upload(self, mirror: Mirror) -> Op:
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

    def check_model(self, spec: ModelSpec, block_size: int) -> None:  # noqa: B027 - most compute every model
        """Raises ConfigError no_compute for a model, or blocks of KV of `block_size` tokens, that it does not compute.
        Asked before operations are made."""

    @abstractmethod
    def check_batch(self, batch: Batch, cache: KvCache) -> StepBatch:
        """The batch over the blocks that are mapped now, for the operations of this step; cache and mapping stay as
        they are meanwhile. Raises ValueError for a block beyond the mapped ones."""

    @contextmanager
    def warming_up(self, rows_max: int) -> Iterator[tuple[int, ...]]:  # noqa: ARG002 - most keep nothing
        """Before a rank serves: the numbers of rows, at most `rows_max`, the largest first, of which steps that only
        decode are to be computed twice, for what is compiled, allocated and kept then."""
        yield ()

    def section(self, run: BatchOp, rows_max: int) -> BatchOp:  # noqa: ARG002 - most keep nothing
        """What `run` does of a step, of at most `rows_max` rows: it calls this backend's operations alone and looks at
        nothing but the step's batch, so that a backend may keep what it queued and queue that again for a step of the
        same form. An operation that looks at host memory (`embed`) is called outside."""
        return run

    # ---- operations of a decoder

    @abstractmethod
    def embed(
        self, table_VH: torch.Tensor, factor: float, out_NH: torch.Tensor, *, first: int = 0, vocab: int = 0
    ) -> BatchOp:
        """out = the rows of the table that the batch's tokens name, times `factor`. The table has the tokens from
        `first` on of a vocabulary of `vocab` (0: it ends with the table); others' rows are zeros. Raises ValueError for
        a token beyond the vocabulary."""

    @abstractmethod
    def linear(
        self,
        x_NH: torch.Tensor,
        w_WH: torch.Tensor,
        out_NW: torch.Tensor,
        *,
        bias_W: torch.Tensor | None = None,
        accumulate: bool = False,
    ) -> Op:
        """out = x · w, or out += x · w; with the bias (float32), where there is one, added once more."""

    @abstractmethod
    def rms_norm(
        self,
        x_NH: torch.Tensor,
        delta_NH: torch.Tensor | None,
        weight_H: torch.Tensor,
        eps: float,
        out_NH: torch.Tensor,
    ) -> Op:
        """x += delta (where there is one); out = x / rms(x) * weight."""

    @abstractmethod
    def final_norm(
        self, x_NH: torch.Tensor, delta_NH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_MH: torch.Tensor
    ) -> BatchOp:
        """out = the norm of x + delta, of the rows whose logits are wanted."""

    @abstractmethod
    def rope_table(self, rope: RopeSpec, out_ND: torch.Tensor) -> BatchOp:
        """out = cosines and sines of each row's position, [N, 2, D / 2], for `store_kv` and `store_latent`."""

    @abstractmethod
    def store_kv(
        self,
        spec: AttentionSpec,
        layer: int,
        qkv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
    ) -> BatchOp:
        """In place: norm q and k (weights [head_dim], or of all heads of a token together, as `spec.qk_norm` says), cut
        q, k and v to `spec.clip`, rotate q and k; write k and v to the cache."""

    @abstractmethod
    def attention(self, spec: AttentionSpec, layer: int, qkv_NC: torch.Tensor, out_NO: torch.Tensor) -> BatchOp:
        """out = causal attention of the queries in qkv to the cache."""

    @abstractmethod
    def store_latent(
        self,
        spec: LatentAttentionSpec,
        layer: int,
        q_NQ: torch.Tensor,
        kv_NC: torch.Tensor,
        rope_ND: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
    ) -> BatchOp:
        """In place: rotate the last D elements of each query; norm the latent (the first `kv_rank` elements of kv, with
        these weights), rotate the shared key behind it. Write kv to the cache."""

    @abstractmethod
    def latent_attention(
        self, spec: LatentAttentionSpec, layer: int, q_NQ: torch.Tensor, kv_b: torch.Tensor, out_NO: torch.Tensor
    ) -> BatchOp:
        """out = causal attention of the queries to the cached latents and shared keys.

        kv_b [heads x (nope_dim + v_dim), kv_rank] is absorbed: a query is brought to the latents by its head's first
        rows, and what it takes from the latents to a value by its last ones. No key or value of a head is ever made.
        """

    @abstractmethod
    def route(
        self,
        x_NH: torch.Tensor,
        gate_EH: torch.Tensor,
        bias_E: torch.Tensor | None,
        moe: MoeSpec,
        ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
    ) -> Op:
        """Scores of x · gate as `moe` says (see MoeSpec); ids (int32) and weights of the top k experts of the best
        groups, best first, of equals the lower id first, of groups as of experts. The bias decides the choice and its
        order, not the weights. A row with NaN gets distinct experts all the same."""

    @abstractmethod
    def experts(
        self, w13_E: torch.Tensor, w2_E: torch.Tensor, moe: MoeSpec, hidden: int
    ) -> Callable[[torch.Tensor, torch.Tensor, int], None]:
        """Called with the exchange's rows [>= R, H], counts [E] and R: each row becomes its expert's output, in place.
        The counts are in host memory. So may be the rows: then they are there when it returns; or they lie where the
        backend computes, and all is queued.

        w13 [E, 2 I, H] and w2 [E, H, I] may have gaps between experts; those without rows are not touched: they may be
        unmapped.
        """

    @abstractmethod
    def feed_forward(
        self, x_NH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, width: int, out_NH: torch.Tensor
    ) -> Op:
        """out = w2 · (silu(gate) * up), gate and up the halves of w13 · x: one expert that takes every row."""

    @abstractmethod
    def shared_experts(
        self,
        x_NH: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        gate_1H: torch.Tensor | None,
        width: int,
        out_NH: torch.Tensor,
    ) -> Op:
        """out += w2 · (silu(gate) * up), as of `feed_forward`, times sigmoid(x · gate_1H) where there is that gate."""

    # ---- what is computed only where a replica has several ranks

    def clear(self, out_NH: torch.Tensor) -> Op:
        """out = 0."""

        def run(n: int) -> None:
            out_NH[:n].zero_()

        return run

    def square(self, x_NC: torch.Tensor, out_NC: torch.Tensor) -> Op:
        """out = each element of x, squared."""

        def run(n: int) -> None:
            torch.mul(x_NC[:n], x_NC[:n], out=out_NC[:n])

        return run

    def scale_by_squares(
        self, x_NW: torch.Tensor, squares_N: torch.Tensor, count: int, weight_W: torch.Tensor, eps: float
    ) -> Op:
        """x = x / sqrt(squares / count + eps) * weight, in place: the RMS norm of rows of which x is a part, by the sum
        of the squares of their `count` elements. Neither x nor squares need be contiguous."""

        def run(n: int) -> None:
            x_NW[:n] *= 1 / torch.sqrt(squares_N[:n, None] / count + eps)
            x_NW[:n] *= weight_W

        return run

    # ---- operations of other models

    @abstractmethod
    def whole_number_attention(
        self, layer: int, modulus: int, base: int, kv_NE: torch.Tensor, out_NE: torch.Tensor
    ) -> BatchOp:
        """Write kv [N, 2 D] to the cache; then, from what that holds, out = the sum of kv[j] * base^(position - j) over
        positions j up to the row's own, modulo `modulus` (below 2^16): exact, so that every cached value counts.

        All values are whole numbers below the modulus in float32, the cache is float32 with one head.
        """

    # ---- what experts have answered

    def weighted_sum(self, total: WeightedSum, n: int) -> None:
        """Queue the sums of the first n tokens. Each product is rounded, and they are added to 0 in the order of k: by
        all backends alike, and as the bus does it."""
        add_up(total, n)

    # ---- the choice of tokens, from rows of float32 logits

    @abstractmethod
    def choose(self, logits_BV: torch.Tensor, choices: Sequence[TokenChoice]) -> list[Chosen]:
        """One token for each row, which its mask and its edits have changed then in place; -1 for a row that is not
        finite. Blocks until they are there.

        The greatest, the first of equals; or the one that `uniform` falls on, in the order of ids, of softmax(logits /
        temperature): tokens with at least min_p times the greatest probability; of these the top_k greatest (0: all);
        of these the fewest that make up top_p of them (1: all), one at least. ValueError is a row's error for a
        temperature outside 1e-6 to 1e6, for shares and numbers outside their ranges and for NaN. What is judged are
        the logits as they came, of the tokens that are allowed.
        """

    @abstractmethod
    def judge(self, logits_NV: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[Judged]:
        """Each row's token and `num_top` best. Blocks until they are there."""


def _is_there(n: int) -> None:
    """Nothing to copy: the device computes in host memory."""


def check_norms(spec: AttentionSpec, norms: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    """Raise ValueError where there are norms that the spec does not know, or none where it asks for them."""
    if (norms is None) != (spec.qk_norm == "none"):
        raise ValueError(f"qk_norm is {spec.qk_norm!r}, and there are {'no' if norms is None else 'two'} norms")
