"""When a stream's client hears a comment: after silence, and only then. Time passes as the test says: no machine is too
slow for it."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from elasticmoe.cli.models.byte_tokenizer import build_byte_tokenizer
from elasticmoe.common.protocol.rank import Sampling, Submit
from elasticmoe.common.protocol.router import Delta
from elasticmoe.services.router.api.answer import COMMENT, HEAD_S, Answer
from elasticmoe.services.router.api.errors import DONE
from elasticmoe.services.router.dispatch.streams import Output, Stream
from elasticmoe.services.router.text.detokenizer import TextStream, TokenTable

KEEPALIVE_S = 0.3
TABLE = TokenTable(build_byte_tokenizer())


class Waiting(selectors.DefaultSelector):
    """Whoever waits for a time has waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = time.monotonic()

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class Clockwork(asyncio.SelectorEventLoop):
    """A loop whose time passes while nothing else is to be done."""

    def __init__(self) -> None:
        self._waiting = Waiting()
        super().__init__(self._waiting)

    def time(self) -> float:
        return self._waiting.now


class Plain:
    """An answer's shape: its text."""

    def is_ready(self, *_: object) -> bool:
        return True

    async def opening(self, *_: object) -> list[bytes]:
        return []

    def events(self, _: int, __: Stream, output: Output, ___: str | None) -> bytes:
        return output.text.encode()

    def ending(self, _: object) -> bytes:
        return DONE


async def hear(pauses: list[float]) -> list[tuple[bytes, float]]:
    """What the client of a stream hears, and how long after the thing before: a token comes after each pause."""
    loop, heard, wake = asyncio.get_running_loop(), [], asyncio.Event()
    submit = Submit("r", (1,), len(pauses), Sampling(seed=1))
    stream = Stream("r", submit, TextStream(TABLE), wake, now=loop.time(), is_prompt_only=False)
    stream.deadline = loop.time() + 1_000.0
    generation: Any = SimpleNamespace(
        streams=[stream], wake=wake, is_abandoned=False, turns=None, abandon=lambda: None, close=lambda: None
    )
    last = loop.time()

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal last
        heard.append((message.get("body", b"head"), loop.time() - last))
        last = loop.time()

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def speak() -> None:
        for index, pause in enumerate(pauses):
            await asyncio.sleep(pause)
            finish = "length" if index + 1 == len(pauses) else None
            stream.accept(Delta("r", index, (90,), finish), loop.time())

    answer = Answer(generation, Plain(), is_stream=True, keepalive_s=KEEPALIVE_S)  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(speak())
        await answer({"type": "http"}, receive, send)
    return heard


def told(*pauses: float) -> list[tuple[bytes, float]]:
    with asyncio.Runner(loop_factory=Clockwork) as runner:
        return [(what, round(pause, 2)) for what, pause in runner.run(hear(list(pauses)))]


def test_a_stream_that_speaks_has_no_comments() -> None:
    """However long it goes on: the timer that looks for silence begins anew with every token."""
    heard = told(*[0.9 * KEEPALIVE_S] * 100)
    assert [what for what, _ in heard if what == COMMENT] == []
    assert b"".join(what for what, _ in heard[1:]).count(b"Z") == 100


def test_comments_come_while_it_is_silent_and_end_with_the_silence() -> None:
    heard = told(0.1, 3.5 * KEEPALIVE_S, *[0.1] * 10, 1.5 * KEEPALIVE_S, 0.1)
    assert [what for what, _ in heard[:2]] == [b"head", b"Z"]
    assert heard[2:5] == [(COMMENT, KEEPALIVE_S)] * 3
    assert [what for what, _ in heard[6:]].count(COMMENT) == 1


def test_the_head_waits_for_the_first_token_so_long_and_no_longer() -> None:
    heard = told(HEAD_S + 1.5 * KEEPALIVE_S, 0.1)
    assert heard[:2] == [(b"head", HEAD_S), (COMMENT, KEEPALIVE_S)]
