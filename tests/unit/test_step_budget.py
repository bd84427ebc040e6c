"""How many tokens a step has: against the best of all sizes, where steps cost what they are said to."""

import random
from math import ceil

import pytest

from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.services.worker.engine.blocks import BlockManager
from elasticmoe.services.worker.engine.budget import (
    BEARABLE_S,
    FIRST_TOKENS,
    FIXED_TOKENS,
    LEAST_TOKENS,
    LONGEST_S,
    StepBudget,
)
from elasticmoe.services.worker.engine.plan import StepPlan
from elasticmoe.services.worker.engine.scheduler import Scheduler

MOST = 2048


def told(fixed_s: float, token_s: float, most: int = MOST, num_replicas: int = 1) -> StepBudget:
    """One that knows what steps cost, up to large ones."""
    budget = StepBudget(most)
    budget.begin(num_replicas)
    budget.note(0, 1, 1, fixed_s)
    budget.note(MOST, MOST, MOST, fixed_s + token_s * MOST)
    return budget


def mean_ttft(prompts: list[int], fixed_s: float, token_s: float, size: int | StepBudget) -> float:
    """When prompts that wait get their first tokens, in the mean, where nobody decodes."""
    left, now, sum_s = list(prompts), 0.0, 0.0
    while left:
        room = size if isinstance(size, int) else size.tokens(left, 0)
        done, total = 0, 0
        while left and total < room:
            taken = min(left[0], room - total)
            total += taken
            left[0] -= taken
            if left[0] == 0:
                done += 1
                left.pop(0)
        now += fixed_s + token_s * total
        sum_s += done * now
    return sum_s / len(prompts)


@pytest.mark.parametrize("seed", range(40))
def test_prompts_that_wait_get_their_first_tokens_about_as_soon_as_with_the_best_size(seed: int) -> None:
    rng = random.Random(seed)
    fixed_s, token_s = rng.uniform(0.002, 0.3), rng.uniform(2e-5, 4e-3)
    length = rng.choice((32, 128, 300, 1000))
    prompts = [rng.randint(length // 2, length * 2) for _ in range(rng.randint(1, 40))]
    ours = mean_ttft(prompts, fixed_s, token_s, told(fixed_s, token_s))
    sizes = [size for size in range(LEAST_TOKENS, MOST + 1, 64) if fixed_s + token_s * size <= LONGEST_S]
    best = min(mean_ttft(prompts, fixed_s, token_s, size) for size in (LEAST_TOKENS, *sizes))
    assert ours <= 1.1 * best


def test_few_prompts_make_small_steps_and_many_large_ones() -> None:
    budget = told(0.1, 0.002)  # a step's fixed part is 50 tokens' worth
    sizes = [budget.tokens([100] * count, 0) for count in (1, 8, 32, 200)]
    assert sizes == sorted(sizes)
    assert sizes[0] == LEAST_TOKENS
    assert sizes[2] == 400  # sqrt(3200 * 50)
    assert budget.tokens([900], 0) == 900  # one alone is not cut


def test_no_step_takes_so_long_that_its_rank_is_taken_for_lost() -> None:
    assert told(0.1, 0.002).tokens([1000], 0) == round((LONGEST_S - 0.1) / 0.002)
    assert told(0.1, 0.002, num_replicas=2).tokens([1000], 0) == round((LONGEST_S - 0.1) / 0.002)  # none else steps
    assert told(3.0, 0.002).tokens([1000], 0) == LEAST_TOKENS
    budget = StepBudget(MOST)
    assert budget.tokens([5000], 0) == FIRST_TOKENS  # while nothing is known
    budget.note(1024, 1024, 1024, LONGEST_S)
    assert budget.tokens([5000], 0) == FIRST_TOKENS
    budget.note(1024, 1024, 1024, 0.3)  # a load without steps that only decode is no reason to stay there
    assert budget.tokens([5000], 0) == MOST


def test_running_streams_bear_so_much_and_have_their_own_tokens_besides() -> None:
    budget = told(0.1, 0.001)
    assert budget.tokens([1000] * 50, 10) == round((BEARABLE_S - 0.1) / 0.001) + 10
    assert told(0.1, 0.1).tokens([1000] * 50, 10) == LEAST_TOKENS + 10  # where one token is too much already
    assert told(2.0, 0.001).tokens([1000] * 50, 10) == LEAST_TOKENS + 10  # or none


def test_streams_of_other_replicas_are_spared_too() -> None:
    budget = told(0.1, 0.001, num_replicas=2)
    assert budget.tokens([1000] * 50, 0) == 1900  # the last step was this one's alone
    budget.note(0, 0, 3, 0.1)  # others run
    assert budget.tokens([1000] * 50, 0) == (BEARABLE_S - 0.1) / 0.001 / 2  # and may have prompts as well
    budget.note(0, 1, 1, 0.1)
    assert budget.tokens([1000] * 50, 0) == 1900


def test_what_steps_take_is_learned_where_many_streams_run_in_several_replicas() -> None:
    budget = StepBudget(MOST)
    budget.begin(3)
    budget.note(0, 60, 175, 0.1)  # the others bring about as much, so no prompts
    budget.note(128, 188, 303, 0.1 + 0.001 * (303 - 175))
    assert budget.tokens([1000] * 50, 60) == ceil(min((BEARABLE_S - 0.1) / 0.001, 2 * 303) / 3) + 60
    other = StepBudget(MOST)
    other.begin(3)
    other.note(0, 60, 400, 9.0)  # somebody has prompts: it says nothing
    other.note(128, 188, 303, 10.0)
    assert other.tokens([1000] * 50, 60) == LEAST_TOKENS + 60


def test_what_is_not_known_yet_costs_streams_nothing() -> None:
    budget = StepBudget(MOST)
    assert budget.tokens([200] * 32, 1) == LEAST_TOKENS + 1
    assert budget.tokens([200] * 32, 0) == 640  # sqrt(6400 * FIXED_TOKENS)
    assert FIXED_TOKENS == 64
    budget.note(200, 200, 200, 5.0)  # says nothing without the fixed part
    assert budget.tokens([200] * 32, 0) == 640


def test_beside_streams_steps_grow_to_what_is_not_far_from_what_is_known() -> None:
    budget = StepBudget(MOST)
    budget.note(0, 1, 1, 0.01)
    sizes, size = [], LEAST_TOKENS
    for _ in range(5):
        budget.note(size, size, size, 0.01 + 1e-6 * size)
        size = budget.tokens([5000], 2)
        sizes.append(size)
    assert sizes == [258, 518, 1038, MOST, MOST]


def test_a_step_that_waited_for_something_does_not_free_the_next_ones() -> None:
    """The fixed part is known too high then, and what a token takes would be nothing."""
    budget = StepBudget(MOST)
    budget.note(0, 8, 8, 0.3)  # its pages came in
    budget.note(128, 136, 136, 0.28)
    assert budget.tokens([5000], 8) == LEAST_TOKENS + 8
    for _ in range(8):
        budget.note(0, 8, 8, 0.02)
    budget.note(128, 136, 136, 0.28)
    assert budget.tokens([5000], 8) < 300  # 2 ms each, half a second in all


def test_steps_that_tell_nothing_change_nothing() -> None:
    budget, same = told(0.1, 0.001), told(0.1, 0.001)
    budget.note(0, 30, 900, 9.0)  # others' prompts
    budget.note(2, 30, 900, 9.0)  # too few tokens of a prompt
    budget.note(0, 1, 1, 0.1)
    same.note(0, 1, 1, 0.1)
    assert budget.tokens([1000] * 50, 1) == same.tokens([1000] * 50, 1)


def test_another_number_of_replicas_is_learned_anew() -> None:
    budget = told(0.1, 0.0001)
    budget.begin(2)
    assert budget.tokens([1000] * 50, 3) == LEAST_TOKENS + 3


def test_after_a_shortage_steps_are_smaller_until_the_ranks_change() -> None:
    budget = told(0.1, 1e-6)
    assert budget.tokens([5000], 0) == MOST
    sizes = []
    while budget.shrink(size := budget.tokens([5000], 0)):
        sizes.append(size)
    assert sizes == [2048, 1024, 512, 256]
    assert budget.tokens([5000], 0) == LEAST_TOKENS
    assert budget.tokens([5000], 300) == LEAST_TOKENS + 300  # streams have their tokens all the same
    assert budget.tokens([], 300) == MOST
    budget.begin(1)  # a shortage ends the generation: the next one knows of it
    assert budget.tokens([5000], 0) == LEAST_TOKENS
    budget.begin(2)
    assert budget.tokens([5000], 0) == FIRST_TOKENS


@pytest.mark.parametrize("most", [1, 16, LEAST_TOKENS])
def test_a_small_limit_is_the_size_of_every_step(most: int) -> None:
    budget = told(0.1, 0.001, most)
    assert budget.is_fixed
    assert budget.tokens([1000] * 50, 10) == most
    assert budget.tokens([], 10) == most


def test_no_step_exceeds_its_limit_and_nobody_who_runs_goes_without() -> None:
    rng = random.Random(3)
    for _ in range(500):
        most = rng.randint(LEAST_TOKENS + 1, MOST)
        budget = told(rng.uniform(0, 1), rng.choice((0.0, rng.uniform(0, 0.01))), most)
        prompts, decoding = [rng.randint(1, 500) for _ in range(rng.randint(0, 20))], rng.randint(0, 64)
        tokens = budget.tokens(prompts, decoding)
        assert min(LEAST_TOKENS + decoding, most) <= tokens <= most


@pytest.mark.parametrize("most", [LEAST_TOKENS, MOST])
def test_replicas_that_catch_up_divide_what_one_may_have(most: int) -> None:
    budget = StepBudget(most)
    budget.begin(3)
    prompts = [200] * 5
    whole = budget.tokens(prompts, 8)
    budget.is_catching_up = True
    assert budget.tokens(prompts, 8) == whole, "none of these was put off"
    budget.put_off = {1}
    assert budget.tokens(prompts, 8) == LEAST_TOKENS // 3 + 8 < whole
    assert budget.tokens([], 8) == most, "nobody waits"
    budget.begin(2 * LEAST_TOKENS)
    assert budget.tokens(prompts, 8) == 1 + 8, "nobody goes without"
    budget.begin(1)
    alone = budget.tokens(prompts, 8)
    budget.is_catching_up = False
    assert budget.tokens(prompts, 8) == alone, "nobody else has prompts that waited"
    budget.begin(3)
    assert budget.tokens(prompts, 8) == whole


def test_prompts_are_divided_while_some_that_were_put_off_are_left() -> None:
    scheduler = Scheduler(
        BlockManager(1000, 16), max_tokens=LEAST_TOKENS, max_sequences=64, max_model_len=4096, max_waiting=100
    )
    scheduler.budget.begin(2)

    def add(name: str, num_tokens: int) -> None:
        prompt = (len(name),) * num_tokens  # no two begin alike
        scheduler.add(Submit(name, prompt, 100, Sampling(seed=1)), b"router:1", 0.0)

    def step(*, is_urgent: bool = False, is_catching_up: bool = True) -> StepPlan:
        scheduler.budget.is_catching_up = is_catching_up and not is_urgent
        plan = scheduler.plan(decode_only=is_urgent)
        scheduler.commit(plan.chunks, [7 for chunk in plan.chunks if chunk.sample])
        return plan

    add("stream", 1)
    step()
    assert not step(is_urgent=True).puts_off
    add("behind", 200)
    plan = step()
    assert (plan.num_prompt, plan.is_cut) == (LEAST_TOKENS - 1, False), "no step has put it off"
    add("put off", 100)
    assert step(is_urgent=True).puts_off
    add("new", 1000)
    plans = [step() for _ in range(4)]  # 73 and 100 tokens were put off
    assert [(plan.num_prompt, plan.is_cut) for plan in plans] == [
        (LEAST_TOKENS // 2, True),
        (LEAST_TOKENS // 2, True),
        (LEAST_TOKENS // 2, True),
        (LEAST_TOKENS - 3, False),
    ]
    assert step(is_urgent=True).puts_off
    assert [step(is_catching_up=is_catching_up).is_cut for is_catching_up in (False, True)] == [False, False]


def test_who_has_no_row_was_not_put_off() -> None:
    scheduler = Scheduler(BlockManager(100, 16), max_tokens=16, max_sequences=1, max_model_len=64, max_waiting=9)
    for name in ("runs", "waits"):
        scheduler.add(Submit(name, (1,), 9, Sampling(seed=1)), b"router:1", 0.0)
    assert scheduler.plan(decode_only=True).puts_off
    plan = scheduler.plan()
    scheduler.commit(plan.chunks, [7])
    assert not scheduler.plan(decode_only=True).puts_off


def test_who_was_put_off_and_waits_for_a_row_still_comes_a_few_tokens_at_a_time() -> None:
    scheduler = Scheduler(
        BlockManager(1000, 16), max_tokens=LEAST_TOKENS, max_sequences=1, max_model_len=4096, max_waiting=9
    )
    scheduler.budget.begin(2)
    first, _ = (
        scheduler.add(Submit(f"r{token}", (token,) * 100, 9, Sampling(seed=1)), b"router:1", 0.0) for token in (1, 2)
    )
    assert scheduler.plan(decode_only=True).puts_off
    scheduler.budget.is_catching_up = True

    def step() -> tuple[int, bool]:
        plan = scheduler.plan()
        scheduler.commit(plan.chunks, [7 for chunk in plan.chunks if chunk.sample])
        return plan.num_prompt, plan.is_cut

    assert [step(), step()] == [(LEAST_TOKENS // 2, True), (100 - LEAST_TOKENS // 2, True)]
    assert not scheduler.plan(decode_only=True).puts_off, "it is for want of a row that the second one waits"
    scheduler.remove(first)
    assert [step(), step()] == [(LEAST_TOKENS // 2, True), (100 - LEAST_TOKENS // 2, True)]


def test_the_scheduler_asks_it() -> None:
    scheduler = Scheduler(
        BlockManager(1000, 16), max_tokens=MOST, max_sequences=64, max_model_len=4096, max_waiting=100
    )
    for number in range(32):
        request = Submit(f"r{number}", tuple(range(200)), 10, Sampling(seed=1))
        scheduler.add(request, b"router:1", 0.0)
    plan = scheduler.plan()
    assert plan.num_tokens == plan.num_prompt == 640
    scheduler.commit(plan.chunks, [7 for chunk in plan.chunks if chunk.sample])
    plan = scheduler.plan()  # three decode now
    assert [chunk.num_tokens for chunk in plan.chunks[:4]] == [1, 1, 1, LEAST_TOKENS]
    assert plan.num_prompt == LEAST_TOKENS
    assert scheduler.plan(decode_only=True).num_tokens == 3
