"""The loops of leaders and followers: what one plans the others compute, whatever happens in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elasticmoe.cli.models import random_checkpoint
from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.layout import RankId
from elasticmoe.common.protocol import peer, router, signals
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.ids import CommandId
from elasticmoe.common.protocol.rank import (
    CancelMigration,
    Drain,
    GetRankIntegrity,
    GetRankLoad,
    MoveTarget,
    Reserve,
    Sampling,
    Submit,
    Unreserve,
    Unwatch,
    Watch,
)
from elasticmoe.common.protocol.scaler import Integrity
from elasticmoe.common.protocol.signals import RankWindow
from elasticmoe.services.worker.exchange.base import StepAborted
from elasticmoe.services.worker.exchange.board import ReplicaBoard, ReplicaPlan
from elasticmoe.services.worker.exchange.shm_board import ShmBoard
from elasticmoe.services.worker.model.batch import Batch, BatchPart
from elasticmoe.services.worker.rank.follower import FAILED_MAX, Follower
from elasticmoe.services.worker.rank.rank import Rank
from tests.oracle import next_tokens
from tests.procs.greedy import OUTPUT_TOKENS, greedy
from tests.procs.waiting import wait_until
from tests.unit.exchanges import Host
from tests.unit.ranks import NUM_BLOCKS
from tests.unit.replicas import SECONDS_MAX, Replicas
from tests.unit.test_model_parity import CONFIGS
from tests.unit.windows import Pushed

LONG = 90


def submit_some(replicas: Replicas, count: int, max_tokens: int, seed: int = 1) -> dict[str, list[int]]:
    """Requests for all replicas in turns: their prompts."""
    rng = random.Random(seed)
    prompts = {f"r{n}": [rng.randrange(256) for _ in range(rng.choice((1, 9, 33)))] for n in range(count)}
    num_replicas = len(replicas.loops) // 2
    for number, (name, prompt) in enumerate(prompts.items()):
        replicas.submit(number % num_replicas, name, prompt, max_tokens)
    return prompts


def check_exact(replicas: Replicas, directory: Path, prompts: dict[str, list[int]], max_tokens: int) -> None:
    """What the router has heard, and what the ranks say of themselves."""
    for name, prompt in prompts.items():
        assert replicas.finish[name] == "length"
        assert replicas.tokens[name] == next_tokens(directory, prompt, max_tokens)
    for slot in range(len(replicas.loops)):
        answer = replicas.ask(slot, GetRankIntegrity())
        assert isinstance(answer, Integrity)
        assert answer.findings == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "size"), [("mixtral", 2), ("olmoe", 1), ("deepseek3", 1)])
def test_greedy_tokens_are_those_of_transformers(name: str, size: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    directory = random_checkpoint(tmp_path / name, CONFIGS[name], seed=3, dtype="float32")
    with Replicas(directory, tmp_path, size) as replicas:
        prompts = submit_some(replicas, 4, OUTPUT_TOKENS)
        replicas.wait_finished()
    assert replicas.tokens == dict(zip(prompts, greedy(directory, list(prompts.values())), strict=True))


def test_blocks_move_on_all_ranks_and_all_follow_the_one_that_has_least(directory: Path, tmp_path: Path) -> None:
    """To and fro, with the ranks of a replica asked in any order, while sequences go on."""
    rng = random.Random(5)
    with Replicas(directory, tmp_path, 1) as replicas:
        prompts = submit_some(replicas, 4, LONG)
        kvs = [weights.kv for weights in replicas.ranks.weights]
        blocks = replicas.engine(0).scheduler.blocks
        for num_blocks in (60, NUM_BLOCKS, 58, 64, 59, NUM_BLOCKS):
            for at in rng.sample(range(2), 2):
                replicas.memories[at].goal = num_blocks
            done = lambda wanted=num_blocks: [kv.num_blocks for kv in kvs] == [wanted] * 2  # noqa: E731
            replicas.wait(lambda done=done: done() or replicas.finish, "KV of another size")
        replicas.wait_finished()
        replicas.wait(lambda: blocks.num_blocks == NUM_BLOCKS, "all of the KV in use")
        check_exact(replicas, directory, prompts, LONG)


def test_sequences_are_moved_to_other_blocks_and_not_computed_again(directory: Path, tmp_path: Path) -> None:
    with Replicas(directory, tmp_path, 1) as replicas:
        prompts = {"goes": [1] * 33, "stays": [2] * 33}
        for (name, prompt), count in zip(prompts.items(), (LONG - 30, LONG), strict=True):
            replicas.submit(0, name, prompt, count)
        scheduler = replicas.engine(0).scheduler
        moved: list[int] = []
        relocated = scheduler.blocks.replace

        def replace(old: int, new: int) -> None:
            moved.append(old)
            relocated(old, new)

        scheduler.blocks.replace = replace  # type: ignore[method-assign]
        model, has_gone, may_go_on = replicas.ranks.models[0], threading.Event(), threading.Event()
        compute, numbers = model.forward, [0]

        def forward(batch: Batch, exchange: Any) -> Any:
            """One is to be there still when there is less room for it."""
            numbers.append(len(scheduler.sequences()))
            if max(numbers) > numbers[-1]:
                has_gone.set()
                assert may_go_on.wait(SECONDS_MAX)
            return compute(batch, exchange)

        model.forward = forward  # type: ignore[method-assign]
        assert has_gone.wait(SECONDS_MAX)
        for memory in replicas.memories:
            memory.goal = 40
        may_go_on.set()
        replicas.wait(lambda: not any(memory.goal for memory in replicas.memories), "less KV")
        replicas.wait_finished()
        assert scheduler.recomputed == 0
        check_exact(replicas, directory, {"stays": prompts["stays"]}, LONG)
    assert len(moved) >= 3
    assert min(moved) >= 40


def fail_some(model: Any, numbers: set[int], error: Callable[[], BaseException]) -> None:
    """Let a model raise in the forward passes with these numbers, in the midst of a layer's exchange."""
    real, count = model.forward, [0]

    def forward(batch: Batch, exchange: Any) -> Any:
        count[0] += 1
        if count[0] in numbers:
            raise error()
        return real(batch, exchange)

    model.forward = forward


# Of two steps in a row without memory the second one costs the largest request.
@pytest.mark.parametrize(("error", "numbers"), [(ValueError, {3, 11, 12}), (MemoryError, {3, 11, 19})])
def test_a_step_that_fails_on_a_follower_is_repeated_by_all(
    directory: Path, tmp_path: Path, error: type[Exception], numbers: set[int]
) -> None:
    with Replicas(directory, tmp_path, 2) as replicas:
        fail_some(replicas.ranks.models[1], numbers, lambda: error("no"))
        prompts = submit_some(replicas, 4, 24)
        replicas.wait_finished()
        check_exact(replicas, directory, prompts, 24)
        assert replicas.num_ended == 3


def test_what_failed_steps_were_to_compute_is_not_told_as_done(directory: Path, tmp_path: Path) -> None:
    with Replicas(directory, tmp_path, 2) as replicas:
        told = [Pushed(), Pushed()]
        leaders = [replicas.loops[0], replicas.loops[2]]
        for leader, pushed in zip(leaders, told, strict=True):
            assert isinstance(leader, Rank)
            leader._windows.close()
            leader._windows._end = pushed
        fail_some(replicas.ranks.models[1], {3, 5, 9, 11, 12, 15}, lambda: ValueError("no"))
        prompts = submit_some(replicas, 4, 24)
        replicas.wait_finished()
        check_exact(replicas, directory, prompts, 24)
        left = sum(leader._windows._num_tokens for leader in leaders if isinstance(leader, Rank))
        windows = [window for pushed in told for window in pushed.windows if isinstance(window, RankWindow)]
        assert left + sum(window.generated for window in windows) == 4 * 24
        assert replicas.num_ended == 6


@pytest.mark.parametrize("slot", [1, 2, 3], ids=["a follower", "another leader", "its follower"])
def test_a_step_too_large_for_a_rank_is_planned_without_what_is_largest(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot: int
) -> None:
    """Nobody is tried for it, and what is small goes on, also beside the rank that lacks memory."""
    with Replicas(directory, tmp_path, 2) as replicas:
        schedulers = [replicas.engine(replica).scheduler for replica in range(2)]
        struck: list[object] = []
        for scheduler in schedulers:
            monkeypatch.setattr(scheduler, "note_trial", lambda _, trial: struck.extend([trial] * trial.failures))
        totals: list[int] = []
        exchange, real = replicas.ranks.exchanges[slot], replicas.ranks.models[slot].forward
        begin = exchange.begin_step
        monkeypatch.setattr(exchange, "begin_step", lambda total, ms: (totals.append(total), begin(total, ms))[1])

        def forward(batch: Batch, exchange: Any) -> Any:
            if totals[-1] > 12:
                raise MemoryError
            return real(batch, exchange)

        replicas.ranks.models[slot].forward = forward
        prompts = {name: [at, at + 1, at + 2] for at, name in enumerate(("a", "b"))}
        for at, (name, prompt) in enumerate(prompts.items()):
            replicas.submit(at % 2, name, prompt, 24)
        replicas.submit(0, "large", [5] * 150, 4)
        replicas.wait_finished()
        assert list(replicas.failed) == ["large"]
        assert (replicas.failed["large"].code, replicas.failed["large"].retryable) == ("out_of_memory", True)
        check_exact(replicas, directory, prompts, 24)
        assert struck == []
        assert 2 <= replicas.num_ended <= 12  # a few steps lie between; it is not tried again and again


def test_a_rank_that_wakes_up_after_another_had_no_memory_leaves_out_what_is_largest(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has come to the step and sees that all have met only once the generation has ended. Otherwise the other one's
    request would be ended for it, which is small."""
    with Replicas(directory, tmp_path, 2) as replicas:
        loop, failing, totals = replicas.loops[0], replicas.ranks.models[2], list[int]()
        exchange = replicas.ranks.exchanges[2]
        begin = exchange.begin_step
        monkeypatch.setattr(exchange, "begin_step", lambda total, ms: (totals.append(total), begin(total, ms))[1])
        assert isinstance(loop, Rank)
        barrier: Any = loop._lockstep._barrier
        arrive, compute = barrier.arrive, failing.forward

        def arrive_late(generation: int, *given: Any) -> Any:
            said = arrive(generation, *given)
            if sum(tokens for _, tokens, _ in said) > 12:
                wait_until(lambda: barrier.membership().generation != generation, "the generation has ended")
                raise StepAborted(barrier.membership().generation)
            return said

        def forward(batch: Batch, exchange: Any) -> Any:
            if totals[-1] > 12:
                raise MemoryError
            return compute(batch, exchange)

        barrier.arrive, failing.forward = arrive_late, forward  # type: ignore[method-assign]
        replicas.submit(1, "small", [1, 2, 3], 24)
        replicas.submit(0, "large", [5] * 150, 4)
        replicas.wait_finished()
        assert list(replicas.failed) == ["large"]
        assert replicas.failed["large"].code == "out_of_memory"
        check_exact(replicas, directory, {"small": [1, 2, 3]}, 24)


def test_a_follower_that_fails_again_and_again_ends(directory: Path, tmp_path: Path) -> None:
    with Replicas(directory, tmp_path, 1) as replicas:
        follower = replicas.loops[1]
        assert isinstance(follower, Follower)
        fail_some(replicas.ranks.models[1], set(range(1, 100)), lambda: ValueError("broken"))
        replicas.submit(0, "r", [1, 2, 3], 4)
        replicas._threads[1].join(60)
        assert [str(end) for end in replicas.ends] == ["broken"]
        assert follower._num_failed == FAILED_MAX + 1 or "r" in replicas.failed


def test_a_request_whose_part_in_a_plan_cannot_be_told_ends_alone(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus has no room for it: the leader lives on, and the others' tokens are as ever."""
    monkeypatch.setattr("tests.unit.ranks.PLAN_BYTES", 220)  # two small ones take 172, the large one 260
    with Replicas(directory, tmp_path, 1) as replicas:
        prompts = {name: [at, at + 1, at + 2] * 3 for at, name in enumerate(("one", "other"))}
        for name, prompt in prompts.items():
            replicas.submit(0, name, prompt, 12)
        replicas.submit(0, "large", [5] * 150, 4)
        replicas.wait_finished()
        assert list(replicas.failed) == ["large"]
        assert "while it computed this request alone" in replicas.failed["large"].message
        check_exact(replicas, directory, prompts, 12)
        assert replicas.num_ended == 0, "nobody has to meet for that"


def test_a_follower_has_no_requests_and_leaves_with_its_replica(directory: Path, tmp_path: Path) -> None:
    command, targets = CommandId("op", 1, 1, "drain"), (MoveTarget(RankId(0, 1), 1),)
    with Replicas(directory, tmp_path, 2) as replicas:
        load = replicas.ask(3, GetRankLoad())
        assert (load.rank, load.running, load.waiting, load.is_leaving) == (RankId(1, 1), 0, 0, False)
        assert load.blocks_total == NUM_BLOCKS
        with pytest.raises(ElasticMoEError, match="r1t1 has no requests"):
            replicas.ask(3, Unreserve("r", b"router:1"))
        client = replicas._sockets.connect("rank-r1t1", "router:1", router.CODEC)
        client.send(Submit("r", (1, 2), 3, Sampling(seed=1)))
        answer = client.receive(20_000)
        client.close()
        assert answer is not None
        assert "has no requests" in answer.body.message
        replicas.ask(3, Drain(command, targets))
        assert replicas.ask(3, GetRankLoad()).is_leaving
        replicas.ask(3, CancelMigration(command))
        assert not replicas.ask(3, GetRankLoad()).is_leaving
        replicas.ask(3, Drain(command, targets))
        ranks = replicas.ranks
        ranks._observer.set_membership(ranks._generation + 1, 0b0011, True)  # a layout without its replica
        replicas.wait(lambda: replicas.loops[3].is_stopping, "the follower to leave")
        assert not replicas.loops[2].is_stopping, "a leader is told itself"


def test_a_leader_leaves_when_routers_know_where_its_requests_went(directory: Path, tmp_path: Path) -> None:
    """Also one that has not connected yet: the request came and went in between, and would be taken for lost."""
    replicas, moved = Replicas(directory, tmp_path, 2), router.Moved("r", RankId(0, 0), "rank-r0t0:1")
    leader: Any = replicas.loops[2]
    leader._reports.expect([b"router:9"], SYSTEM_CLOCK.monotonic())
    leader._reports.tell(b"router:9", moved)
    with replicas:
        replicas.ask(2, Drain(CommandId("op", 1, 1, "drain"), (MoveTarget(RankId(0, 0), 0),)))
        ranks = replicas.ranks
        ranks._observer.set_membership(ranks._generation + 1, 0b0011, True)  # a layout without its replica
        replicas.wait(lambda: not leader._lockstep.is_member, "the leader to see that")
        for _ in range(3):
            assert replicas.ask(2, GetRankLoad()).is_leaving
        assert not leader.is_stopping
        client = replicas._sockets.connect("rank-r1t0", "router:9", router.CODEC)
        client.send(Watch())
        while (answer := client.receive(20_000)) is not None and answer.body != moved:
            pass
        assert answer is not None
        assert not leader.is_stopping
        client.send(Unwatch())
        replicas.wait(lambda: leader.is_stopping, "the leader to leave")
        client.close()


def test_a_follower_tells_how_often_its_own_experts_were_routed_to(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elasticmoe.services.worker.rank.windows.EXPERTS_EVERY_S", 0.05)
    heard: list[RankWindow] = []
    with Replicas(directory, tmp_path, 1) as replicas:
        layout = replicas.ranks.layout
        scaler = replicas._sockets.take_over("signals", "scaler:1", signals.CODEC)

        def has_heard() -> bool:
            while (received := scaler.receive()) is not None:
                if isinstance(window := received[1].body, RankWindow) and window.rank.tp:
                    heard.append(window)
            if len(replicas.finish) == len(replicas.tokens):  # a window may be lost: there are others after it
                replicas.submit(0, f"r{len(replicas.tokens)}", [1, 2, 3], LONG)
            return any(window.expert_rows for window in heard)

        replicas.wait(has_heard, "the follower's window")
        scaler.close()
    width = max(len(homes) for homes in layout.homes)
    for place in (place for window in heard for place, _ in window.expert_rows):
        layer, expert = divmod(place, width)
        assert layout.owners(layer)[expert] == 1
    assert {window.incarnation for window in heard} == {f"rank-r0t1:{2:016x}"}


def test_no_place_is_kept_while_a_follower_may_be_in_a_step_that_was_given_up(directory: Path, tmp_path: Path) -> None:
    """What is free at the leader it may still write to, and the HMM would, too."""
    place = Reserve("r", b"router:1", tuple(range(20)), 6)
    with Replicas(directory, tmp_path, 1) as replicas:
        replicas.submit(0, "first", [1, 2, 3], 4)
        replicas.wait_finished()
        lockstep = replicas.loops[0]._lockstep
        replicas.wait(lambda: not lockstep.is_awake, "nobody steps any more")
        lockstep.is_settled = False  # as its `abort` leaves it
        with pytest.raises(ElasticMoEError, match="have not met since a step was given up"):
            replicas.ask(0, place)
        replicas.submit(0, "second", [1, 2, 3], 4)
        replicas.wait_finished()
        assert len(replicas.ask(0, place, peer.CODEC).blocks) == 6


# ---- what is on the bus ---------------------------------------------------------------------------------------------


@pytest.fixture
def boards() -> tuple[Host, ReplicaBoard, ReplicaBoard]:
    """Of a leader and a follower."""
    host = Host((2, 4, 8, 1), 8, 400)
    host.observer.set_membership(1, 0b11, True)
    buses = [host.join(slot) for slot in range(2)]
    for bus in buses:
        bus.set_replica((0, 1))
    first, second = (ShmBoard(bus, (0, 1)) for bus in buses)
    return host, first, second


def test_a_plan_is_what_was_written_or_none(boards: tuple[Host, ReplicaBoard, ReplicaBoard]) -> None:
    host, leader, follower = boards
    parts = [BatchPart([5, 6, 7], 3, [9, 8], 2), BatchPart([1], 0, [4], 0)]
    for plan in (ReplicaPlan((), Batch([], 4)), ReplicaPlan(((7, 1), (6, 2)), Batch(parts, 4))):
        leader.write(plan)
        moves, batch = follower.read(1)
        assert moves == plan.moves
        for name in Batch.__slots__:
            assert getattr(batch, name) == getattr(plan.batch, name)
    with pytest.raises(ValueError, match="the bus has room for 400"):
        leader.write(ReplicaPlan((), Batch([BatchPart([1] * 100, 0, list(range(25)), 0)], 4)))
    for wrong in (b"", b"\1\0\0\0", leader_bytes(plan)[:-4], leader_bytes(plan) + b"\0\0\0\0"):
        leader._bus.write_plan(wrong)
        with pytest.raises(ValueError, match=r"a plan of|a batch of"):
            follower.read(1)
    host.observer.set_membership(2, 0b11, True)
    with pytest.raises(StepAborted):
        follower.read(1)


def leader_bytes(plan: ReplicaPlan) -> bytes:
    """A plan without moves, as it is on the bus."""
    return bytes(4) + plan.batch.encode()


def test_of_words_that_cross_one_is_taken_back(boards: tuple[Host, ReplicaBoard, ReplicaBoard]) -> None:
    """Whatever the two do at the same time, the leader never gives out what the follower has not mapped."""
    _, leader, follower = boards
    follower.tell_blocks(10)
    leader.tell_blocks(5)
    in_use, mapped, is_over = 5, 10, threading.Event()
    lock, wrong = threading.Lock(), []

    def look() -> None:
        with lock:
            if in_use > mapped:
                wrong.append((in_use, mapped))

    def lead() -> None:
        nonlocal in_use
        while not is_over.is_set():
            leader.tell_blocks(10)
            if leader.blocks_of_followers < 10:
                leader.tell_blocks(5)
                continue
            in_use = 10
            look()
            in_use = 5
            leader.tell_blocks(5)

    thread = threading.Thread(target=lead)
    thread.start()
    for _ in range(20_000):
        if follower.blocks_of_leader > 5:
            continue
        follower.tell_blocks(5)
        if follower.blocks_of_leader > 5:
            follower.tell_blocks(10)
            continue
        mapped = 5
        look()
        mapped = 10
        follower.tell_blocks(10)
    is_over.set()
    thread.join()
    assert wrong == []
