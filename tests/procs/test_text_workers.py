"""The processes that render and tokenize: stopped where they take too long or too much, replaced, none left over."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from elasticmoe.common.protocol.errors import InvalidRequest, Unavailable
from elasticmoe.services.router.text import jobs, pool
from elasticmoe.services.router.text.codec import load_codec
from elasticmoe.services.router.text.jobs import Conversation
from elasticmoe.services.router.text.pool import MIB, Limits, TextWorkers
from elasticmoe.services.router.text.texts import INLINE_CHARS_MAX, Texts
from elasticmoe.services.router.text.worker import GROWTH_BYTES_MAX
from tests.procs.descriptors import left_with
from tests.procs.router_harness import write_model
from tests.procs.waiting import wait_until

pytestmark = [pytest.mark.procs, pytest.mark.slow]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SLOW = "{% if messages[0].content == 'slow' %}" + LOOPS
HUNGRY = "{% elif messages[0].content == 'hungry' %}{{ 'x' * 900000000 * messages | length }}"
# Fills memory with what the tokenizer makes of it, which cannot be refused by an exception.
LONG = "{% elif messages[0].content == 'long' %}{{ '\u6f22' * 3000000 * messages | length }}{% endif %}"
TEMPLATE = SLOW + HUNGRY + LONG + "{% for m in messages %}{{ m.content }};{% endfor %}"
CONTEXT = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = write_model(tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return model


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "chat": Limits(2, 2.0, 128 * MIB),
        "text": Limits(1, 10.0, 128 * MIB),
        "large": Limits(1, 20.0, 256 * MIB),
    }
    monkeypatch.setattr(pool, "LANES", limits)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[tuple[Texts, TextWorkers]]:
    """The pool; afterwards no process of it is left."""
    codec = load_codec(directory)
    workers = TextWorkers(directory, codec.digest)
    keeper = asyncio.create_task(workers.keep())
    texts = Texts(codec, workers)
    seen: list[psutil.Process] = []
    try:
        assert await texts.inspect() == jobs.Inspected()
        seen = psutil.Process().children(recursive=True)
        yield texts, workers
        seen = [*seen, *psutil.Process().children(recursive=True)]
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        psutil.wait_procs(seen, timeout=60)
        assert [process for process in seen if process.is_running()] == []


def server_and_workers() -> tuple[psutil.Process, list[psutil.Process]]:
    (server,) = [child for child in psutil.Process().children() if pool.forkserver.__name__ in child.cmdline()]
    return server, server.children()


async def chat(texts: Texts, content: str, client: str = "") -> str:
    ids, _ = await texts.encode_chat(Conversation(messages=[{"role": "user", "content": content}]), CONTEXT, client)
    return bytes(ids).decode()


async def test_what_workers_do_is_what_the_codec_does(directory: Path) -> None:
    codec = load_codec(directory)
    text = "é" * INLINE_CHARS_MAX
    async with running(directory) as (texts, workers):
        assert await texts.encode([text, "ab"], CONTEXT, "", add_special=True) == [list(text.encode()), [97, 98]]
        assert await texts.decode(list(text.encode()), "", skip_special=True) == text
        assert await chat(texts, "hi") == "hi;"
        job = jobs.Tokenize(text, None, True, True, CONTEXT)
        assert await texts.tokenize(job, "") == codec.perform(job).body  # type: ignore[union-attr]
        with pytest.raises(InvalidRequest, match="reserved") as caught:
            await workers.run(jobs.Chat(Conversation(messages=[], required=("reserved",)), CONTEXT), "")
        assert (caught.value.code, caught.value.param) == ("unsupported", "reserved")


@pytest.mark.parametrize("free", [0, 1])
async def test_a_worker_that_cannot_be_started_costs_neither_the_others_nor_their_server(
    directory: Path, free: int
) -> None:
    """With no descriptor for the socket that it would talk over, or with one for that and none to watch it by. The
    request is told so at once, and not that it is too expensive."""
    async with running(directory) as (texts, _):
        assert await chat(texts, "hi") == "hi;"
        server, others = server_and_workers()
        with left_with(server.pid, free):
            with pytest.raises(Unavailable, match="no worker can be started") as caught:
                await texts.encode(["x" * (INLINE_CHARS_MAX + 1)], CONTEXT, "", add_special=True)
            assert caught.value.retryable
            assert await chat(texts, "hi") == "hi;"  # the one that is there works on
            wait_until(lambda: server.children() == others, "nobody is left over")
        assert len(await texts.encode(["x" * (INLINE_CHARS_MAX + 1)], CONTEXT, "", add_special=True)) == 1
        now, all_of_them = server_and_workers()
        assert (now, set(others) < set(all_of_them)) == (server, True)


async def test_a_template_that_does_not_end_is_stopped(directory: Path) -> None:
    async with running(directory) as (texts, _):
        with pytest.raises(InvalidRequest, match="more than the limit of 2 s of CPU") as caught:
            await chat(texts, "slow")
        assert caught.value.code == "prompt_too_expensive"
        _, alive = server_and_workers()
        psutil.wait_procs(alive, timeout=2.0)  # it ends, as a rule
        assert await chat(texts, "hi") == "hi;"


async def test_slow_chats_do_not_delay_texts(directory: Path) -> None:
    async with running(directory) as (texts, _):
        slow = [asyncio.create_task(chat(texts, "slow", "a")) for _ in range(4)]
        await asyncio.sleep(0.05)
        await texts.encode(["x" * (INLINE_CHARS_MAX + 1)], CONTEXT, "b", add_special=True)
        assert not any(task.done() for task in slow)  # each takes two seconds of CPU
        chat_of_another = asyncio.create_task(chat(texts, "hi", "b"))
        results = await asyncio.gather(*slow, return_exceptions=True)
        assert {type(result) for result in results} == {InvalidRequest}
        assert await chat_of_another == "hi;"


async def test_another_client_waits_for_one_turn_only(directory: Path) -> None:
    async with running(directory) as (texts, _):
        long = "x" * 400_000
        order: list[str] = []

        async def large(client: str) -> None:
            await texts.encode([long], CONTEXT, client, add_special=True)
            order.append(client)

        server, idle = server_and_workers()
        greedy = [asyncio.create_task(large("a")) for _ in range(8)]
        (busy,) = await wait_for(lambda: set(server.children()) - set(idle), "a large one is worked at")
        busy.suspend()
        assert await chat(texts, "hi", "c") == "hi;"  # small ones do not wait for large ones at all
        busy.resume()
        await asyncio.gather(large("b"), *greedy)
        assert order.index("b") <= 2


@pytest.mark.parametrize("content", ["hungry", "long"])
async def test_a_prompt_that_needs_too_much_memory(directory: Path, content: str) -> None:
    async with running(directory) as (texts, _):
        with pytest.raises(InvalidRequest, match="more than the limit of 128 MiB of memory") as caught:
            await chat(texts, content)
        assert caught.value.code == "prompt_too_expensive"
        assert await chat(texts, "hi") == "hi;"


async def test_memory_is_given_back(directory: Path) -> None:
    """A worker that has grown ends; one that lives on holds little more than the fork server's pages."""
    async with running(directory) as (texts, _):
        ids = await texts.encode(["漢" * 200_000], CONTEXT, "", add_special=True)
        assert len(ids[0]) == 600_000  # more than 100 MiB while it lasted
        server, _ = server_and_workers()

        def is_small() -> bool:
            most = server.memory_info().rss + GROWTH_BYTES_MAX + 8 * MIB
            return all(rss_of(process) < most for process in server.children())

        await wait_for(is_small, "memory is given back")


def rss_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


async def wait_for(condition: Any, what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + 60.0
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)
    return value


async def test_a_worker_that_somebody_kills(directory: Path) -> None:
    """One death is no proof against the job: it is done by another worker."""
    async with running(directory) as (texts, _):
        server, idle = server_and_workers()  # one was started for the inspection
        job = asyncio.create_task(texts.encode(["x" * 900_000], CONTEXT, "", add_special=True))
        (worker,) = await wait_for(lambda: set(server.children()) - set(idle), "a worker for it")
        with suppress(psutil.NoSuchProcess):  # a busy machine lets it end before
            worker.kill()
        assert len((await job)[0]) == 900_000
        for process in server_and_workers()[1]:  # idle ones
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert await chat(texts, "hi") == "hi;"


async def test_a_fork_server_that_somebody_kills(directory: Path) -> None:
    async with running(directory) as (texts, _):
        server, workers = server_and_workers()
        slow = asyncio.create_task(chat(texts, "slow"))
        await asyncio.sleep(0.1)
        server.kill()
        _, alive = psutil.wait_procs(workers, timeout=60.0)
        assert alive == []
        assert await chat(texts, "hi") == "hi;"
        with pytest.raises(InvalidRequest):  # it is done again, and stopped
            await slow
        assert server_and_workers()[0].pid != server.pid


async def test_files_that_have_changed_are_not_used(directory: Path) -> None:
    """Neither at once nor later: tokens of two tokenizers never meet in one router."""
    async with running(directory) as (texts, _):
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({"chat_template": "another"}))
        assert await chat(texts, "hi") == "hi;"
        server, alive = server_and_workers()
        server.kill()
        psutil.wait_procs([server, *alive], timeout=60.0)
        with pytest.raises(Unavailable, match="files have changed"):
            await chat(texts, "hi")


async def test_an_expression_that_takes_too_many_steps(directory: Path) -> None:
    """The library panics. It is an error of the request, and after the first the router leaves the work to workers."""
    path = directory / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    text = ("a" * 18 + "b") * 60 + "a" * 60 + "b"  # the first part takes long, and the last one too many
    async with running(directory) as (texts, _):
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="cannot be tokenized"):
                await texts.encode([text], CONTEXT, "", add_special=True)
        began = time.thread_time()
        with pytest.raises(InvalidRequest, match="cannot be tokenized"):
            await texts.encode([text], CONTEXT, "", add_special=True)
        assert time.thread_time() - began < 0.1


@pytest.mark.parametrize(
    "source", ["{{ 10 ** (10 ** 9) }}", "{{ 'x' | center(99999999) }}", "{{ ('x' * 99999999999) | length }}"]
)
async def test_a_template_that_is_a_bomb_when_it_is_compiled(directory: Path, source: str) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": source}))
    codec = load_codec(directory)
    workers = TextWorkers(directory, codec.digest)
    keeper = asyncio.create_task(workers.keep())
    texts = Texts(codec, workers)
    try:
        with pytest.raises(InvalidRequest, match=r"does not compile|limit of"):
            await chat(texts, "hi")
        text = "x" * (INLINE_CHARS_MAX + 1)
        assert len((await texts.encode([text], CONTEXT, "", add_special=True))[0]) == len(text)
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def test_a_cancelled_request_leaves_no_answer_behind(directory: Path) -> None:
    async with running(directory) as (texts, _):
        for _ in range(20):
            first = asyncio.create_task(chat(texts, "first"))
            await asyncio.sleep(0.0003)
            first.cancel()
            assert await chat(texts, "second") == "second;"
            await asyncio.gather(first, return_exceptions=True)


def test_the_limits_of_a_worker() -> None:
    """In a process of its own: they cannot be taken back."""
    from elasticmoe.services.router.text import process

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            process.confine(64 * MIB)
            bytearray(32 * MIB)
            try:
                bytearray(128 * MIB)
            except MemoryError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
