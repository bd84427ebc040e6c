"""Mistakes that the simulation has to find: each takes one safeguard out of the product for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import msgspec

from elasticmoe.common.fence import Fence
from elasticmoe.common.store import Writer
from elasticmoe.services.hmm.memory.blocks import BlockCopies
from elasticmoe.services.hmm.memory.catalog import Transition
from elasticmoe.services.hmm.memory.transfer import Supply
from elasticmoe.services.hmm.transition.transition import Transitions
from elasticmoe.services.router.dispatch.streams import Stream
from elasticmoe.services.scaler import service
from elasticmoe.services.scaler.actions import ScaleTo
from elasticmoe.services.scaler.control import admission, autoscaling, reconciler
from elasticmoe.services.scaler.control.state import State
from elasticmoe.services.scaler.policy import recommend
from elasticmoe.services.scaler.policy.signals import Intake
from elasticmoe.services.scaler.policy.state import Decision
from elasticmoe.services.scaler.store.journal import Journal
from elasticmoe.services.worker.engine import rows
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.sequence import Sequence
from elasticmoe.services.worker.engine.trial import INNOCENT, Trial
from elasticmoe.services.worker.rank.follower import Follower
from tests.sim.pool import Pool
from tests.sim.store import Store


class Mutation(NamedTuple):
    """`place` in an object is `instead` meanwhile, and so are those of `also`; one of `found` is part of what the
    simulation then says. `is_of_policy`: seeds in which the policy acts can show it. `tp`: ranks of a replica.
    `first`: the seed that the search begins at, where it is known that those before show nothing."""

    where: Any
    place: str
    instead: Any
    found: tuple[str, ...]
    also: tuple[tuple[Any, str, Any], ...] = ()
    is_of_policy: bool = False
    tp: int = 1
    first: int = 1


def _double(self: Stream, delta: Any) -> tuple[int, ...]:
    """What is known is taken once more."""
    for token in delta.ids:
        self.tokens.append(token)
    return tuple(delta.ids)


def _without_tail(hand_over: Callable[..., Any]) -> Callable[..., Any]:
    """A hand-over whose last blocks are of somebody else."""

    def cut(self: Engine, sequence: Any, num_copied: int, now: float) -> Any:
        message = hand_over(self, sequence, num_copied, now)
        return msgspec.structs.replace(message, tail=bytes(len(message.tail)))

    return cut


def _verify_layout(self: Journal) -> None:
    """Only the layout is looked after."""
    if self._last_layout is not None and self._store.get_epoch() < self._last_layout.epoch:
        self._store.put_layout(self._writer, self._last_layout)


def _may_write_by_lease(self: Store, by: Writer) -> bool:
    """The store asks for the lease, not for the epoch."""
    self._check()
    return self._holder() in ("", by.holder)


def _follow_load(*args: Any, **facts: Any) -> Any:
    """Whoever is being replaced counts as there."""
    return autoscaling.follow_load(*args, **(facts | {"is_serving": True}))


def _advised(decision: Decision) -> tuple[ScaleTo, ...]:
    return (ScaleTo(decision.op_id, decision.target, "advice"),) if decision.op_id and decision.target else ()


def _twice(decision: Decision) -> tuple[ScaleTo, ...]:
    """Each order under another name once more."""
    orders = _advised(decision) if decision.acts else ()
    return (*orders, *(msgspec.structs.replace(order, op_id=f"{order.op_id}-again") for order in orders))


def _unmap(self: Follower, num_blocks: int) -> bool:
    """Whatever the leader gives out."""
    self._kv.num_blocks = num_blocks
    self._board.tell_blocks(num_blocks)
    return True


MUTATIONS: dict[str, Mutation] = {
    "a commit does not wait until all are prepared": Mutation(
        Transitions, "_prepared", lambda _: tuple(range(8)), ("is committed",)
    ),
    "memory is given back while ranks have it mapped": Mutation(
        Transitions, "_is_let_go", lambda *_: True, ("is mapped and given back",)
    ),
    "what was claimed for a transition that failed is forgotten": Mutation(
        Supply, "drop_claims", lambda supply: supply._claims.clear(), ("the catalog names",)
    ),
    "commands of superseded scalers are obeyed": Mutation(Fence, "check", lambda *_: None, (" obeys epoch ",)),
    "a transition begins before the last one is over": Mutation(
        Transition, "is_over", property(lambda _: True), ("in the middle", "catalog: ", "computes by epoch")
    ),
    # Each of the three is enough.
    "a stale scaler's writes are taken and stay, and it does not look at the disk": Mutation(
        Journal,
        "_verify",
        _verify_layout,
        ("the journal has an operation",),
        ((Store, "_may_write", _may_write_by_lease), (Fence, "refresh", lambda fence: fence.epoch)),
    ),
    "lost devices are used for new replicas": Mutation(
        admission, "lost_devices", lambda *_: set(), ("which is lost", "has forgotten", "not at rest")
    ),
    "an order that waits for an operation to give way is all that remembers the loss": Mutation(
        reconciler, "_leave_out", lambda *_: None, ("is lost and has a seat",)
    ),
    "ranks are seated on a lost device until it is left out": Mutation(
        State, "lost_slots", lambda *_: frozenset(), ("which is lost",)
    ),
    "a new pool knows nothing of the ranks that live": Mutation(
        Pool,
        "_survivors",
        lambda _: {},
        ("ranks in slots []; ['rank-",),  # it has none, and some live
    ),
    "a router takes tokens that it has": Mutation(Stream, "_accept_part", _double, ("tokens", "history")),
    "a rank goes on with rows as if nothing was known of them": Mutation(
        rows, "after_death", lambda *_: INNOCENT, (" steps fail", "requests [")
    ),
    "suspects are computed with the others": Mutation(
        Sequence, "is_suspect", property(lambda _: False), (" steps fail", "requests [")
    ),
    "whoever was in two steps that failed is to blame": Mutation(
        Trial, "is_guilty", property(lambda trial: trial.failures > 1), ("for what it did not do",)
    ),
    "the policy decides as if no operation was in progress": Mutation(
        autoscaling, "_operation_facts", lambda *_: None, (" is in progress: ",), is_of_policy=True
    ),
    "the policy decides as if no rank was being replaced": Mutation(
        reconciler, "follow_load", _follow_load, ("while it is degraded", "while it is attaching"), is_of_policy=True
    ),
    "who is silent has no load": Mutation(Intake, "_silent", lambda *_: {}, (" is silent",), is_of_policy=True),
    "the policy's most is not kept": Mutation(
        recommend.Turn,
        "most",
        property(lambda turn: turn.deployment.available),
        (", beyond ", ", out of "),
        is_of_policy=True,
    ),
    "the policy's least is not kept": Mutation(
        recommend.Turn, "least", property(lambda _: 1), (", out of ",), is_of_policy=True
    ),
    "advice is followed": Mutation(autoscaling, "_actions", _advised, ("that only advises",)),
    "a scaler knows nothing of the operations that its predecessor's policy ordered": Mutation(
        service,
        "remembered",
        lambda *_: autoscaling.Autoscaling(),
        (" s after a growth", " operations"),
        is_of_policy=True,
    ),
    "a decision is sent twice": Mutation(
        autoscaling, "_actions", _twice, (" is in progress: ", "has no answer"), is_of_policy=True
    ),
    "an answered order is awaited for ever": Mutation(
        recommend, "_answered", lambda _, state: state, ("after the last request",), is_of_policy=True
    ),
    "KV is copied as often as that is asked for": Mutation(
        BlockCopies, "_is_joined", lambda *_: False, ("tokens", "has other KV"), tp=2, first=700
    ),
    "a follower unmaps blocks that its leader gives out": Mutation(
        Follower, "_resize_kv", _unmap, ("has not mapped", " is to move; "), tp=2
    ),
    "a hand-over loses the end of the KV": Mutation(Engine, "hand_over", _without_tail(Engine.hand_over), ("tokens",)),
}


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """With the mistake called `name`."""
    mutation = MUTATIONS[name]
    with ExitStack() as stack:
        for where, place, instead in ((mutation.where, mutation.place, mutation.instead), *mutation.also):
            stack.enter_context(mock.patch.object(where, place, instead))
        yield
