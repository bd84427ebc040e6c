"""Texts that are too long, templates that do not end: they cost their own request, and nobody else's."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.procs.router_fakes import FakeRank, layout_of
from tests.procs.router_harness import (
    MODEL,
    RouterProcess,
    StartRouter,
    configure,
    error_of,
    plain_client,
    serving,
    write_model,
)
from tests.procs.test_text_workers import rss_of
from tests.procs.waiting import wait_until

pytestmark = pytest.mark.procs
MIB = 1024 * 1024
LONG = 8_000_000  # characters; the body's limit is 8 MiB
HONEST = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GIVEN_BACK_S = 60.0  # a deadline, where the machine is busy; as a rule it is a second
UNTOKENIZED = re.compile(r"there are \d+ characters in your (prompt|messages), and no more than \d+ of them fit")
TEMPLATE = "{% if messages[0].content == 'slow' %}" + LOOPS + "{% endif %}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, start_router: StartRouter) -> RouterProcess:
    """A model whose template can loop, and whose tokenizer allows no bound on characters."""
    model = write_model(tmp_path_factory.mktemp("hostile") / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE)
    configure(model / "tokenizer.json", normalizer={"type": "StripAccents"})
    return start_router(model=model)


def with_rank(router: RouterProcess) -> Iterator[RouterProcess]:
    with serving(router):
        assert post(router, HONEST).status_code == 200  # the workers are there
        yield router


@pytest.fixture
def served(router: RouterProcess) -> Iterator[RouterProcess]:
    yield from with_rank(router)


@pytest.fixture
def hostile_served(hostile: RouterProcess) -> Iterator[RouterProcess]:
    yield from with_rank(hostile)


def post(router: RouterProcess, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    return router.http.post(path, json=body, timeout=60.0)


class Beside:
    """Requests that go on while others run: how many of each kind have been answered."""

    def __init__(self, router: RouterProcess, *bodies: dict[str, Any]) -> None:
        self.answered = {"/health": 0, **{path_of(body): 0 for body in bodies}}
        self.failed: list[str] = []
        self._router = router
        self._bodies = bodies
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with plain_client(self._router.url) as http:
            while not self._stop.is_set():
                self._one("/health", lambda: http.get("/health"))
                for body in self._bodies:
                    path = path_of(body)
                    self._one(path, lambda path=path, body=body: http.post(path, json=body))

    def _one(self, what: str, request: Callable[[], httpx.Response]) -> None:
        answer = request()
        self.answered[what] += 1
        if answer.status_code != 200:
            self.failed.append(f"{what}: {answer.text}")

    def meanwhile(self, request: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer to `request`; fails the test unless others of each kind were asked and answered before it."""
        before = dict(self.answered)
        answer = request()
        answered = {what: number - before[what] for what, number in self.answered.items()}
        assert min(answered.values()) >= 2, answered  # one may have been under way
        return answer


def path_of(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def resident(router: RouterProcess) -> int:
    return psutil.Process(router.process.pid).memory_info().rss


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """Until the end of the block they do nothing."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def family(router: RouterProcess) -> list[psutil.Process]:
    """The processes that a router has started."""
    return psutil.Process(router.process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x" * LONG}),
        ("/v1/completions", {"prompt": ["ab", "漢" * (LONG // 3)]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * LONG}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 20_000}]}),
        ("/tokenize", {"prompt": "x y " * (LONG // 4)}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * LONG}]}),
    ],
    ids=["text", "batch", "chat", "chat-of-a-small-lane", "tokenize", "tokenize-chat"],
)
def test_a_text_beyond_the_context_is_not_tokenized(served: RouterProcess, path: str, body: dict[str, Any]) -> None:
    before = resident(served)
    with Beside(served, HONEST) as beside:
        status, code, text = error_of(post(served, body, path))
    assert (status, code) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens. However, there are" in text
    found = UNTOKENIZED.search(text)
    assert found is not None, text
    assert found[1] in body
    assert beside.failed == []
    assert resident(served) - before < 64 * MIB


def test_texts_just_beyond_the_context_are_told_so(served: RouterProcess) -> None:
    """More tokens than fit, but not more characters than could: they are tokenized and counted."""
    answer = post(served, {"prompt": "x" * 6_000}, "/v1/completions")
    assert error_of(answer)[:2] == (400, "context_length_exceeded")
    assert "6000" in error_of(answer)[2]
    assert not UNTOKENIZED.search(error_of(answer)[2])
    assert post(served, {"prompt": "x" * 6_000}, "/tokenize").json()["count"] == 6_000


def send_at_once(router: RouterProcess, bodies: list[bytes], path: str) -> tuple[list[httpx.Response], int]:
    """The answers, and the most memory that the router had meanwhile."""
    answers: list[httpx.Response] = []

    def send(body: bytes) -> None:
        with plain_client(router.url) as http:
            headers = {"content-type": "application/json"}
            answers.append(http.post(path, content=body, headers=headers, timeout=60.0))

    threads = [threading.Thread(target=send, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, resident(router))
        for thread in threads:
            thread.join(0.001)
    return answers, most


def chat_body(content: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}]}, ensure_ascii=False).encode()


def test_five_of_them_beside_an_honest_chat(served: RouterProcess) -> None:
    before = resident(served)
    with Beside(served, HONEST, {"prompt": "honest", "max_tokens": 1}) as beside:
        answers, most = send_at_once(served, [chat_body("x" * LONG)] * 5, "/v1/chat/completions")
    assert [error_of(answer)[:2] for answer in answers] == [(400, "context_length_exceeded")] * 5
    assert all(UNTOKENIZED.search(error_of(answer)[2]) for answer in answers)
    assert beside.failed == []
    assert most < 512 * MIB
    wait_until(lambda: resident(served) - before < 64 * MIB, "the memory is given back", GIVEN_BACK_S)
    wait_until(lambda: sum(map(rss_of, family(served))) < 256 * MIB, "the workers' too", GIVEN_BACK_S)


def test_forty_of_them_with_wide_characters(served: RouterProcess) -> None:
    """One character beyond the basic plane makes a text four times as large in memory: some are told to come again."""
    before = resident(served)
    bodies = [chat_body("x" * (LONG - 5) + "🙂")] * 40
    with Beside(served, HONEST) as beside:
        answers, most = send_at_once(served, bodies, "/v1/chat/completions")
    assert {error_of(answer)[:2] for answer in answers} <= {(400, "context_length_exceeded"), (429, "overloaded")}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    assert [failure for failure in beside.failed if "overloaded" not in failure] == []
    assert most < 512 * MIB, most // MIB
    wait_until(lambda: resident(served) - before < 64 * MIB, "the memory is given back", GIVEN_BACK_S)


def test_a_list_of_tokens_beyond_the_context_is_not_decoded(served: RouterProcess) -> None:
    """It is refused while the processes that would decode it stand still."""
    with stopped(family(served)):
        answer = post(served, {"prompt": [97] * 250_000, "echo": True}, "/v1/completions")
    assert error_of(answer)[:2] == (400, "context_length_exceeded")


def test_large_answers_of_tokenize_are_made_elsewhere(served: RouterProcess) -> None:
    with Beside(served) as beside:
        tokens = post(served, {"prompt": "é" * 3_300, "return_token_strs": True}, "/tokenize").json()
        assert (tokens["count"], len(tokens["token_strs"]), tokens["max_model_len"]) == (6_600, 6_600, 512)
        text = post(served, {"tokens": list("é".encode()) * 140_000}, "/detokenize").json()
        assert text == {"prompt": "é" * 140_000}
    assert beside.failed == []


@pytest.mark.slow
def test_a_template_that_does_not_end(hostile_served: RouterProcess) -> None:
    """It costs its own request five seconds of CPU and an error; other requests go on, chats with one worker less."""
    with Beside(hostile_served, HONEST, {"prompt": "honest", "max_tokens": 1}) as beside:
        body = {**HONEST, "messages": [{"role": "user", "content": "slow"}]}
        status, code, text = error_of(beside.meanwhile(lambda: post(hostile_served, body)))
    assert (status, code) == (400, "prompt_too_expensive")
    assert "more than the limit of 5 s of CPU" in text
    assert beside.failed == []


@pytest.mark.slow
def test_a_tokenizer_without_a_bound(hostile_served: RouterProcess) -> None:
    """A worker's limits hold in its place."""
    before = resident(hostile_served)
    with Beside(hostile_served, HONEST, {"prompt": "x" * 5_000, "max_tokens": 1, "echo": False}) as beside:
        status, code, text = error_of(post(hostile_served, {"prompt": "x" * LONG}, "/v1/completions"))
    assert (status, code) == (400, "prompt_too_expensive")
    assert "more than the limit of 256 MiB of memory" in text
    assert [failure for failure in beside.failed if "context_length_exceeded" not in failure] == []
    assert resident(hostile_served) - before < 64 * MIB


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RouterProcess]:
    """A router of the test's own, with a rank and busy-able workers; the test ends it."""
    model = write_model(tmp_path / "model")
    configure(model / "tokenizer_config.json", chat_template=TEMPLATE)
    router = RouterProcess(tmp_path / "run", model, layout_of(0))
    rank = FakeRank(router.sockets).start()
    try:
        router.wait_ready()
        assert post(router, HONEST).status_code == 200
        assert len(family(router)) >= 2  # the fork server and a worker
        yield router
    finally:
        rank.stop()
        router.process.kill()
        router.process.wait()


def test_no_process_is_left_at_the_end(own: RouterProcess) -> None:
    started = family(own)
    own.stop()
    assert psutil.wait_procs(started, timeout=60)[1] == []


def test_no_process_is_left_of_a_router_that_is_killed(own: RouterProcess) -> None:
    """Even while a worker is busy in a template, where it hears nothing."""
    sender = threading.Thread(target=_send_slow, args=(own.url,))
    sender.start()
    wait_until(lambda: any(process.cpu_percent(0.05) > 20 for process in family(own)), "a worker is busy")
    started = family(own)
    for process in started:  # none is through before the router is dead
        process.suspend()
    own.process.kill()
    own.process.wait()
    sender.join()
    for process in started:
        process.resume()
    assert psutil.wait_procs(started, timeout=60)[1] == []
    own.stop(expected=-9)


def _send_slow(url: str) -> None:
    with plain_client(url) as http, pytest.raises(httpx.TransportError):
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "slow"}]})
