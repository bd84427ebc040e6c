"""The contract of exchanges, on each of them: the same bits whoever owns the experts, and an end where others end."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from elasticmoe.common.layout import ExchangeKind
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.services.worker.backends.base import ComputeBackend, Mirror
from elasticmoe.services.worker.backends.torch import TorchBackend
from elasticmoe.services.worker.exchange.base import Exchange, StepAborted, StepTimedOut
from elasticmoe.services.worker.exchange.groups import Groups
from tests.procs.waiting import wait_until
from tests.unit.backends import QueuedBackend
from tests.unit.exchanges import KINDS, Host
from tests.unit.threads import at_once

SHAPE = (4, 6, 33, 3)  # ranks, tokens, hidden, top_k
RANKS, TOKENS, HIDDEN, TOP_K = SHAPE
EXPERTS = (10, 0, 4)  # of three layers, one without any
LONG_MS = 30_000.0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def host() -> Host:
    return Host(SHAPE)


class Work:
    """One rank's tokens of a step, by layer, and what comes out, worked out alone."""

    def __init__(self, seed: int, n: int) -> None:
        rng = np.random.default_rng(seed)
        self.n = n
        self.x = rng.standard_normal((n, HIDDEN)).astype(np.float32)
        self.weights = rng.standard_normal((n, TOP_K)).astype(np.float32)
        self.ids = {layer: _ids(rng, n, count) for layer, count in enumerate(EXPERTS) if count}

    def expected(self, layer: int) -> np.ndarray:
        out = np.zeros((self.n, HIDDEN), dtype=np.float32)
        for token in range(self.n):
            for k in range(TOP_K):
                if (expert := self.ids[layer][token, k]) >= 0:
                    out[token] += self.weights[token, k] * _expert(self.x[token], expert)
        return out


def _ids(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    ids = np.stack([rng.permutation(count)[:TOP_K] for _ in range(n)]) if n else np.zeros((0, TOP_K))
    ids[rng.random(ids.shape) < 0.2] = -1
    if n > 1:
        ids[0] = -1
    return ids.astype(np.int32)


def _expert(x: np.ndarray, expert: int) -> np.ndarray:
    return x * np.float32(1.25 + expert) + np.float32(expert)


class Rank:
    """One member, its backend and its end of the exchange."""

    def __init__(
        self,
        host: Host,
        kind: ExchangeKind,
        slot: int,
        backend: type[TorchBackend] = TorchBackend,
        incarnation: int = 1,
    ) -> None:
        self.backend: ComputeBackend = backend()
        self.bus = host.join(slot, incarnation)
        self.exchange: Exchange = host.open(kind, self.bus, EXPERTS, self.backend)
        self.x = self.backend.mirror(TOKENS, HIDDEN)
        self.out = self.backend.mirror(TOKENS, HIDDEN)
        self.weights = self.backend.mirror(TOKENS, TOP_K)
        self.ids = self.backend.mirror(TOKENS, TOP_K, dtype=torch.int32)

    def route(self, generation: int, members: list[int], turn: int = 0) -> None:
        owners = [[members[(expert + turn) % len(members)] for expert in range(count)] for count in EXPERTS]
        self.exchange.set_routing(generation, owners)

    def put(self, mirror: Mirror, rows: np.ndarray) -> None:
        """As an operation would: queued where the backend queues."""
        mirror.host[: len(rows)] = torch.from_numpy(rows)
        self.backend.upload(mirror)(len(rows))

    def dispatch(self, work: Work, layer: int) -> int:
        for mirror, rows in ((self.x, work.x), (self.ids, work.ids[layer]), (self.weights, work.weights)):
            self.put(mirror, rows)
        return self.exchange.dispatch(layer, self.x, self.ids, self.weights, work.n)

    def compute(self, layer: int, num_rows: int) -> None:
        rows, counts = self.exchange.rows_RH[:num_rows], self.exchange.counts_E[: EXPERTS[layer]].numpy()
        assert counts.sum() == num_rows
        experts = np.repeat(np.arange(EXPERTS[layer]), counts)
        for row, expert in zip(rows, experts, strict=True):
            row.copy_(torch.from_numpy(_expert(row.numpy(), expert)))

    def run(self, work: Work, total: int, deadline_ms: float = LONG_MS) -> list[np.ndarray]:
        """A whole step: what comes out of each layer."""
        self.exchange.begin_step(total, deadline_ms)
        outs = []
        for layer, count in enumerate(EXPERTS):
            if count:
                self.compute(layer, self.dispatch(work, layer))
                self.out.device.fill_(float("nan"))
                self.exchange.combine(layer, self.exchange.rows_RH, self.out, work.n)
                self.backend.download(self.out)(work.n)
                outs.append(self.out.host[: work.n].numpy().copy())
        assert not self.exchange.is_awaited
        return outs


def step(ranks: list[Rank], works: list[Work]) -> list[Any]:
    """What each rank gets of a step together."""
    total = sum(work.n for work in works)
    return at_once(*(partial(rank.run, work, total) for rank, work in zip(ranks, works, strict=True)))


def check(works: list[Work], results: list[Any]) -> None:
    for work, outs in zip(works, results, strict=True):
        assert not isinstance(outs, Exception), repr(outs)
        for layer, out in zip([layer for layer, count in enumerate(EXPERTS) if count], outs, strict=True):
            assert np.array_equal(out, work.expected(layer))


@pytest.mark.parametrize("backend", [TorchBackend, QueuedBackend])
@pytest.mark.parametrize("members", [[2], [0, 3], [0, 1, 3]])
def test_every_sum_has_the_bits_of_the_direct_one(
    host: Host, kind: ExchangeKind, members: list[int], backend: type[TorchBackend]
) -> None:
    """Whoever owns the experts, with as many tokens as may be and with none."""
    ranks = [Rank(host, kind, slot, backend) for slot in members]
    for generation in range(1, 6):
        host.observer.set_membership(generation, sum(1 << slot for slot in members), True)
        works = [Work(10 * generation + slot, (TOKENS, 0, 1, 4)[(slot + generation) % 4]) for slot in members]
        for rank in ranks:
            rank.route(generation, members, turn=generation)
        check(works, step(ranks, works))


@pytest.mark.parametrize("stage", ["dispatch", "combine"])
def test_a_member_that_dies_ends_the_others_step_and_they_go_on_without_it(
    host: Host, kind: ExchangeKind, stage: str
) -> None:
    """It is killed in the midst of an exchange; the HMM ends the generation, and a successor takes its slot."""
    ranks, works = [Rank(host, kind, slot) for slot in (0, 1, 2)], [Work(slot, 3) for slot in (0, 1, 2)]
    host.observer.set_membership(1, 0b111, True)
    for rank in ranks:
        rank.route(1, [0, 1, 2])
    is_gone = threading.Event()

    def die() -> None:
        if stage == "combine":
            ranks[2].exchange.begin_step(9, LONG_MS)
            ranks[2].dispatch(works[2], 0)
        is_gone.set()

    def end() -> None:
        is_gone.wait()
        wait_until(lambda: min(map(host.observer.progress, (0, 1))) > (stage == "combine"), "the others wait", 20.0)
        host.observer.set_membership(2, 0b111, False)

    results = at_once(lambda: ranks[0].run(works[0], 9), lambda: ranks[1].run(works[1], 9), die, end)
    assert [type(result) for result in results[:2]] == [StepAborted, StepAborted]
    assert results[0].generation == 2
    assert all(rank.exchange.is_awaited for rank in ranks[:2])
    ranks[2] = Rank(host, kind, 2, incarnation=2)
    host.observer.set_membership(3, 0b111, True)
    for rank in ranks:
        rank.route(3, [0, 1, 2])
    check(works, step(ranks, works))


def test_a_peer_that_stays_away_is_waited_for_until_the_steps_deadline(host: Host, kind: ExchangeKind) -> None:
    rank, _ = Rank(host, kind, 0), Rank(host, kind, 1)
    host.observer.set_membership(1, 0b11, True)
    rank.route(1, [0, 1])
    started = time.monotonic()
    with pytest.raises(StepTimedOut):
        rank.run(Work(1, 2), 2, deadline_ms=600.0)
    assert 0.5 < time.monotonic() - started < 10.0
    assert host.observer.progress(0) >= 2, "others see that it is not the one that is stuck"


def test_who_waits_for_a_peer_hears_what_may_end_the_wait(host: Host, kind: ExchangeKind) -> None:
    rank, _ = Rank(host, kind, 0), Rank(host, kind, 1)
    host.observer.set_membership(1, 0b11, True)
    rank.route(1, [0, 1])
    heard: list[float] = []

    def hear() -> None:
        heard.append(time.monotonic())
        if len(heard) == 2:
            raise ElasticMoEError("the memory is nobody's", code="memory_replaced")

    rank.exchange.listen(hear)
    with pytest.raises(ElasticMoEError, match="nobody's"):
        rank.run(Work(1, 2), 2, deadline_ms=LONG_MS)
    assert len(heard) == 2


def test_what_nobody_owns_is_refused_before_others_wait(host: Host, kind: ExchangeKind) -> None:
    rank = Rank(host, kind, 0)
    host.observer.set_membership(1, 1, True)
    with pytest.raises(ValueError, match="routing"):
        rank.exchange.set_routing(1, [[0] * 9, [], [0] * 4])
    rank.exchange.begin_step(1, LONG_MS)
    with pytest.raises(ValueError, match="no routing"):
        rank.dispatch(Work(1, 1), 0)
    rank.exchange.set_routing(1, [[3] * 10, [], [0] * 4])
    with pytest.raises(ValueError, match="no home"):
        rank.dispatch(Work(2, 4), 0)
    rank.route(1, [0])
    with pytest.raises(ValueError, match="dispatch"):
        rank.exchange.combine(0, rank.exchange.rows_RH, rank.out, 1)
    work = Work(3, 4)
    check([work], [rank.run(work, 4)])


def test_more_rows_than_the_step_has_room_for_are_refused(host: Host, kind: ExchangeKind) -> None:
    rank, work = Rank(host, kind, 0), Work(4, 6)
    host.observer.set_membership(1, 1, True)
    rank.route(1, [0])
    rank.exchange.begin_step(2, LONG_MS)
    with pytest.raises(ValueError, match="rows_cap"):
        rank.dispatch(work, 0)


def test_groups_are_made_before_a_flip_and_given_up_after_it(host: Host) -> None:
    """By members and by who comes in, beside steps of the generation before; and not by who leaves."""
    ranks = [Rank(host, "torch_dist", slot) for slot in (0, 1, 2)]
    groups: list[Groups] = [rank.exchange._groups for rank in ranks]  # type: ignore[attr-defined]
    host.observer.set_membership(1, 0b011, True)
    for rank in ranks[:2]:
        rank.route(1, [0, 1])
    works = [Work(slot, 3) for slot in (0, 1)]
    check(works, step(ranks[:2], works))
    host.observer.stage_membership(2, 0b110, 2)
    assert ranks[0].exchange.prepare(2), "who leaves has nothing to prepare"
    assert not ranks[0].exchange.prepare(3), "nobody has staged that"
    assert not ranks[1].exchange.prepare(2), "the third has not come"
    check(works, step(ranks[:2], works))
    wait_until(lambda: all([rank.exchange.prepare(2) for rank in ranks[1:]]), "both have come", 20.0)
    before = groups[1].get(1)
    assert ranks[1].bus.flip(2)
    for rank in ranks:
        rank.route(2, [1, 2])
    assert before is not groups[1].get(2) is not None
    for left in groups:
        assert list(left._made) in ([2], [])
    works = [Work(slot, 4) for slot in (1, 2)]
    check(works, step(ranks[1:], works))
    for rank in ranks:
        rank.exchange.close()
        rank.exchange.close()


def test_a_group_that_breaks_is_waited_for_no_longer_than_its_generation(host: Host) -> None:
    """As where a peer's process dies: its connections are gone at once, the bus says so later."""
    ranks, works = [Rank(host, "torch_dist", slot) for slot in (0, 1)], [Work(slot, 3) for slot in (0, 1)]
    host.observer.set_membership(1, 0b11, True)
    for rank in ranks:
        rank.route(1, [0, 1])
    check(works, step(ranks, works))

    def die() -> None:
        ranks[1].exchange.begin_step(6, LONG_MS)
        ranks[1].dispatch(works[1], 0)
        ranks[1].exchange.close()
        wait_until(lambda: host.observer.progress(0) > 6, "the other waits", 20.0)
        host.observer.set_membership(2, 0b11, False)

    results = at_once(lambda: ranks[0].run(works[0], 6), die)
    assert isinstance(results[0], StepAborted)
    assert results[0].generation == 2
    host.observer.set_membership(3, 0b11, True)
    for rank in ranks:
        rank.route(3, [0, 1])
    check(works, step(ranks, works))


def test_a_collective_whose_peer_stays_away_holds_up_nobody_after_its_generation(host: Host) -> None:
    """The peer lives, with its connections, and takes no part: the next generation does not wait for the old group's
    end. A traceback that somebody keeps holds nothing of it, and what the peer would send late comes nowhere where
    another step reads."""
    ranks, works = [Rank(host, "torch_dist", slot) for slot in (0, 1)], [Work(slot, 3) for slot in (0, 1)]
    host.observer.set_membership(1, 0b11, True)
    for rank in ranks:
        rank.route(1, [0, 1])
    check(works, step(ranks, works))
    groups: list[Groups] = [rank.exchange._groups for rank in ranks]  # type: ignore[attr-defined]
    before: torch.Tensor = ranks[0].exchange._own_PH  # type: ignore[attr-defined]

    def stay_away() -> None:
        ranks[1].exchange.begin_step(6, LONG_MS)
        ranks[1].dispatch(works[1], 0)
        met_at = host.observer.progress(0)  # it may have waited until here, too
        wait_until(lambda: host.observer.progress(0) > met_at + 2, "the other waits", 20.0)
        host.observer.set_membership(2, 0b11, False)

    results = at_once(lambda: ranks[0].run(works[0], 6), stay_away)
    assert isinstance(results[0], StepAborted)
    after: torch.Tensor = ranks[0].exchange._own_PH  # type: ignore[attr-defined]
    assert after.data_ptr() != before.data_ptr()
    host.observer.set_membership(3, 0b11, True)
    ranks[0].route(3, [0, 1])
    assert [making.join(0.0) for making in groups[0]._ending] == [False], "it waits for the peer, and nobody for it"
    ranks[1].route(3, [0, 1])
    wait_until(lambda: groups[0]._ending[0].join(0.0), "the peer has given it up too", 20.0)
    check(works, step(ranks, works))
    for rank in ranks:
        rank.exchange.close()
    assert not any(each._ending for each in groups)


def test_a_collective_ends_at_its_deadline_though_its_peer_lives(host: Host) -> None:
    rank, other = Rank(host, "torch_dist", 0), Rank(host, "torch_dist", 1)
    host.observer.set_membership(1, 0b11, True)
    for each in (rank, other):
        each.route(1, [0, 1])
    works = [Work(slot, 3) for slot in (0, 1)]
    check(works, step([rank, other], works))

    def take_part_once() -> None:
        other.exchange.begin_step(6, LONG_MS)
        other.dispatch(works[1], 0)

    results = at_once(lambda: rank.run(works[0], 6, deadline_ms=600.0), take_part_once)
    assert isinstance(results[0], StepTimedOut)
    groups: Groups = rank.exchange._groups  # type: ignore[attr-defined]
    rank.exchange.close()
    assert not groups._ending, "the peer has not given its group up"
    other.exchange.close()


def test_a_group_whose_members_do_not_come_is_waited_for_until_the_steps_deadline(host: Host) -> None:
    rank, other = Rank(host, "torch_dist", 0), Rank(host, "shm", 1)
    host.observer.set_membership(1, 0b11, True)
    rank.route(1, [0, 1])
    other.route(1, [0, 1])
    work = Work(1, 2)

    def meet_only() -> None:
        other.exchange.begin_step(4, LONG_MS)
        with suppress(StepAborted):
            other.dispatch(work, 0)

    def run() -> None:
        try:
            rank.run(work, 4, deadline_ms=600.0)
        finally:
            host.observer.set_membership(2, 0b11, False)

    results = at_once(run, meet_only)
    assert isinstance(results[0], StepTimedOut)
    rank.exchange.close()


def test_mailboxes_are_all_that_rows_pass_through(host: Host) -> None:
    """Nothing of them is in the bus: where they lie is the exchange's choice alone."""
    ranks, works = [Rank(host, "mailbox", slot) for slot in (0, 1)], [Work(slot, 5) for slot in (0, 1)]
    host.observer.set_membership(1, 0b11, True)
    for rank in ranks:
        rank.route(1, [0, 1])
    check(works, step(ranks, works))
    assert works[0].x[1].tobytes() not in host.bytes()
    assert torch.equal(host.mailboxes[0].x_NH[:5], torch.from_numpy(works[0].x))


def test_a_rank_alone_waits_for_the_ids_and_uses_no_mailbox(host: Host) -> None:
    rank, work = Rank(host, "mailbox", 1, QueuedBackend), Work(3, 5)
    host.observer.set_membership(1, 0b10, True)
    rank.route(1, [1])
    check([work], [rank.run(work, work.n)])
    assert host.mailboxes[1].x_NH.isnan().all()
    assert host.mailboxes[1].returned_PH.isnan().all()
    assert isinstance(rank.backend, QueuedBackend)
    assert rank.backend.num_fences == 2 * sum(count > 0 for count in EXPERTS)  # and one for what the test looks at
