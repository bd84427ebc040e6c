"""The kernels that differ by vendor, as the accelerator backend asks for them.

What a kernel reads and writes is a record, made once with the operation; a step adds the number of rows, or its batch.
All is queued and nothing waits. N is the number of rows to compute; tensors may have more. What a vendor's kernels
promise of a row's bits, its own module says (ADR 33, ADR 38).

Shape suffixes: as in base.py; X heads, Y elements of a head, P planes x heads of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from elasticmoe.common.model_spec import ModelSpec, MoeSpec
from elasticmoe.services.worker.backends.accelerator.batch import AcceleratorBatch
from elasticmoe.services.worker.backends.answers import WeightedSum, add_up
from elasticmoe.services.worker.backends.sent_fields import Int32s


class Product(NamedTuple):
    """out [N, X, W] (+)= (x [N, X, H] · w [X, W, H] + bias [W]) for each head by itself, of each row times the sigmoid
    of its gate [N, 1], where there is one. `w` may have any strides. `is_gated`: out = silu(x · w1) * (x · w3), the
    halves of w, which has 2 W columns then."""

    x: torch.Tensor
    w: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None = None
    row_gate: torch.Tensor | None = None
    is_gated: bool = False
    accumulate: bool = False


class Norm(NamedTuple):
    """out = x / rms(x) * weight over the last dimension of [N, X, Y], x + delta for x where there is one, which x
    becomes where `keeps_sum`."""

    x: torch.Tensor
    delta: torch.Tensor | None
    weight: torch.Tensor
    eps: float
    out: torch.Tensor
    keeps_sum: bool = False


class RopeTable(NamedTuple):
    """out [N, D] = what `Rotation` needs of each row's position: cosines and sines of its frequencies' angles."""

    frequencies: torch.Tensor
    amplitude: float
    out: torch.Tensor


class Rotation(NamedTuple):
    """Rotate pairs of x [N, X, D] in place by a table of RopeTable, whose `amplitude` is this one."""

    x: torch.Tensor
    table: torch.Tensor
    amplitude: float
    is_interleaved: bool


class PagedAttention(NamedTuple):
    """out [N, X, value_width] = causal attention of the queries [N, X, Y] to the cache of `layer`. Keys are in plane 0;
    values in plane 1, or the first `value_width` elements of the keys where there is one plane."""

    q: torch.Tensor
    layer: int
    value_width: int
    scale: float
    out: torch.Tensor


class Route(NamedTuple):
    """See ComputeBackend.route; from logits [N, E]."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    moe: MoeSpec
    ids: torch.Tensor
    weights: torch.Tensor


class RowGroups(NamedTuple):
    """Rows [R, H] sorted by expert: on the host how many each has, on the device what `group_fields` made of that."""

    counts: Int32s
    sent: Mapping[str, torch.Tensor]


class Kernels(Protocol):
    """One vendor's."""

    name: str
    num_moves: int
    """How often memory of these kernels has moved that they read or write."""

    def check_model(self, spec: ModelSpec, block_size: int) -> None:
        """Raises ConfigError no_compute for a model that these kernels do not compute."""

    def prepare(self, step: AcceleratorBatch) -> None:
        """Send what the kernels need of a step that has a form, beside its batch: what is captured sends nothing."""

    def product(self, product: Product, n: int) -> None:
        """See Product."""

    def group_fields(self, counts: Int32s) -> Mapping[str, Int32s]:
        """What `expert_products` needs on the device of how many rows each expert has."""

    def expert_products(
        self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, groups: RowGroups, *, is_gated: bool
    ) -> None:
        """out [R, W] = x [R, H] · w [E, W, H] of each row's expert, or as a gated Product. Slots without rows are not
        touched."""

    def norm(self, norm: Norm, n: int, rows: torch.Tensor | None = None) -> None:
        """See Norm. With `rows` [N], int32: row `i` of out is of row `rows[i]` of x."""

    def rope_table(self, table: RopeTable, step: AcceleratorBatch) -> None:
        """See RopeTable."""

    def rotate(self, rotation: Rotation, n: int) -> None:
        """See Rotation."""

    def store(self, x: torch.Tensor, layer: int, step: AcceleratorBatch) -> None:
        """Write each row of x [N, P, W] to its place in its block of the cache; rows of block -1 nowhere."""

    def attend(self, attention: PagedAttention, step: AcceleratorBatch) -> None:
        """See PagedAttention."""

    def route(self, route: Route, n: int) -> None:
        """See Route."""

    def weighted_sum(self, total: WeightedSum, n: int) -> None:
        """See ComputeBackend: by torch's operations, where a vendor has no kernel for it."""
        add_up(total, n)
