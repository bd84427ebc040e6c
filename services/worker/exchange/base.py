"""Interface of the expert exchange: send tokens to the ranks that hold their experts, bring the results back; and of
what the ranks of one replica do together.

The model's rows lie where its backend computes. By which memory they travel is the exchange's affair: it takes them
from either side of a Mirror, and waits for what was queued before it tells others that they are there.

Shape suffixes: N own tokens, K experts per token, H hidden, R rows received, E experts of the layer (all that the
model has), W any width, M rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from elasticmoe.services.worker.backends.base import Mirror
from elasticmoe.services.worker.exchange.expert_rows import ExpertRows


class StepAborted(Exception):
    """The generation is over, because membership changed: the step in flight is lost and is to be discarded.
    `generation`: the one that was current when it was noticed."""

    def __init__(self, generation: int) -> None:
        super().__init__(f"the step's generation is over; generation {generation} is current")
        self.generation = generation


class StepTimedOut(Exception):
    """Another rank did not arrive in time."""


class ExchangeTimes(NamedTuple):
    """Nanoseconds: in the exchange altogether, and the part of them spent waiting for other ranks."""

    exchange_ns: int
    wait_ns: int


class Exchange(ABC):
    """Dispatch and combine of one rank. All ranks of a layout make the same calls in the same order.

    Held by the caller: every rank of the layout runs the same step; every layer with experts is dispatched and combined
    exactly once, in order, also with no tokens; expert memory and routing stay as they are from `begin_step` to the
    step's end; one thread. Each call may block for the slowest rank, up to the step's deadline.

    When membership changes in mid-step, a call raises StepAborted (or StepTimedOut at the deadline): the step is lost,
    its results are discarded, and the same work starts again with `begin_step`. KV that it wrote is written again,
    equally.
    """

    rows_RH: torch.Tensor
    """float32 [>= R, H]: the rows for this rank's experts, sorted by expert, valid from `dispatch` to `combine`. The
    caller may overwrite them (in place experts). In host memory, or where the backend computes."""

    counts_E: torch.Tensor
    """int32 [E], in host memory: rows of each expert; 0 for experts of other ranks. Valid as `rows_RH`."""

    @abstractmethod
    def set_routing(self, generation: int, owners: Sequence[Sequence[int]]) -> None:
        """Use `owners[layer][expert]`, the slot that computes each expert (`Layout.owners`), in this generation.

        Needed before the first step, and again whenever the generation or the placement changes; between steps only.
        Raises ValueError where the numbers of experts are not the model's.
        """

    def prepare(self, generation: int) -> bool:  # noqa: ARG002 - most have nothing to prepare
        """Get ready for a staged generation; whether this rank is. Asked again until it is: ranks flip once all are.
        Never blocks."""
        return True

    def take_expert_rows(self) -> ExpertRows:
        """Rows that came for own experts in sampled steps, since the last call; of none where there are no steps."""
        return ExpertRows(0, ())

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give up what is not the caller's. Idempotent."""

    def listen(self, hear: Callable[[], None]) -> None:  # noqa: B027 - one that waits for nobody has no use for it
        """Call `hear` now and then while a step waits for other ranks; what it raises ends the step. Before the first
        step."""

    @property
    @abstractmethod
    def is_awaited(self) -> bool:
        """Whether others wait, or will, for this rank's part in the step that it began last."""

    @abstractmethod
    def begin_step(self, total_tokens: int, deadline_ms: float) -> None:
        """Start a step in which all ranks together have `total_tokens` tokens; room for their rows is made here.

        `deadline_ms`: the longest that one later call may block, in milliseconds.
        """

    @abstractmethod
    def dispatch(self, layer: int, x_NH: Mirror, ids_NK: Mirror, weights_NK: Mirror, n: int, *, first: int = 0) -> int:
        """Send `n` rows of x (float32) from number `first` on, as the backend has queued them, to the owners of their
        experts; returns R, the rows received.

        `ids`: int32 expert ids, -1 = unused; `weights`: float32. All contiguous; they stay as they are until `combine`
        has returned.
        """

    @abstractmethod
    def combine(self, layer: int, y_RH: torch.Tensor, out_NH: Mirror, n: int, *, first: int = 0) -> None:
        """Return expert outputs (float32, in the order and place of `rows_RH`) and sum: out[t] = sum over k of
        weight * y, where the backend goes on with it; of the same rows as `dispatch`.

        The sum runs over k in order whoever owns the experts, so that it does not depend on the layout; each product is
        rounded before it is added. Exchanges agree in every bit.
        """

    @abstractmethod
    def reduce(self, x_NW: Mirror | None, rows_NW: Mirror | None, out_NW: Mirror, n: int) -> None:
        """Among the ranks of the own replica: out = the rows that each of them has, plus what all of them bring.

        `rows_NW`: rank t of T has those from n t / T to n (t + 1) / T; None: nobody has any. `x_NW` is what is brought;
        None: nobody brings some. A row's sum begins with what a rank has, and goes on by tp index: all ranks get the
        same bits. `out_NW` may be one of the others.
        """

    @abstractmethod
    def gather(self, x_MW: Mirror, out_MV: Mirror | None, n: int, total: int) -> None:
        """Among the ranks of the own replica, once at a step's end: out = x of all of them side by side, `total`
        columns, of which rank t of T has those from total t / T to total (t + 1) / T. None: others want it."""

    @abstractmethod
    def take_times(self) -> ExchangeTimes:
        """Time spent since the last call of this method."""
