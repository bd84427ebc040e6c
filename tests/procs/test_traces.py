"""A real router process that traces, in front of scripted ranks: what its collector gets, and that nobody waits for one
that is down, hangs or fails. Whole deployments: test_observability.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticmoe.common.protocol.router import RankTimes
from tests.procs.collector import Collector, Manner, collecting
from tests.procs.router_fakes import WAIT_S, Reply, layout_of
from tests.procs.router_harness import RouterProcess, ranks_of, running_router, serving
from tests.procs.waiting import free_port, wait_until

pytestmark = pytest.mark.procs
TRACE, CALLER = "ab" * 16, "cd" * 8
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def router(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    with running_router(tmp_path_factory.mktemp("router"), 0, otlp_endpoint=collector.url, requests_max=32) as router:
        yield router


def ask(router: RouterProcess, request_id: str, *headers: tuple[str, str], **body: Any) -> httpx.Response:
    fields = [("x-request-id", request_id), *headers]
    return router.http.post(PATH, json={"prompt": "abc", **body}, headers=fields)


def test_a_request_is_one_trace(router: RouterProcess, collector: Collector) -> None:
    with serving(router) as rank:
        rank.answer = Reply(b"Hello!", after=(go := threading.Event()))
        answers: list[httpx.Response] = []
        client = threading.Thread(target=lambda: answers.append(ask(router, "one", max_tokens=20, temperature=0.5)))
        client.start()
        submit = rank.seen.submit()
        assert submit.origin is not None
        rank.say(RankTimes(submit.request_id, 0.0001, 0.0002, 2, 0))
        rank.say(RankTimes("unknown", 1.0, 1.0, 0, 0))
        go.set()
        client.join(WAIT_S)
        assert answers[0].json()["choices"][0]["text"] == "Hello!"
    root = collector.request("one")
    assert (root.name, root.service, root.is_server, root.parent_id) == (f"POST {PATH}", "elasticmoe-router", True, "")
    assert root.facts | {"http.response.status_code": 200, "gen_ai.request.model": "tiny"} == root.facts
    assert submit.origin.traceparent == f"00-{root.trace_id}-{root.span_id}-01"
    assert submit.origin.request_id == "one"
    spans = collector.within(root)
    assert sorted(spans) == ["decode", "generate", "prefill", "queue", "tokenize"]
    (generate,) = spans["generate"]
    assert generate.events == ("first_token",)
    assert (generate.parent_id, generate.error) == (root.span_id, "")
    told = {
        "elasticmoe.stream": submit.request_id,
        "elasticmoe.choice": 0,
        "elasticmoe.rank": "r0t0",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ["stop"],
    }
    assert generate.facts | told == generate.facts
    assert spans["prefill"][0].facts["elasticmoe.cached_tokens"] == 2
    assert {spans[name][0].parent_id for name in ("queue", "prefill", "decode")} == {generate.span_id}
    assert spans["queue"][0].ended == spans["prefill"][0].began


def test_every_choice_has_its_spans_and_a_refusal_its_code(router: RouterProcess, collector: Collector) -> None:
    with serving(router) as rank:
        assert ask(router, "three", n=3).status_code == 200
        assert ask(router, "wrong", max_tokens=-1).status_code == 400
        rank.answer = Reply(fail=("no_such_code", "something", False))
        assert ask(router, "broken").status_code == 500
    spans = collector.within(collector.request("three"))
    assert sorted(span.facts["elasticmoe.choice"] for span in spans["generate"]) == [0, 1, 2]
    wrong = collector.request("wrong")
    assert (wrong.facts["http.response.status_code"], wrong.error) == (400, "")
    broken = collector.request("broken")
    assert (broken.facts["http.response.status_code"], broken.error) == (500, "500")
    assert collector.within(broken)["generate"][0].error == "no_such_code"


def test_a_callers_trace_goes_on(router: RouterProcess, collector: Collector) -> None:
    with serving(router) as rank:
        ask(router, "mine", ("traceparent", f"00-{TRACE}-{CALLER}-01"), ("tracestate", "a=1"))
        ask(router, "unrecorded", ("traceparent", f"00-{TRACE}-{CALLER}-00"))
        first, second = rank.seen.submit(), rank.seen.submit()
        assert first.origin is not None
        assert second.origin is not None
        assert first.origin.traceparent.startswith(f"00-{TRACE}-")
        assert second.origin.traceparent == ""
        for name, bad in (
            ("zero", f"00-{'0' * 32}-{CALLER}-01"),
            ("version", f"ff-{TRACE}-{CALLER}-01"),
            ("short", f"00-{TRACE[:-1]}-{CALLER}-01"),
            ("long", f"00-{TRACE}-{CALLER}-01-" + "x" * 4_000),
            ("words", "a trace"),
        ):
            assert ask(router, name, ("traceparent", bad)).status_code == 200
            root = collector.request(name)
            assert (root.parent_id, root.trace_id == TRACE) == ("", False), name
        ask(router, "twice", ("traceparent", f"00-{TRACE}-{CALLER}-01"), ("traceparent", f"00-{TRACE}-{CALLER}-01"))
        assert collector.request("twice").trace_id != TRACE
    root = collector.request("mine")
    assert (root.trace_id, root.parent_id) == (TRACE, CALLER)
    assert not any(span.facts.get("elasticmoe.request_id") == "unrecorded" for span in collector.spans)


def test_moves_and_recoveries_are_spans(router: RouterProcess, collector: Collector) -> None:
    router.set_layout(layout_of(0, 1, epoch=2))
    hurry = threading.Event()
    with ranks_of(router, 0, 1) as ranks:
        for rank in ranks:
            rank.answer = Reply(bytes(97 + index % 26 for index in range(400)), slow_after=30, hurry=hurry)
        router.wait_ready(2)
        num_before = router.metric("vllm:generation_tokens_total")
        client = threading.Thread(target=lambda: ask(router, "moves", max_tokens=450))
        client.start()
        wait_until(lambda: router.metric("vllm:generation_tokens_total") > num_before + 20, "tokens have come")
        first = next(rank for rank in ranks if not rank.seen.submits.empty())
        other = next(rank for rank in ranks if rank is not first)
        first.hand_over(other)
        wait_until(lambda: router.metric("elasticmoe:moved_requests_total") == 1, "the router follows")
        other.stop()
        other.start()  # another process in its seat, which has nothing: it is submitted anew
        hurry.set()
        client.join(WAIT_S)
    spans = collector.within(collector.request("moves"))
    (generate,), (move,), (recovery,) = spans["generate"], spans["move"], spans["recovery"]
    assert (move.facts["elasticmoe.from"], move.facts["elasticmoe.to"]) == (str(first.rank), str(other.rank))
    assert (recovery.facts["elasticmoe.how"], recovery.facts["error.type"]) == ("resubmitted", "rank_lost")
    assert (generate.facts["elasticmoe.moves"], generate.facts["elasticmoe.recoveries"]) == (1, 1)
    assert generate.facts["gen_ai.usage.output_tokens"] == 400
    assert move.ended <= recovery.ended


@pytest.mark.parametrize("manner", ["fails", "hangs", "is down"])
def test_a_collector_that_does_not_take_costs_nothing(manner: Manner, tmp_path: Path) -> None:
    """Requests are served meanwhile, what is lost is counted, it is said once, and the end is not held up."""
    with collecting("takes" if manner == "is down" else manner) as collector:
        url = f"http://127.0.0.1:{free_port()}" if manner == "is down" else collector.url
        with running_router(tmp_path, 0, otlp_endpoint=url) as router:
            with serving(router):
                for number in range(40):
                    assert ask(router, f"{number}").status_code == 200
                wait_until(lambda: router.metric("elasticmoe:spans_lost_total") >= 64, "a batch is lost")
                for number in range(40):
                    assert ask(router, f"again {number}").status_code == 200
            assert router.log_text.count("traces are not taken") == 1
        assert collector.spans == []
