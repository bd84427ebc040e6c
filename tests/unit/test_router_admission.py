"""Products of bounded factors: a request is priced before it starts, and the price is what it may really take."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe.common.config import RouterConfig
from elasticmoe.common.protocol.errors import ElasticMoEError, InvalidRequest, Overloaded, Unready
from elasticmoe.common.protocol.router import Delta, Logprob
from elasticmoe.common.transport import Sockets
from elasticmoe.services.router.api.app import build_app
from elasticmoe.services.router.api.front import ANSWERS_MAX, Front, make_front
from elasticmoe.services.router.dispatch.admission import ByteBudget, Permits, Price, check_price, price
from elasticmoe.services.router.dispatch.dispatcher import Dispatcher, router_identity
from elasticmoe.services.router.dispatch.streams import Ending, Stream
from elasticmoe.services.router.history import History
from elasticmoe.services.router.metrics import Metrics
from elasticmoe.services.router.text.tokenizer import ServedModel
from tests.procs.router_harness import write_model
from tests.unit.in_process import InProcess

LIMIT = 64 * 1024
TOP = tuple((97 + number, -0.123456789012345 - number) for number in range(20))


class Rank(Dispatcher):
    """Answers in full and at once, with all alternatives that were asked for; or never."""

    context = 512
    is_slow = False

    def max_model_len(self) -> int:
        return self.context

    def open(self, stream: Stream, now: float) -> None:
        if self.is_slow:
            return
        submit = stream.submit
        told = Logprob(-7.123456789012345, TOP[: max(0, submit.sampling.logprobs)])
        noted = (told,) * (len(submit.prompt) - 1) if submit.prompt_logprobs else None
        for index in range(submit.max_tokens):
            logprobs = (told,) if submit.sampling.logprobs >= 0 else None
            finish = "length" if index + 1 == submit.max_tokens else None
            stream.accept(Delta(submit.request_id, index, (120,), finish, None, logprobs, noted), now)
            noted = None

    def cancel(self, stream: Stream) -> None:
        stream.end(Ending("cancelled", "cancelled"))


def front_of(base: Path, **settings: Any) -> Front:
    if not (base / "model").exists():
        write_model(base / "model")
    config = RouterConfig(run_dir=str(base), model=str(base / "model"), served_name="m", **settings)
    metrics = Metrics("m")
    dispatcher = Rank(Sockets(config.socket), metrics, History(None, "r"), router_identity())
    model = ServedModel(base / "model", "m")
    return make_front(config, model, InProcess(model.codec), dispatcher, metrics, None)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    return front_of(tmp_path_factory.mktemp("r"), answer_bytes_max=LIMIT)


def ask(front: Front, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app=build_app(front))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(path, json=body)

    return asyncio.run(call())


# ---- the price -------------------------------------------------------------------------------------------------------


def test_each_factor_counts() -> None:
    def cost(prompts: list[int], outputs: list[int], n: int = 1, logprobs: int = -1, *, echo: bool = False) -> Price:
        return price(prompts, outputs, num_choices=n, num_logprobs=logprobs, is_echo=echo)

    plain = cost([100], [50])
    assert plain == (50 * 8, 0)  # a plain answer holds nothing
    assert cost([100], [50], n=4).total > 4 * plain.total  # each choice has the prompt once more
    assert cost([100], [50], logprobs=0).held == 50 * 128
    assert cost([100], [50], logprobs=20).held == 21 * 50 * 128
    assert cost([100] * 3, [50] * 3, n=2, logprobs=4, echo=True).held == 6 * (50 * 5 * 128 + 100 * (8 + 5 * 64))
    assert cost([100], [0], echo=True).held == 100 * 8


def test_what_was_seen_to_stop_a_router_is_refused_and_what_harnesses_send_is_not() -> None:
    most = RouterConfig(run_dir="x").answer_bytes_max
    for prompts, n, logprobs, output, is_right in (
        ([2_000] * 16, 8, 20, 4, False),
        ([2_000] * 64, 1, 1, 1, True),  # lm-eval's batches
        ([2_000] * 64, 1, 5, 1, True),
        ([10], 128, -1, 2_000, True),
        ([10], 128, 0, 2_000, True),
        ([10], 128, 20, 2_000, False),
        ([10], 1, 20, 20_000, True),
        ([1_000_000], 1, -1, 48_576, True),
    ):
        outputs = [output] * len(prompts)
        is_echo = len(prompts) > 1
        cost = price(prompts, outputs, num_choices=n, num_logprobs=logprobs, is_echo=is_echo)
        if is_right:
            check_price(prompts, cost, most, num_choices=n, num_logprobs=logprobs, is_echo=is_echo)
            continue
        with pytest.raises(InvalidRequest, match=f"the limit is {most}") as caught:
            check_price(prompts, cost, most, num_choices=n, num_logprobs=logprobs, is_echo=is_echo)
        assert caught.value.code == "answer_too_large"


def test_the_log_probabilities_of_one_prompt_fit_into_a_message() -> None:
    cost = price([30_000], [1], num_choices=1, num_logprobs=5, is_echo=True)
    with pytest.raises(
        InvalidRequest, match="a prompt of 30000 tokens with 6 log probabilities each exceeds the limit"
    ):
        check_price([30_000], cost, 1 << 30, num_choices=1, num_logprobs=5, is_echo=True)
    check_price([30_000], cost, 1 << 30, num_choices=1, num_logprobs=5, is_echo=False)


def test_a_permit_gives_back_all_that_it_holds() -> None:
    permits, budget = Permits(4), ByteBudget(100, "answers")
    with permits.acquire() as permit:
        permit.hold(budget, 60)
        permit.hold(budget, 30)
        with pytest.raises(Overloaded, match="answers hold 90 bytes and 20 more are asked for; the limit is 100"):
            permit.hold(budget, 20)
        assert budget.num_held == 90
    permit.release()
    assert (budget.num_held, permits.num_held) == (0, 0)


# ---- at the door -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    prompts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    n=st.integers(1, 6),
    logprobs=st.none() | st.integers(0, 20),
    max_tokens=st.integers(1, 40),
    echo=st.booleans(),
    is_chat=st.booleans(),
)
def test_no_answer_is_larger_than_its_price(
    front: Front, prompts: list[int], n: int, logprobs: int | None, max_tokens: int, echo: bool, is_chat: bool
) -> None:
    common = {"n": n, "max_tokens": max_tokens}
    if is_chat:
        prompts, echo = [len("Hi") + 3], False
        body = {"messages": [{"role": "user", "content": "Hi"}], **common}
        body |= {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}
        answer = ask(front, "/v1/chat/completions", **body)
    else:
        answer = ask(front, prompt=[[97] * length for length in prompts], logprobs=logprobs, echo=echo, **common)
    num_logprobs = -1 if logprobs is None else logprobs
    cost = price(
        prompts, [max_tokens] * len(prompts), num_choices=n, num_logprobs=num_logprobs, is_echo=echo and not is_chat
    )
    if answer.status_code == 200:
        assert cost.total <= LIMIT
        choices = len(answer.json()["choices"])
        assert choices == n * len(prompts)
        assert len(answer.content) <= cost.total + 400 * choices + 400
    else:
        assert cost.total > LIMIT
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "answer_too_large")
        assert f"{cost.total} bytes" in error["message"]
    assert (front.answers.num_held, front.permits.num_held, front.bodies.num_held) == (0, 0, 0)


def test_the_param_names_the_factor(front: Front) -> None:
    for body, param in (
        ({"logprobs": 20, "n": 30, "max_tokens": 100}, "logprobs"),
        ({"n": 100, "max_tokens": 400}, "n"),
        ({"prompt": ["x"] * 64, "max_tokens": 400}, "max_tokens"),
    ):
        assert ask(front, **({"prompt": "x"} | body)).json()["error"]["param"] == param


def test_answers_under_way_share_a_budget(tmp_path: Path) -> None:
    front = front_of(tmp_path, answer_bytes_max=LIMIT)
    front.dispatcher.is_slow = True  # type: ignore[attr-defined]
    asked = {"prompt": "x", "logprobs": 20, "max_tokens": 20, "stream": True}

    async def run() -> tuple[int, int, str]:
        transport = httpx.ASGITransport(app=build_app(front))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            waiting = [asyncio.create_task(client.post("/v1/completions", json=asked)) for _ in range(2)]
            while front.permits.num_held < 2:
                await asyncio.sleep(0)
            held = front.answers.num_held
            refused = await client.post("/v1/completions", json=asked)
            plain = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 400}))
            while front.permits.num_held < 3:
                await asyncio.sleep(0)
            for task in (*waiting, plain):
                task.cancel()
            await asyncio.gather(*waiting, plain, return_exceptions=True)
        return held, refused.status_code, refused.json()["error"]["message"]

    held, status, message = asyncio.run(run())
    assert held == 2 * 21 * 20 * 128 <= ANSWERS_MAX * LIMIT
    assert (status, front.answers.num_held) == (429, 0)
    assert "answers hold" in message


def test_every_choice_repeats_the_prompt_that_the_first_one_rated(front: Front) -> None:
    asked = {"prompt": [[97, 98, 99], [100, 101]], "n": 3, "echo": True, "logprobs": 2, "max_tokens": 2}
    whole = ask(front, **asked).json()["choices"]
    lines = [json.loads(line[6:]) for line in ask(front, **asked, stream=True).text.splitlines() if "{" in line]
    for index, (text, tokens) in enumerate([("abcxx", "abcxx")] * 3 + [("dexx", "dexx")] * 3):
        choice = whole[index]
        assert (choice["index"], choice["text"], choice["finish_reason"]) == (index, text, "length")
        assert choice["logprobs"]["tokens"] == list(tokens)
        assert choice["logprobs"]["text_offset"] == list(range(len(text)))
        parts = [line["choices"][0] for line in lines if line["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == text
        for name, column in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == column


def test_a_choice_waits_for_the_prompt_that_another_one_rates(tmp_path: Path) -> None:
    front = front_of(tmp_path)
    streams: list[Stream] = []
    front.dispatcher.open = lambda stream, _: streams.append(stream)  # type: ignore[method-assign]
    told = Logprob(-0.5, ())

    async def run(is_stream: bool) -> Any:
        streams.clear()
        asked = {"prompt": "ab", "n": 2, "echo": True, "logprobs": 0, "max_tokens": 1, "stream": is_stream}
        transport = httpx.ASGITransport(app=build_app(front))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            task = asyncio.create_task(client.post("/v1/completions", json=asked))
            while len(streams) < 2:
                await asyncio.sleep(0)
            assert [stream.submit.prompt_logprobs for stream in streams] == [True, False]
            streams[1].accept(Delta("r", 0, (120,), "length", None, (told,)), 1.0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not task.done()
            streams[0].accept(Delta("r", 0, (121,), "length", None, (told,), (told,)), 1.0)
            return await task

    choices = asyncio.run(run(False)).json()["choices"]
    assert [(choice["text"], choice["logprobs"]["tokens"]) for choice in choices] == [
        ("aby", ["a", "b", "y"]),
        ("abx", ["a", "b", "x"]),
    ]
    assert asyncio.run(run(True)).text.count('"text":"ab"') == 2


def test_what_fails_while_others_are_rendered_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_of(tmp_path)
    failed = ElasticMoEError("text", code="rank_lost", retryable=True)
    real = front.dispatcher.open

    def open_or_fail(stream: Stream, now: float) -> None:
        if stream.submit.request_id.endswith("-1"):
            asyncio.get_running_loop().call_soon(lambda: stream.end(Ending("error", failed.code, failed)))
        else:
            real(stream, now)

    monkeypatch.setattr(front.dispatcher, "open", open_or_fail)
    answer = ask(front, prompt="x", n=2, max_tokens=300, logprobs=0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "rank_lost")


# ---- demand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "fill", "num"),
    [
        ("/v1/completions", {"prompt": "x"}, "permits", 1),  # at the gate, before the body is read
        ("/v1/chat/completions", {"messages": []}, "permits", 1),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 3}, "all permits but one", 6),
        ("/v1/completions", {"prompt": ["x", "y"], "n": 3, "logprobs": 2}, "answers", 6),
        ("/v1/completions", {"prompt": "x" * 200_000}, "bodies", 1),
        ("/tokenize", {"prompt": "x"}, "permits", 0),  # asks nothing of a replica
        ("/v1/completions", {"prompt": "x", "max_tokens": 10_000}, "", 0),  # wrong, and no demand
    ],
)
def test_generations_that_are_refused_for_want_of_room_are_demand(
    front: Front, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], fill: str, num: int
) -> None:
    refused: list[int] = []
    monkeypatch.setattr(front.dispatcher.windows, "refused", lambda count=1: refused.append(count))
    held = {
        "permits": (front.permits, front.permits.most),
        "all permits but one": (front.permits, front.permits.most - 1),
        "answers": (front.answers, front.answers.most),
        "bodies": (front.bodies, front.bodies.most),
    }
    if fill:
        monkeypatch.setattr(held[fill][0], "num_held", held[fill][1])
    answer = ask(front, path, **body)
    assert answer.status_code == (429 if fill else 400), answer.text
    assert sum(refused) == num


@pytest.mark.parametrize("refusal", [Overloaded("no turn came"), Unready("no worker")])
@pytest.mark.parametrize(
    ("path", "body", "num"),
    [
        ("/v1/completions", {"prompt": ["x", "y"], "n": 3}, 6),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2}, 2),
        ("/tokenize", {"prompt": "x"}, 0),
    ],
)
def test_generations_whose_texts_nobody_reads_are_demand(
    front: Front, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], num: int, refusal: ElasticMoEError
) -> None:
    refused: list[int] = []
    monkeypatch.setattr(front.dispatcher.windows, "refused", lambda count=1: refused.append(count))

    async def crowded(job: object, client: str) -> Any:
        raise refusal

    monkeypatch.setattr(front.texts, "_inline_chars_max", 0)
    monkeypatch.setattr(front.texts._workers, "run", crowded)
    assert ask(front, path, **body).status_code == refusal.http_status
    assert sum(refused) == num


@pytest.mark.parametrize("num_found", [0, 2])
def test_every_choice_that_finds_no_replica_is_demand(
    front: Front, monkeypatch: pytest.MonkeyPatch, num_found: int
) -> None:
    """Those that found one count as admitted, and are cancelled."""
    refused: list[int] = []
    admitted: list[Stream] = []
    monkeypatch.setattr(front.dispatcher.windows, "refused", lambda count=1: refused.append(count))
    monkeypatch.setattr(front.dispatcher.windows, "admitted", admitted.append)

    def submit(*_: object) -> Any:
        if len(admitted) == num_found:
            raise Unready("no replica")
        return SimpleNamespace(rank="r0t0")

    monkeypatch.setattr(front.dispatcher, "_submit", submit)
    monkeypatch.setattr(front.dispatcher, "open", partial(Dispatcher.open, front.dispatcher))
    answer = ask(front, prompt=["x", "y"], n=3)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert (len(admitted), sum(refused)) == (num_found, 6 - num_found)
    assert all(stream.ending is not None and stream.ending.kind == "cancelled" for stream in admitted)
