"""A real router process whose replicas hand streams over to each other, come and leave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.procs.router_fakes import WAIT_S, Reply, layout_of
from tests.procs.router_harness import RouterProcess, ranks_of, running_router
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
TEXT = bytes(97 + index % 26 for index in range(400))


@pytest.fixture
def router(tmp_path: Path) -> Iterator[RouterProcess]:
    with running_router(tmp_path, requests_max=32) as process:
        yield process


class Client(threading.Thread):
    """One request whose answer is read in a thread."""

    def __init__(self, router: RouterProcess) -> None:
        super().__init__(daemon=True)
        self.router = router
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = self.router.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 450})

    def text(self) -> str:
        self.join(WAIT_S)
        assert self.answer is not None, "no answer came"
        assert self.answer.status_code == 200, self.answer.text
        choice = self.answer.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        return str(choice["text"])


def test_a_replica_leaves_and_comes_back_and_no_token_is_lost(router: RouterProcess) -> None:
    hurry = threading.Event()
    with ranks_of(router, 0, 1) as ranks:
        for rank in ranks:
            rank.answer = Reply(TEXT, slow_after=20, hurry=hurry)
        router.wait_ready(1)
        clients = [Client(router) for _ in range(4)]
        for _ in clients:
            ranks[0].seen.submit()
        router.set_layout(layout_of(0, 1, epoch=2))
        router.wait_ready(2)
        assert ranks[1].is_watched.wait(WAIT_S)
        ranks[0].hand_over(ranks[1])
        wait_until(lambda: router.metric("elasticmoe:moved_requests_total") == 4, "the router follows")
        hurry.set()
        router.set_layout(layout_of(1, epoch=3))
        assert ranks[0].seen.unwatched.wait(WAIT_S)
        assert [client.text().encode() for client in clients] == [TEXT] * 4
        assert router.metric("elasticmoe:epoch") == 3
        assert router.history(is_running=True).num_moves == 4
        router.set_layout(layout_of(0, 1, epoch=4))
        router.wait_ready(2)
        assert not ranks[0].seen.unwatched.is_set()


def test_a_client_that_leaves_frees_the_rank_that_took_its_stream_over(router: RouterProcess) -> None:
    router.set_layout(layout_of(0, epoch=2))
    with ranks_of(router, 0, 7) as ranks:
        ranks[0].answer = Reply(finish=None, slow_after=20)
        router.wait_ready(1)
        ranks[1].is_muted.set()  # so that the news comes from the first one
        body = {"prompt": "x", "max_tokens": 500, "stream": True}
        with router.http.stream("POST", "/v1/completions", json=body) as response:
            submit = ranks[0].seen.submit()
            chunks = response.iter_bytes()  # kept: the response ends with its iterator
            next(chunks)
            ranks[0].hand_over(ranks[1])
            assert ranks[1].is_watched.wait(WAIT_S)
        assert ranks[1].seen.cancel() == submit.request_id
        assert ranks[1].seen.unwatched.wait(WAIT_S)
        assert ranks[0].seen.cancels.empty()
        router.wait_idle()


def test_requests_avoid_a_replica_that_leaves(router: RouterProcess) -> None:
    router.set_layout(layout_of(0, 1, epoch=2))
    with ranks_of(router, 0, 1) as ranks:
        router.wait_ready(2)
        ranks[0].is_leaving = True
        ranks[0].say(ranks[0].status(1))
        ranks[1].answer = Reply(TEXT)
        wait_until(lambda: Client(router).text().encode() == TEXT, "the news arrived")
        assert [Client(router).text().encode() for _ in range(5)] == [TEXT] * 5
